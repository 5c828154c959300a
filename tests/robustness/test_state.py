"""Calls and edits in any order: a result is that of the present data, or something is said.

`SEQUENCES=500 pytest tests/robustness/test_state.py -k sequence` runs 500 random sequences, with `FIRST=100` from the hundredth.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from conftest import ASIGN, PIXNET, Blur, Colour, small_still_stack
from spatialdata.models import Image2DModel
from spatialdata.transformations import Sequence, Translation, get_transformation, set_transformation

import spatial_impute as si

if TYPE_CHECKING:
    from collections.abc import Callable

    from spatialdata import SpatialData

N_SEQUENCES = int(os.environ.get("SEQUENCES", "12"))
FIRST = int(os.environ.get("FIRST", "0"))
LONGEST = 8


# Edits of what users own


def section_of(element: Any) -> str:
    """Coordinate system of the section of an element."""
    return next(name for name in get_transformation(element, get_all=True) if name != "aligned")


def move(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Correct the place of the spots of a section."""
    name = f"s{rng.integers(3)}"
    if f"{name}_spots" not in sdata.shapes:
        return
    spots = sdata.shapes[f"{name}_spots"]
    own = section_of(spots)
    moved = Sequence([get_transformation(spots, own), Translation([25, 15], axes=("x", "y"))])
    set_transformation(spots, moved, own)


def replace_image(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Another scan of a section."""
    name = f"s{rng.integers(3)}_image"
    if name not in sdata.images:
        return
    old = sdata.images[name]
    pixels = np.ascontiguousarray(255 - np.asarray(old.data))[:, ::-1]
    sdata.images[name] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations=get_transformation(old, get_all=True)
    )


def swap_images(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Images of two sections in each other's place."""
    if not {"s0_image", "s2_image"} <= set(sdata.images):
        return
    first, second = (sdata.images[f"{name}_image"] for name in ("s0", "s2"))
    pixels = [np.array(image.data) for image in (second, first)]
    for name, image, values in zip(("s0", "s2"), (first, second), pixels, strict=True):
        own = section_of(image)
        sdata.images[f"{name}_image"] = Image2DModel.parse(
            values, dims=("c", "y", "x"), transformations={own: get_transformation(image, own)}
        )


def drop_spots(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Take some spots out of the table and the shapes."""
    table = sdata.tables["stack"]
    keep = rng.random(table.n_obs) > 0.1
    table = sdata.tables["stack"] = table[keep].copy()
    for section in sdata.attrs["spatial_impute"]["stack"]["sections"]:
        spots = sdata.shapes.get(section["spots"])
        if spots is not None:
            kept = set(table.obs["instance_id"][table.obs["section"] == section["name"]].astype(str))
            sdata.shapes[section["spots"]] = spots[spots.index.astype(str).isin(kept)]


def drop_section(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Take the last section out of the stack."""
    record = copy.deepcopy(sdata.attrs["spatial_impute"])
    record["stack"]["sections"] = [s for s in record["stack"]["sections"] if s["name"] != "s2"]
    sdata.attrs = {**sdata.attrs, "spatial_impute": record}
    table = sdata.tables["stack"]
    table = table[(table.obs["section"] != "s2").to_numpy()].copy()
    table.obs["section"] = table.obs["section"].cat.remove_unused_categories()
    table.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": ["s0_spots", "s1_spots"]}
    table.obs["region"] = table.obs["region"].cat.remove_unused_categories()
    sdata.tables["stack"] = table
    for kind, name in (("images", "s2_image"), ("shapes", "s2_spots")):
        if name in getattr(sdata, kind):
            del getattr(sdata, kind)[name]


def reorder(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Sort the rows of the table in another way."""
    table = sdata.tables["stack"]
    sdata.tables["stack"] = table[rng.permutation(table.n_obs)].copy()


def measure_again(sdata: SpatialData, rng: np.random.Generator) -> None:
    """New counts of a section."""
    counts = sdata.tables["s1_counts"]
    counts.X = rng.permutation(np.asarray(counts.X.toarray() if hasattr(counts.X, "toarray") else counts.X))


def hide(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Hold some measured spots out, by hand."""
    table = sdata.tables["stack"]
    table.obs["measured"] = table.obs["measured"] & (rng.random(table.n_obs) > 0.3)


def change_height(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Correct the height of the last section, in the table and in the record."""
    record = copy.deepcopy(sdata.attrs["spatial_impute"])
    record["stack"]["sections"][-1]["z"] += 7.0
    sdata.attrs = {**sdata.attrs, "spatial_impute": record}
    section = record["stack"]["sections"][-1]
    obs = sdata.tables["stack"].obs
    obs.loc[obs["section"] == section["name"], "z"] = section["z"]


def rename(sdata: SpatialData, rng: np.random.Generator) -> None:
    """Give the first section another name, everywhere."""
    record = copy.deepcopy(sdata.attrs["spatial_impute"])
    section = record["stack"]["sections"][0]
    old, new = section["name"], f"{section['name']}b"
    section["name"] = new
    if record["stack"]["registration"]:
        rows = record["stack"]["registration"]["sections"]
        record["stack"]["registration"]["sections"] = {new if k == old else k: v for k, v in rows.items()}
    sdata.attrs = {**sdata.attrs, "spatial_impute": record}
    sdata.rename_coordinate_systems({old: new})
    table = sdata.tables["stack"]
    table.obs["section"] = table.obs["section"].cat.rename_categories({old: new})
    renamed = (table.obs["section"] == new).to_numpy()
    table.obs_names = [
        f"{new}_{i}" if r else n for n, i, r in zip(table.obs_names, table.obs["instance_id"], renamed, strict=True)
    ]


EDITS: dict[str, Callable[[SpatialData, np.random.Generator], None]] = {
    edit.__name__: edit
    for edit in (
        move,
        replace_image,
        swap_images,
        drop_spots,
        drop_section,
        reorder,
        measure_again,
        hide,
        change_height,
        rename,
    )
}


# Calls that prepare a stack, with the settings of a run


def select(sdata: SpatialData, n: int) -> None:
    si.pp.select_genes(sdata, n_top_genes=(9, 6)[n])


def register(sdata: SpatialData, n: int) -> None:
    sections = [s["name"] for s in sdata.attrs["spatial_impute"]["stack"]["sections"]]
    places = {name: np.array([[1, 0, 12.0 * n], [0, 1, 0], [0, 0, 1]]) for name in sections if name != "s1"}
    si.tl.register_stack(sdata, transformations=places)


def features(sdata: SpatialData, n: int) -> None:
    si.pp.extract_features(sdata, Colour(), region_scale=(2.3, 3.0)[n])


def graph(sdata: SpatialData, n: int) -> None:
    si.tl.build_3d_graph(sdata, n_neighs=(6, 4)[n])


PREPARE = {call.__name__: call for call in (select, register, features, graph)}


# Results


def baseline(sdata: SpatialData, models: dict[str, Any], method: str) -> Any:
    si.tl.impute_baseline(sdata, method)
    table = sdata.tables["stack"]
    return pd.DataFrame(table.layers[f"baseline_{method}"], index=table.obs_names, columns=table.var_names)


def imputed(sdata: SpatialData, models: dict[str, Any], _: Any) -> Any:
    si.tl.impute_3d(sdata, models["asign"])
    table = sdata.tables["stack"]
    return pd.DataFrame(table.layers["asign"], index=table.obs_names, columns=table.var_names)


def regions(sdata: SpatialData, models: dict[str, Any], _: Any) -> Any:
    return si.tl.predict_regions(sdata, "s1_spots", models["pixnet"], inplace=False).to_df()


def scores(sdata: SpatialData, models: dict[str, Any], layer: str) -> Any:
    found = si.metrics.evaluate(sdata, models["truth"], layers=[layer])
    return found.drop(columns="moran_gap")  # its neighbors on a lattice depend on the order of the rows


FITS = {
    "asign": lambda sdata: si.tl.fit_asign(sdata, model_params=ASIGN),
    "pixnet": lambda sdata: si.tl.fit_pixnet(sdata, "s1_image", "s1_spots", encoder=Blur(), model_params=PIXNET),
}


class Said(logging.Handler):
    """Whether a call said something."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def listen(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Result of a call, and what it said; an error is said too."""
    said = Said()
    logger = logging.getLogger("spatial_impute")
    logger.addHandler(said)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = call()
            except (KeyError, ValueError) as error:
                return None, [f"{type(error).__name__}: {error}"]
    finally:
        logger.removeHandler(said)
    return result, said.texts + [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


class Bench:
    """A stack with a history, and what is needed to make it anew."""

    def __init__(self, pristine: tuple[SpatialData, Any], rng: np.random.Generator) -> None:
        self.pristine, self.rng = pristine, rng
        self.sdata = copy.deepcopy(pristine[0])
        self.edits: list[tuple[str, int]] = []
        self.settings = dict.fromkeys(PREPARE, 0)
        self.order: dict[
            str, list[str]
        ] = {}  # rows of the table when a model was fitted: its random numbers follow them
        self.models: dict[str, Any] = {"truth": pristine[1]}
        for call in PREPARE.values():
            call(self.sdata, 0)

    def edit(self, name: str) -> None:
        seed = int(self.rng.integers(2**31))
        once = name in ("drop_section", "rename")
        if once and name in {done for done, _ in self.edits}:
            return
        self.edits.append((name, seed))
        EDITS[name](self.sdata, np.random.default_rng(seed))

    def prepare(self, name: str, n: int) -> list[str]:
        _, said = listen(lambda: PREPARE[name](self.sdata, n))
        if not any("Error: " in text for text in said):
            self.settings[name] = n
        return said

    def fit(self, name: str) -> None:
        model, _ = listen(lambda: FITS[name](self.sdata))
        if model is not None:
            self.models[name] = model
            self.order[name] = list(self.sdata.tables["stack"].obs_names)

    def anew(self) -> SpatialData:
        """The path from the start, on the present data and with the present settings."""
        sdata = copy.deepcopy(self.pristine[0])
        for name, seed in self.edits:
            EDITS[name](sdata, np.random.default_rng(seed))
        for name, call in PREPARE.items():
            call(sdata, self.settings[name])
            genes = list(self.sdata.tables["stack"].var_names)
            if name == "select" and "drop_spots" in dict(self.edits) and len(genes) == sdata.tables["stack"].n_vars:
                # Genes that were chosen before some spots were taken out stay chosen; their values must be the same.
                si.pp.select_genes(sdata, genes=genes)
        return sdata

    def check(self, result: Callable[..., Any], argument: Any, needs: str | None) -> str:
        """``"said"``, or ``"equal"`` if nothing was said and the result is that of the path anew.

        `needs` is the model of the result, or the method of the layer that is scored.
        """
        found, said = listen(lambda: result(self.sdata, self.models, argument))
        if said:
            return "said"
        fresh, models = self.anew(), {"truth": self.models["truth"]}
        tolerance = 1e-4
        if needs in FITS:
            tolerance = 1e-3  # networks add in the order of the rows
            table, rows = fresh.tables["stack"], self.order[needs]
            if set(rows) == set(table.obs_names):
                fresh.tables["stack"] = table[rows].copy()
            else:  # renamed
                tolerance = 0.05
            models[needs] = FITS[needs](fresh)
        if result is scores and needs == "asign":
            si.tl.impute_3d(fresh, models["asign"])
        elif result is scores:
            si.tl.impute_baseline(fresh, needs)
        expected = result(fresh, models, argument)
        columns = expected.columns.intersection(found.columns)
        assert len(columns) == len(expected.columns)
        np.testing.assert_allclose(found.loc[expected.index, columns], expected, rtol=tolerance, atol=tolerance)
        return "equal"

    def act(self) -> str:
        """One random call or edit; what came of it."""
        kind = self.rng.choice(["edit", "prepare", "fit", "result"], p=[0.3, 0.3, 0.1, 0.3])
        if kind == "edit":
            name = str(self.rng.choice(list(EDITS)))
            self.edit(name)
            return f"edit {name}"
        if kind == "prepare":
            name, n = str(self.rng.choice(list(PREPARE))), int(self.rng.integers(2))
            return f"{name}({n}) {self.prepare(name, n)}"
        if kind == "fit":
            name = str(self.rng.choice(list(FITS)))
            self.fit(name)
            return f"fit {name}"
        return self.result()

    def result(self) -> str:
        methods = ["kernel", "ridge", "propagation", "mean"]
        choices: list[tuple[Callable[..., Any], Any, str | None]] = [(baseline, m, None) for m in methods]
        choices += [(imputed, None, "asign")] * 2 * ("asign" in self.models)
        choices += [(regions, None, "pixnet")] * 2 * ("pixnet" in self.models)
        layers = [
            m
            for m in [*methods, "asign"]
            if (m if m == "asign" else f"baseline_{m}") in self.sdata.tables["stack"].layers
        ]
        choices += [(scores, m if m == "asign" else f"baseline_{m}", m) for m in layers]
        result, argument, needs = choices[self.rng.integers(len(choices))]
        return f"{result.__name__}({argument}): {self.check(result, argument, needs)}"


@pytest.fixture(scope="module")
def pristine(_quiet):
    return small_still_stack(truth=True, measured=["s1"])


@pytest.mark.parametrize("seed", range(FIRST, N_SEQUENCES))
def test_sequence_of_calls_and_edits_gives_present_results_or_says_so(pristine, seed):
    rng = np.random.default_rng(seed)
    bench = Bench(pristine, rng)
    history = []
    try:
        for _ in range(int(rng.integers(3, LONGEST))):
            history.append(bench.act())
        history.append(bench.result())
    except AssertionError as error:
        error.add_note(f"after {history}, edits {bench.edits}")
        raise
    except Exception as error:
        error.add_note(f"after {history}, edits {bench.edits}")
        raise


def test_what_was_not_edited_is_used_without_a_word(pristine):
    """Else the test above would mean nothing."""
    bench = Bench(pristine, np.random.default_rng(0))
    for name in FITS:
        bench.fit(name)
    bench.edit("reorder")
    found = [bench.check(baseline, m, None) for m in ("kernel", "ridge", "propagation")]
    found += [bench.check(imputed, None, "asign"), bench.check(regions, None, "pixnet")]
    found += [bench.check(scores, "asign", "asign"), bench.check(scores, "baseline_ridge", "ridge")]
    assert found == ["equal"] * len(found)


@pytest.mark.parametrize("name", [name for name in EDITS if name != "reorder"])
def test_every_edit_can_be_repaired(pristine, name):
    """Running again what the messages ask for gives the results of the path anew, without a word."""
    bench = Bench(pristine, np.random.default_rng(1))
    bench.fit("asign")
    bench.edit(name)
    for call in PREPARE:
        bench.prepare(call, 0)
    bench.fit("asign")
    found = [bench.check(baseline, "ridge", None), bench.check(imputed, None, "asign")]
    assert found == ["equal", "equal"]


def test_graph_notices_that_two_sections_exchanged_their_features(pristine):
    """The features of all spots together are the same as before; only their places are not."""
    sdata = copy.deepcopy(pristine[0])
    for call in PREPARE.values():
        call(sdata, 0)
    swap_images(sdata, np.random.default_rng(0))
    features(sdata, 0)
    with pytest.raises(
        ValueError, match=r"was built from other image features than the table has now\. [^.]* run `.*` again\.$"
    ):
        si.tl.impute_baseline(sdata, "propagation")


def test_what_was_moved_in_the_common_frame_is_reported(pristine):
    """Only `register_stack` places sections: by hand, the transformation alone would change."""
    sdata = copy.deepcopy(pristine[0])
    for call in (select, register):
        call(sdata, 0)
    image = sdata.images["s0_image"]
    moved = Sequence([get_transformation(image, "aligned"), Translation([40, 0], axes=("x", "y"))])
    set_transformation(image, moved, "aligned")
    _, said = listen(lambda: si.tl.impute_baseline(sdata, "kernel", inplace=False))
    assert len(said) == 1
    assert "`sdata.images['s0_image']` was moved in 'aligned'" in said[0]
    register(sdata, 0)
    assert listen(lambda: si.tl.impute_baseline(sdata, "kernel", inplace=False))[1] == []


def test_points_that_lost_their_place_do_not_stop_a_registration(pristine):
    """`copy.deepcopy` drops the transformations of points; before, images were moved and then an error came."""
    sdata = copy.deepcopy(pristine[0])
    register(sdata, 0)
    si.tl.points_3d(sdata)
    sdata = copy.deepcopy(sdata)
    register(sdata, 1)
    np.testing.assert_allclose(
        sdata.attrs["spatial_impute"]["stack"]["registration"]["sections"]["s0"]["matrix"][0][2], 12
    )
    with pytest.raises(KeyError, match="has no transformation to a section"):
        si.tl.warp_element(sdata, "stack_points", key_added="again")


def test_counts_are_compared_by_gene(pristine):
    """Columns in another order are the same counts; the columns of two genes exchanged are not, though all sums are."""
    sdata = copy.deepcopy(pristine[0])
    for call in PREPARE.values():
        call(sdata, 0)
    sdata.tables["s1_counts"] = counts = sdata.tables["s1_counts"][:, ::-1].copy()
    assert listen(lambda: si.tl.impute_baseline(sdata, "mean"))[1] == []
    counts.X = counts.X[:, [1, 0, *range(2, counts.n_vars)]]
    _, said = listen(lambda: si.tl.impute_baseline(sdata, "mean"))
    assert len(said) == 1
    assert "Run `si.pp.select_genes(sdata)` again" in said[0]


def test_pixels_that_were_loaded_are_used_as_lazy_ones(sdata, pixnet):
    """`element.load()` leaves an array of NumPy, which SpatialData takes in no new element."""
    si.tl.predict_dense(sdata, "s0_image", pixnet, features=True, key_added="features")
    lazy = si.tl.genes_from_features(sdata, "features", pixnet, inplace=False)
    warped = si.tl.warp_element(sdata, "s0_image", inplace=False)
    for key in ("features", "s0_image"):
        sdata.images[key].load()
    found = si.tl.genes_from_features(sdata, "features", pixnet, inplace=False)
    np.testing.assert_allclose(found, lazy, rtol=1e-5)  # chunks of another size add in another order
    np.testing.assert_array_equal(si.tl.warp_element(sdata, "s0_image", inplace=False), warped)
    again = si.pp.assemble_stack({"a": sdata}, coordinate_system={"a": "s0"}, mpp=1.0, z=[0.0])
    np.testing.assert_array_equal(again.images["a_image"], sdata.images["s0_image"])


def test_a_map_of_another_image_is_reported_where_it_is_exported(sdata, pixnet, tmp_path):
    si.tl.predict_dense(sdata, "s0_image", pixnet)
    register(sdata, 1)
    calls = {
        "write_ome_tiff": lambda: si.tl.write_ome_tiff(
            sdata, "s0_image_expression", tmp_path / "map.ome.tif", overwrite=True
        ),
        "warp_element": lambda: si.tl.warp_element(sdata, "s0_image_expression", inplace=False),
        "dense": lambda: si.pl.dense(sdata, "s0_image_expression", sdata.tables["stack"].var_names[0], show=False),
    }
    assert {name: listen(call)[1] for name, call in calls.items()} == {name: [] for name in calls}
    sdata.images["s0_image"].data = 255 - sdata.images["s0_image"].data
    for name, call in calls.items():
        assert ["predicted from another image" in text for text in listen(call)[1]] == [True], name


@pytest.mark.parametrize(
    "edit",
    [
        lambda stack: stack.pop("sections"),
        lambda stack: stack["sections"][0].update(note="mine"),
        lambda stack: stack["sections"].append(stack["sections"][0]),
        lambda stack: stack["registration"].pop("coordinate_system"),
        lambda stack: stack["registration"]["sections"]["s0"].update(matrix="x"),
        lambda stack: stack["registration"]["sections"]["s0"].update(matrix=[[1, 0], [0, 1]]),
    ],
)
def test_a_damaged_record_of_the_stack_is_named(pristine, edit):
    sdata = copy.deepcopy(pristine[0])
    for call in (select, register):
        call(sdata, 0)
    attrs = copy.deepcopy(sdata.attrs["spatial_impute"])
    edit(attrs["stack"])
    sdata.attrs["spatial_impute"] = attrs
    with pytest.raises(ValueError, match=r"The record of the stack in `.*` was damaged.* assemble the stack again"):
        si.tl.impute_baseline(sdata, "kernel")


def replaced(value, *keys):
    """Edit that puts something else in the place of a record below `keys`."""

    def edit(found):
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return edit


@pytest.fixture(scope="module")
def with_result(pristine):
    sdata = copy.deepcopy(pristine[0])
    for call in PREPARE.values():
        call(sdata, 0)
    si.tl.impute_baseline(sdata, "ridge", key_added="result")
    return sdata


@pytest.mark.parametrize(
    "keys",
    [
        ("normalization",),
        ("normalization", "state"),
        ("features",),
        ("features", "state"),
        ("features", "field_um"),
        ("features", "field_um", "X_region"),
        ("spatial_3d_neighbors",),
        ("spatial_3d_neighbors", "params"),
        ("spatial_3d_neighbors", "params", "bandwidth_um"),
        ("result",),
        ("result", "state"),
        ("result", "measured_spots"),
    ],
)
@pytest.mark.parametrize("value", ["text", None, 3j, ["a"]])
def test_a_record_that_was_replaced_is_named(with_result, pristine, keys, value):
    sdata = copy.deepcopy(with_result)
    replaced(value, *keys)(sdata.tables["stack"].uns)
    with pytest.raises(ValueError, match=rf"uns\['{keys[0]}'\].*(must hold the record|must be a positive number)"):  # noqa: PT012
        si.metrics.evaluate(sdata, pristine[1], layers=["result"])
        for method in ("ridge", "propagation"):
            si.tl.impute_baseline(sdata, method)


@pytest.mark.parametrize("keys", [("dense",), ("tissue",), ("stack", "registration", "state")])
def test_a_record_in_attrs_that_was_replaced_is_named(with_result, keys):
    sdata = copy.deepcopy(with_result)
    ours = copy.deepcopy(sdata.attrs["spatial_impute"])
    replaced("text", *keys)(ours)
    sdata.attrs["spatial_impute"] = ours
    with pytest.raises(ValueError, match="must hold the record that this package writes, found str 'text'"):  # noqa: PT012
        si.tl.impute_baseline(sdata, "ridge")
        si.pl.dense(sdata, "s0_image", "g", show=False)


def test_exchanged_names_of_genes_are_noticed_and_another_order_is_not(with_result, pristine):
    sdata = copy.deepcopy(with_result)
    table = sdata.tables["stack"]
    sdata.tables["stack"] = table[:, table.var_names[::-1]].copy()
    assert listen(lambda: si.metrics.evaluate(sdata, pristine[1], layers=["result"]))[1] == []
    names = table.var_names.to_numpy().copy()
    names[:2] = names[1::-1]
    table.var_names = names
    sdata.tables["stack"] = table
    said = listen(lambda: si.metrics.evaluate(sdata, pristine[1], layers=["result"]))[1]
    assert "holds other values than `sdata.tables['s1_counts']`" in said[0]
    assert "imputed from other measured expression or names of genes" in said[1]


def test_measured_values_that_do_not_come_from_the_counts_are_reported(with_result):
    def said(edit):
        sdata = copy.deepcopy(with_result)
        edit(sdata.tables["stack"])
        return ["holds other values than" in text for text in listen(lambda: si.tl.impute_baseline(sdata, "kernel"))[1]]

    def twice(table):
        table.layers["measured"] = np.log1p(table.layers["measured"])

    def exchanged(table):
        table.var_names = [table.var_names[1], table.var_names[0], *table.var_names[2:]]

    def hidden(table):
        table.obs["measured"] &= np.arange(table.n_obs) % 3 > 0
        table.layers["measured"] = table.layers["measured"].astype(np.float16)

    assert [said(twice), said(exchanged), said(hidden)] == [[True], [True], []]


def test_exchanged_names_of_rows_are_refused_and_new_ones_are_not(with_result):
    sdata = copy.deepcopy(with_result)
    table = sdata.tables["stack"]
    names = table.obs_names.to_numpy().copy()
    table.obs_names = [f"mine-{name}" for name in names]
    before = np.asarray(table.layers["measured"]).copy()
    select(sdata, 0)
    np.testing.assert_array_equal(sdata.tables["stack"].layers["measured"], before)
    features(sdata, 1)
    names[:2] = names[1::-1]
    sdata.tables["stack"].obs_names = names
    for call in PREPARE.values():
        with pytest.raises(ValueError, match=r"is named 's0_1', but by .* it is the spot 's0_0'.*Restore the names"):
            call(sdata, 0)


def test_a_section_without_rows_of_its_counts_is_named(with_result):
    sdata = copy.deepcopy(with_result)
    obs = sdata.tables["stack"].obs
    obs["instance_id"] = "x" + obs["instance_id"].astype(str)
    with pytest.raises(ValueError, match=r"is a spot of `sdata.tables\['s1_counts'\]`"):
        select(sdata, 0)


@pytest.mark.parametrize("slot", ["obsm", "obs"])
def test_columns_that_the_stack_needs_are_named(with_result, pristine, slot):
    sdata = copy.deepcopy(with_result)
    del getattr(sdata.tables["stack"], slot)["spatial" if slot == "obsm" else "z"]
    for call in (lambda: register(sdata, 0), lambda: select(sdata, 0), lambda: si.metrics.evaluate(sdata, pristine[1])):
        with pytest.raises(KeyError, match=rf"not found in `sdata.tables\['stack'\].{slot}`"):
            call()


def test_channels_are_read_by_their_names(with_result, pixnet):
    sdata = copy.deepcopy(with_result)
    expected = si.tl.predict_regions(sdata, "s0_spots", pixnet, inplace=False).X
    image = sdata.images["s0_image"]
    frames = get_transformation(image, get_all=True)
    turned = np.ascontiguousarray(np.asarray(image.data)[::-1])

    def put(names):
        sdata.images["s0_image"] = Image2DModel.parse(
            turned, dims=("c", "y", "x"), c_coords=names, transformations=frames
        )

    put(["b", "g", "r"])
    np.testing.assert_array_equal(si.tl.predict_regions(sdata, "s0_spots", pixnet, inplace=False).X, expected)
    assert listen(lambda: si.tl.impute_baseline(sdata, "ridge"))[1] == []
    put(["r", "g", "b"])
    assert "image of section 's0' is not the one" in listen(lambda: si.tl.impute_baseline(sdata, "ridge"))[1][0]
    put(["DAPI", "CD3", "CD8"])
    with pytest.raises(ValueError, match=r"sdata.images\['s0_image'\].*fluorescence"):
        si.tl.predict_regions(sdata, "s0_spots", pixnet, inplace=False)


def test_an_image_without_a_place_in_its_section_is_named(with_result):
    from spatialdata.transformations import remove_transformation

    sdata = copy.deepcopy(with_result)
    remove_transformation(sdata.images["s0_image"], "s0")
    with pytest.raises(KeyError, match=r"'s0' not found in `coordinate systems of sdata.images\['s0_image'\]`"):
        si.tl.impute_baseline(sdata, "ridge")


def test_layers_may_be_sparse(with_result, pristine):
    from scipy import sparse

    sdata = copy.deepcopy(with_result)
    expected = si.metrics.evaluate(sdata, pristine[1], layers=["result"])
    layers = sdata.tables["stack"].layers
    for name in ("measured", "result"):
        layers[name] = sparse.csr_matrix(layers[name])
    pd.testing.assert_frame_equal(si.metrics.evaluate(sdata, pristine[1], layers=["result"]), expected)


def test_an_image_that_was_taken_out_makes_no_result_wrong(with_result):
    sdata = copy.deepcopy(with_result)
    expected = np.asarray(sdata.tables["stack"].layers["result"])
    del sdata.images["s0_image"]
    said = listen(lambda: si.tl.impute_baseline(sdata, "ridge"))[1]
    assert said == ["`sdata.images['s0_image']` is gone. What was computed from it is used as it is."]
    np.testing.assert_array_equal(sdata.tables["stack"].layers["baseline_ridge"], expected)


def test_sections_as_text_are_named_where_scores_are_made(with_result, pristine):
    sdata = copy.deepcopy(with_result)
    sdata.tables["stack"].obs["section"] = sdata.tables["stack"].obs["section"].astype(str).astype(object)
    with pytest.raises(ValueError, match=r"`obs\['section'\]` must be categorical"):
        si.metrics.evaluate(sdata, pristine[1], layers=["result"])
