"""Every result says where it comes from, in types that JSON and every store can hold, and comes out the same again."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import spatialdata as sd
from anndata import read_h5ad
from spatialdata.transformations import get_transformation, set_transformation

import spatial_impute as si
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import section_image


def jsonable(value) -> bool:
    """Whether JSON gives back what it was given (NaN aside)."""
    text = json.dumps(value)
    return json.dumps(json.loads(text)) == text


@pytest.fixture
def imputed(sdata, asign, pixnet):
    """Stack with every kind of result."""
    si.tl.impute_baseline(sdata, "kernel")
    si.tl.impute_3d(sdata, asign)
    si.tl.predict_dense(sdata, "s0_image", pixnet)
    si.tl.predict_regions(sdata, "s0_spots", pixnet)
    return sdata


COMMON = {"units", "encoder", "version"}
IMPUTED = COMMON | {"measured_sections", "genes", "registration"}


def test_imputed_layers_say_where_they_come_from(imputed, asign):
    table = imputed.tables["stack"]
    for key in ("asign", "baseline_kernel"):
        record = table.uns[key]
        assert record.keys() >= IMPUTED
        assert record["measured_sections"] == ["s1"]
        assert record["genes"] == list(table.var_names)
        assert record["units"] == "log1p of counts per 10000 (all genes)"
        assert record["registration"]["verdict"] == dict.fromkeys(["s0", "s1", "s2"], "ok")
        assert jsonable(record)
    assert table.uns["baseline_kernel"]["method"] == "kernel"
    record = table.uns["asign"]
    assert record["model"] == asign.identity
    assert record["model_params"]["n_steps"] == asign.params.n_steps
    assert record["seed"] == 0


def test_steps_before_say_how_they_were_done(imputed):
    table = imputed.tables["stack"]
    for key in ("normalization", "features", "spatial_3d_neighbors"):
        assert table.uns[key]["version"] == si.__version__
        assert jsonable(table.uns[key])
    registration = imputed.attrs["spatial_impute"]["stack"]["registration"]
    assert {"version", "method", "seed", "params", "sections", "pairs"} <= registration.keys()
    assert jsonable(imputed.attrs)


def test_maps_and_regions_say_where_they_come_from(imputed, pixnet):
    dense = imputed.attrs["spatial_impute"]["dense"]["s0_image_expression"]
    regions = imputed.tables["s0_spots_expression"].uns["pixnet"]
    for record in (dense, regions):
        assert record.keys() >= COMMON | {"model", "image", "aggregate", "resolution_um", "trained_on", "seed"}
        assert record["model"] == pixnet.identity
        assert record["trained_on"] == ["s1_image"]
        assert jsonable(record)
    assert dense["genes"] == pixnet.var_names
    assert dense["n_tiles_predicted"] <= dense["n_tiles"]


def test_models_say_what_they_were_fitted_on(asign, pixnet, tmp_path):
    for model in (asign, pixnet):
        assert {"encoder", "units", "seed", "version"} <= model.config.keys()
        assert jsonable(model.config)
    asign.save(tmp_path / "m")
    assert si.models.AsignModel.load(tmp_path / "m").identity == asign.identity
    other = copy.copy(asign)
    other.__dict__.pop("identity", None)
    other._tensors = asign._tensors | {"centre": asign._tensors["centre"] + 1e-3}
    assert other.identity != asign.identity


def test_provenance_survives_every_store(imputed, tmp_path):
    table = imputed.tables["stack"]
    imputed.write(tmp_path / "a.zarr")
    table.write_h5ad(tmp_path / "a.h5ad")
    back = sd.read_zarr(tmp_path / "a.zarr")
    assert back.attrs["spatial_impute"] == imputed.attrs["spatial_impute"]
    for found in (back.tables["stack"], read_h5ad(tmp_path / "a.h5ad")):
        for key in ("asign", "baseline_kernel"):
            assert list(found.uns[key]["genes"]) == table.uns[key]["genes"]
            assert dict(found.uns[key]["registration"]["verdict"]) == table.uns[key]["registration"]["verdict"]
        assert int(found.uns["asign"]["model_params"]["width"]) == 8
        assert str(found.uns["asign"]["model"]) == table.uns["asign"]["model"]
    assert list(back.tables["s0_spots_expression"].uns["pixnet"]["trained_on"]) == ["s1_image"]


def test_same_seed_gives_the_same_bits(still, asign, pixnet):
    """Everything again from the stack on; registration has its own tests."""
    sdata = copy.deepcopy(still[0])
    table = sdata.tables["stack"]
    features = {key: table.obsm[key].copy() for key in ("X_spot", "X_region", "X_global")}
    graph = table.obsp["spatial_3d_connectivities"].copy()
    del table.uns["features"]
    encoder = type("Colour", (), {"name": "colour", "mpp": 4.0, "patch_px": 16, "dense": False})
    encoder.__call__ = lambda self, p: np.concatenate([p.mean(axis=(1, 2)), p.std(axis=(1, 2))], axis=1)
    si.pp.extract_features(sdata, encoder())
    si.tl.build_3d_graph(sdata)
    for key, values in features.items():
        assert table.obsm[key].tobytes() == values.tobytes()
    assert table.obsp["spatial_3d_connectivities"].data.tobytes() == graph.data.tobytes()
    params = {"n_steps": 2, "width": 8, "n_heads": 2, "n_folds": 2}
    assert si.tl.fit_asign(sdata, model_params=params).identity == asign.identity
    assert si.tl.fit_asign(sdata, model_params=params, seed=1).identity != asign.identity
    again = si.tl.fit_pixnet(
        sdata, "s1_image", "s1_spots", encoder=type(pixnet.network.pyramid.module)(), model_params=pixnet.params
    )
    assert again.identity == pixnet.identity
    a, b = (si.tl.predict_dense(sdata, "s0_image", m, inplace=False).compute().to_numpy() for m in (pixnet, again))
    assert a.tobytes() == b.tobytes()


def test_another_section_on_the_same_image_is_not_taken_for_the_measured_one(
    small_stack, quick_params, quick_search, caplog
):
    """E.g. every other row of one array as a section of its own."""
    sdata = small_stack
    image, place = copy.deepcopy(sdata.images["s1_image"]), get_transformation(sdata.images["s0_image"], get_all=True)
    set_transformation(image, place, set_all=True)
    sdata.images["s0_image"] = image
    record = load_record(sdata)
    assert section_image(sdata, record["s0"]) == section_image(sdata, record["s1"])
    si.tl.register_stack(sdata, method="rigid", on_failure="warn", registration_params=quick_search)
    si.pp.extract_features(sdata)
    si.tl.build_3d_graph(sdata)
    model = si.tl.fit_asign(sdata, model_params=quick_params)
    caplog.clear()
    with caplog.at_level("WARNING", "spatial_impute"):
        si.tl.impute_3d(sdata, model)
    assert "which are not measured now" not in caplog.text
