"""Arguments and files at random: a right answer, or an error that this package raises on purpose."""

from __future__ import annotations

import copy
import json
import traceback
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from bad_inputs._make import scan, visium, write
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import spatial_impute as si
from spatial_impute._image.reading import open_image

SOURCE = str(Path(si.__file__).parent)
OURS = (ValueError, KeyError, TypeError, FileNotFoundError, FileExistsError)

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(-10, 10),
    st.sampled_from([float("nan"), float("inf"), 1e300, 10**30, "", "x", "s0", "../x", "spatial", [], [1], {}, (1, 2)]),
)


class Begun(Exception):
    """The work began, so the arguments were accepted."""


def ours(call, *, work: str | None = None) -> object:
    """Result of a call; an error must be raised by this package, not somewhere below it. `work` is not carried out."""
    try:
        with patch(work, side_effect=Begun) if work else nullcontext():
            return call()
    except Begun:
        return None
    except OURS as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if not (last.filename.startswith(SOURCE) and last.line.startswith("raise ")):
            raise
        assert len(str(error)) > 20  # noqa: PT017
        return None


@given(mpp=odd, z=odd, spacing=odd, reference=odd, name=st.text(max_size=5) | st.just("s"))
def test_assemble_stack_arguments(mpp, z, spacing, reference, name):
    sections = {name: scan(), "other": scan(seed=1)}
    ours(lambda: si.pp.assemble_stack(sections, mpp=mpp, z=z, section_spacing=spacing, reference=reference))


@given(
    values=hnp.arrays(np.float64, (4, 3), elements=st.floats(width=32) | st.integers(0, 20).map(float)),
    n=odd,
    target=odd,
)
def test_select_genes_values(values, n, target):
    def call():
        sdata = si.pp.assemble_stack({"s": visium(values=values)}, mpp=1, z=[0])
        si.pp.select_genes(sdata, n_top_genes=n, target_sum=target)
        assert np.isfinite(sdata.tables["stack"].layers["measured"]).all()

    ours(call)


@given(pitch=odd, diameter=odd, fraction=odd, layout=odd, resolution=odd)
def test_segment_and_tile_arguments(pitch, diameter, fraction, layout, resolution):
    sdata = si.pp.assemble_stack({"s": scan()}, mpp=4, z=[0])
    ours(lambda: si.pp.segment_tissue(sdata, resolution=resolution))
    ours(
        lambda: si.pp.tile_spots(
            sdata, spot_diameter=diameter, spacing=pitch, layout=layout, min_tissue_fraction=fraction
        )
    )


GRAPH = (
    "use_rep",
    "n_neighs",
    "n_cross_neighs",
    "max_section_gap",
    "max_distance",
    "n_similar",
    "similarity_threshold",
    "similarity_weight",
    "key_added",
    "table_key",
)


@given(arguments=st.dictionaries(st.sampled_from(GRAPH), odd, min_size=1, max_size=3))
def test_build_3d_graph_arguments(still, arguments):
    sdata = copy.deepcopy(still[0])
    ours(lambda: si.tl.build_3d_graph(sdata, **arguments))


IMPUTE = ("method", "table_key", "layer", "graph_key", "key_added")


@given(arguments=st.dictionaries(st.sampled_from(IMPUTE), odd, min_size=1, max_size=3))
def test_impute_baseline_arguments(still, arguments):
    sdata = copy.deepcopy(still[0])
    ours(lambda: si.tl.impute_baseline(sdata, **arguments))


VALIDATE = ("methods", "split", "n_folds", "block_spacings", "by", "table_key", "layer", "seed", "device")


@given(arguments=st.dictionaries(st.sampled_from(VALIDATE), odd, min_size=1, max_size=3))
def test_cross_validate_arguments(still, arguments):
    ours(
        lambda: si.tl.cross_validate(still[0], **({"methods": ["mean"]} | arguments)),
        work="spatial_impute.models.asign._fit.predict_held_out",
    )


REGISTER = (
    "reference",
    "method",
    "policy",
    "order",
    "checked",
    "on_failure",
    "resolution",
    "transformations",
    "initial",
    "skip",
    "registration_params",
    "target_coordinate_system",
    "seed",
)


@given(arguments=st.dictionaries(st.sampled_from(REGISTER), odd, min_size=1, max_size=3))
def test_register_stack_arguments(still, arguments):
    sdata = copy.deepcopy(still[0])
    place = {"transformations": {"s0": np.eye(3), "s2": np.eye(3)}}
    ours(
        lambda: si.tl.register_stack(sdata, **(place | {"inplace": False} | arguments)),
        work="spatial_impute.tl._register_stack.register_chain",
    )


DENSE = ("genes", "shapes_key", "coordinate_system", "mpp", "tile_size", "output_dtype", "device", "key_added")


@given(arguments=st.dictionaries(st.sampled_from(DENSE), odd, min_size=1, max_size=3))
def test_predict_dense_arguments(still, pixnet, arguments):
    sdata = copy.deepcopy(still[0])
    ours(lambda: si.tl.predict_dense(sdata, "s0_image", pixnet, **arguments))


REGIONS = ("image_key", "genes", "coordinate_system", "mpp", "tile_size", "device", "key_added")


@given(
    shapes_key=odd | st.just("s0_spots"),
    arguments=st.dictionaries(st.sampled_from(REGIONS), odd, min_size=1, max_size=3),
)
def test_predict_regions_arguments(still, pixnet, shapes_key, arguments):
    sdata = copy.deepcopy(still[0])
    ours(
        lambda: si.tl.predict_regions(sdata, shapes_key, pixnet, **arguments),
        work="spatial_impute.models.pixnet._model.PixNetModel._read_regions",
    )


WARP = ("section", "pixel_size", "key_added")


@given(
    key=odd | st.sampled_from(["s0_spots", "s0_image"]),
    arguments=st.dictionaries(st.sampled_from(WARP), odd, min_size=1, max_size=3),
)
def test_warp_element_arguments(still, key, arguments):
    sdata = copy.deepcopy(still[0])
    ours(lambda: si.tl.warp_element(sdata, key, **arguments))


FIT = (
    "width",
    "n_heads",
    "n_neighs",
    "n_graph_layers",
    "dropout",
    "learning_rate",
    "n_folds",
    "block_spacings",
    "n_gene_groups",
    "correlation_weight",
    "weight_decay",
)


@settings(max_examples=max(8, settings.default.max_examples // 5))
@given(params=st.dictionaries(st.sampled_from(FIT), odd, min_size=1, max_size=2))
def test_fit_asign_parameters(still, params):
    ours(
        lambda: si.tl.fit_asign(still[0], model_params={"n_steps": 1, "width": 8, "n_heads": 2, "n_folds": 2} | params)
    )


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".tif", ".png", ".jpg", ".svs"]), start=st.booleans())
def test_files_of_random_bytes(tmp_path_factory, content, suffix, start):
    magic = {".tif": b"II*\0", ".svs": b"II*\0", ".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff\xe0"}[suffix]
    path = write(tmp_path_factory.mktemp("file") / f"a{suffix}", (magic if start else b"") + content)

    def read():
        for level in open_image(path).levels:
            level.compute(scheduler="synchronous")

    ours(read)


json_values = st.recursive(
    odd.filter(lambda v: not isinstance(v, tuple)), lambda v: st.lists(v, max_size=3), max_leaves=4
)


@given(data=st.data())
def test_configurations_of_models_with_an_odd_entry(asign, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("model") / "m"
    asign.save(path)
    config = json.loads((path / "config.json").read_text())
    owner = data.draw(st.sampled_from([config, config["params"]]))
    owner[data.draw(st.sampled_from(sorted(owner)))] = data.draw(json_values)
    (path / "config.json").write_text(json.dumps(config))
    ours(lambda: repr(si.models.AsignModel.load(path)))


@given(cut=st.integers(0, 3000), byte=st.integers(0, 255))
def test_damaged_weights(asign, tmp_path_factory, cut, byte):
    path = tmp_path_factory.mktemp("model") / "m"
    asign.save(path)
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[cut] = byte
    changed = bytes(weights) != (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights)
    if changed:
        with pytest.raises(ValueError, match=r"is damaged|is not the one"):
            si.models.AsignModel.load(path)
