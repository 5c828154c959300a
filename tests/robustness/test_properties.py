"""What holds for any stack, found by drawing many of them."""

from __future__ import annotations

import copy

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import torch
from bad_inputs._make import scan, visium
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import spatial_impute as si
from spatial_impute._geometry import apply_affine, disc_iou
from spatial_impute._graph import EdgeRules, build_graph, typical_spacing
from spatial_impute._image.levels import image_levels, read_thumbnail
from spatial_impute.encoders._pyramids import Box
from spatial_impute.models._spots import Spots
from spatial_impute.models.asign._baselines import METHODS
from spatial_impute.models.asign._propagation import propagate
from spatial_impute.models.pixnet._region_weights import CellGrid, Discs, Polygons, build_stencil

SEEDS = st.integers(0, 2**32 - 1)
FILLS = st.sampled_from([0.0, -1.0, 1e300, float("nan"), float("inf"), -float("inf")]) | st.floats(-50, 50)


def similarity(seed: int, *, flip: bool = False) -> np.ndarray:
    """Random rotation, scale and shift, (3, 3)."""
    rng = np.random.default_rng(seed)
    angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-2, 2))
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = np.array([[c, -s, rng.uniform(-1e3, 1e3)], [s, c, rng.uniform(-1e3, 1e3)], [0, 0, 1]])
    return matrix @ np.diag([-1.0 if flip else 1.0, 1.0, 1.0])


def random_spots(seed: int, n: int) -> dict:
    """Points, sections, radii and features of a random stack."""
    rng = np.random.default_rng(seed)
    section = np.sort(rng.integers(0, 3, n))
    xyz = np.column_stack([rng.uniform(0, 1000, (n, 2)), 20.0 * section])
    return {"xyz": xyz, "section": section, "radius": rng.uniform(10, 60, n), "features": rng.normal(size=(n, 5))}


def graph_of(xyz, section, radius, features, scale: float = 1.0):
    spacing = typical_spacing(xyz, section)
    rules = EdgeRules(
        n_neighs=4,
        n_cross_neighs=3,
        max_section_gap=2,
        max_distance=300.0 * scale,
        n_similar=2,
        similarity_threshold=0.3,
        similarity_weight=1.0,
        bandwidth=spacing,
    )
    return build_graph(xyz, section, radius, features, rules)


def spots_of(parts: dict, known: np.ndarray, values: np.ndarray, graph) -> Spots:
    return Spots(
        xyz=parts["xyz"],
        section=parts["section"],
        known=known,
        expression=values[known],
        spacing=typical_spacing(parts["xyz"], parts["section"]),
        features=parts["features"],
        graph=graph.weights.astype(float),
    )


# Joins


@given(seed=SEEDS, kind=st.sampled_from(["text", "number", "unicode"]))
def test_expression_is_joined_by_id_whatever_the_order(seed, kind):
    rng = np.random.default_rng(seed)
    ids = {"text": list("abcd"), "number": [3, 10, 7, 100], "unicode": ["α", "雪", "ß", "x-1"]}[kind]
    rows = [ids[i] for i in rng.permutation(4)[: rng.integers(1, 5)]]
    values = rng.integers(0, 50, (len(rows), 3)).astype(float) + 1
    found = visium(ids=[ids[i] for i in rng.permutation(4)], rows=rows, values=values)
    sdata = si.pp.assemble_stack({"s": found}, mpp=1, z=[0])
    si.pp.select_genes(sdata)
    table = sdata.tables["stack"]
    assert set(table.obs_names[table.obs["measured"]]) == {f"s_{i}" for i in rows}
    expected = pd.DataFrame(
        np.log1p(values / values.sum(axis=1, keepdims=True) * 1e4),
        index=[f"s_{i}" for i in rows],
        columns=["g0", "g1", "g2"],
    )
    measured = table[table.obs["measured"].to_numpy()]
    np.testing.assert_allclose(
        measured.layers["measured"], expected.loc[measured.obs_names, list(table.var_names)], rtol=1e-6
    )


@given(seed=SEEDS)
def test_rows_of_the_stack_table_may_stand_in_any_order(still, seed):
    """Graph and imputation follow the rows; nothing else changes."""
    sdata = copy.deepcopy(still[0])
    table = sdata.tables["stack"]
    rng = np.random.default_rng(seed)
    table.obsm["spatial_3d"] = table.obsm["spatial_3d"] + np.r_[1.0, 1.0, 0.0] * rng.normal(size=(table.n_obs, 3))
    order = rng.permutation(table.n_obs)
    other = copy.deepcopy(sdata)
    other.tables["stack"] = table[order].copy()
    for stack in (sdata, other):
        si.tl.build_3d_graph(stack)
        for method in ("kernel", "propagation", "ridge"):
            si.tl.impute_baseline(stack, method)
    expected, found = sdata.tables["stack"], other.tables["stack"]
    difference = expected.obsp["spatial_3d_connectivities"][order][:, order] - found.obsp["spatial_3d_connectivities"]
    assert abs(difference).max() < 1e-6
    for method in ("kernel", "propagation", "ridge"):
        key = f"baseline_{method}"
        np.testing.assert_allclose(found.layers[key], expected.layers[key][order], rtol=1e-4, atol=1e-4)


# Equivariance


@given(seed=SEEDS, n=st.integers(8, 60), flip=st.booleans())
def test_graph_and_imputation_follow_the_frame(seed, n, flip):
    """Turning, mirroring, shifting and scaling all sections together changes nothing but lengths."""
    parts = random_spots(seed, n)
    assume(min(np.bincount(parts["section"], minlength=3)) >= 2)
    matrix = similarity(seed, flip=flip)
    scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    xyz = np.column_stack([apply_affine(parts["xyz"][:, :2], matrix), parts["xyz"][:, 2] * scale])
    moved = parts | {"xyz": xyz, "radius": parts["radius"] * scale}
    graph, graph_moved = graph_of(**parts), graph_of(**moved, scale=scale)
    assert abs(graph.weights - graph_moved.weights).max() < 1e-4
    assert abs(graph.distances * scale - graph_moved.distances).max() < 1e-3 * scale
    rng = np.random.default_rng(seed)
    known = parts["section"] == 1
    values = rng.normal(size=(n, 3))
    for method in ("mean", "nearest", "knn", "kernel", "propagation"):
        a, b = (
            METHODS[method](spots_of(p, known, values, g)).expression()
            for p, g in ((parts, graph), (moved, graph_moved))
        )
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=method)


@given(seed=SEEDS, n=st.integers(6, 60))
def test_graph_is_equivariant_to_permutation(seed, n):
    parts = random_spots(seed, n)
    parts["xyz"][:, :2] = np.round(parts["xyz"][:, :2] / 100) * 100 + 1e-9 * np.arange(n)[:, None]  # nearly all tie
    assume(min(np.bincount(parts["section"], minlength=3)) >= 2)
    order = np.random.default_rng(seed).permutation(n)
    graph = graph_of(**parts)
    other = graph_of(**{key: value[order] for key, value in parts.items()})
    assert abs(graph.weights[order][:, order] - other.weights).max() < 1e-6
    assert abs(graph.weights - graph.weights.T).max() == 0
    assert graph.weights.diagonal().sum() == 0


@given(distance=st.floats(0, 1e4), a=st.floats(1e-2, 1e3), b=st.floats(1e-2, 1e3), scale=st.floats(1e-2, 1e2))
def test_disc_iou_is_symmetric_bounded_and_without_unit(distance, a, b, scale):
    iou = disc_iou(np.array([distance]), a, b)[0]
    assert 0 <= iou <= 1 + 1e-9
    assert iou == pytest.approx(disc_iou(np.array([distance]), b, a)[0], abs=1e-9)
    assert iou == pytest.approx(disc_iou(np.array([distance * scale]), a * scale, b * scale)[0], abs=1e-6)
    assert (iou == 0) == (distance >= a + b) or iou < 1e-6


@given(seed=SEEDS, n=st.integers(3, 40), leak=st.floats(0, 10), shift=st.floats(-100, 100), factor=st.floats(0.01, 100))
def test_propagation_is_a_mean_and_knows_no_unit(seed, n, leak, shift, factor):
    from scipy import sparse

    rng = np.random.default_rng(seed)
    weights = sparse.random(n, n, density=0.3, random_state=np.random.RandomState(seed % 2**31))
    weights = sparse.csr_matrix(weights + weights.T)
    weights.setdiag(0)
    weights.eliminate_zeros()
    known = rng.random(n) < 0.4
    known[0] = True
    values = rng.normal(size=(int(known.sum()), 2))
    found, mass = propagate(weights, known, values, leak=leak)
    reached = mass > 0
    assert (found[reached] >= values.min(axis=0) - 1e-5).all()
    assert (found[reached] <= values.max(axis=0) + 1e-5).all()
    assert np.isnan(found[~reached]).all()
    assert ((mass >= 0) & (mass <= 1)).all()
    moved, same = propagate(weights, known, values * factor + shift, leak=leak)
    np.testing.assert_allclose(moved[reached], found[reached] * factor + shift, atol=1e-4 * (factor + abs(shift)))
    np.testing.assert_allclose(same, mass, atol=1e-7)


# Pixels and regions


@given(height=st.integers(1, 70), width=st.integers(1, 70), mpp=st.floats(0.1, 20), factor=st.integers(1, 9))
def test_pixel_centres_lie_at_halves(height, width, mpp, factor):
    """A ramp that says where it is: x + y in um at the middle of each pixel, at every working resolution."""
    import dask.array as da
    from spatialdata.models import Image2DModel

    y, x = np.meshgrid((np.arange(height) + 0.5) * mpp, (np.arange(width) + 0.5) * mpp, indexing="ij")
    element = Image2DModel.parse(da.from_array(np.stack([x, y, x + y]), chunks=(3, 16, 16)), dims=("c", "y", "x"))
    levels = image_levels(element, np.diag([mpp, mpp, 1.0]))
    full = 2e4  # brighter than all values; brighter ones are cut off
    levels = [type(level)(level.data, level.to_um, full) for level in levels]
    rgb, to_um = read_thumbnail(levels, factor * mpp)
    rows, columns = rgb.shape[:2]
    where = np.stack(np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5), axis=-1).reshape(-1, 2)
    found = rgb[..., :2].reshape(-1, 2) * (full / 255)
    np.testing.assert_allclose(found, apply_affine(where, to_um), rtol=1e-4, atol=1e-3 * mpp)


regions = st.tuples(st.floats(-20, 120), st.floats(-20, 120), st.floats(0.05, 80))


@given(discs=st.lists(regions, min_size=1, max_size=5))
def test_discs_hold_the_pixels_whose_centres_they_hold(discs):
    values = np.array(discs)
    shapes = Discs(values[:, :2], values[:, 2])
    box = Box(0, 90, 0, 100)
    stencil = build_stencil(shapes, box, CellGrid.whole(4, 23, 25), box)
    x, y = np.meshgrid(np.arange(100) + 0.5, np.arange(90) + 0.5)
    for i, (cx, cy, r) in enumerate(values):
        inside = int(((x - cx) ** 2 + (y - cy) ** 2 <= r * r).sum())
        weights = stencil.weights[stencil.start[i] : stencil.start[i + 1]]
        if inside:
            assert stencil.n_pixels[i] == inside
        np.testing.assert_allclose(weights.sum(), stencil.n_pixels[i], rtol=1e-9)
        assert (weights >= 0).all()


@given(
    discs=st.lists(regions, min_size=1, max_size=4),
    cuts=st.tuples(st.integers(1, 89), st.integers(1, 99)),
    square=st.booleans(),
)
def test_sums_over_a_partition_are_the_sum_over_the_whole(discs, cuts, square):
    import shapely

    values = np.array(discs)
    if square:
        shapes = Polygons.from_shapely(np.array([shapely.box(x - r, y - r, x + r, y + r) for x, y, r in values]))
    else:
        shapes = Discs(values[:, :2], values[:, 2])
    image, grid = Box(0, 90, 0, 100), CellGrid.whole(4, 23, 25)
    cells = np.random.default_rng(0).normal(size=grid.n_y * grid.n_x)

    def sums(box):
        s = build_stencil(shapes, box, grid, image)
        parts = [s.weights[a:b] @ cells[s.cells[a:b]] for a, b in zip(s.start[:-1], s.start[1:], strict=True)]
        return np.array(parts), s.n_pixels

    row, column = cuts
    boxes = [Box(y0, y1, x0, x1) for y0, y1 in ((0, row), (row, 90)) for x0, x1 in ((0, column), (column, 100))]
    whole, n_pixels = sums(image)
    parts = [sums(box) for box in boxes]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole, atol=1e-8)
    np.testing.assert_allclose(sum(p[1] for p in parts), n_pixels, atol=1e-9)


# Storage


names = st.lists(st.text(min_size=1, max_size=8), min_size=9, max_size=9, unique=True)


@given(genes=names)
def test_saved_model_is_the_same_model(asign, genes, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    model = copy.copy(asign)
    model.var_names = genes
    model.predictability = pd.Series(asign.predictability.to_numpy(), index=genes)
    model.save(path)
    found = si.models.AsignModel.load(path)
    assert found.var_names == genes
    assert found.config == asign.config
    pd.testing.assert_series_equal(found.predictability, model.predictability)
    assert found._tensors.keys() == model._tensors.keys()
    assert all(torch.equal(found._tensors[key], value) for key, value in model._tensors.items())


def test_loaded_models_predict_the_same(still, asign, pixnet, tmp_path):
    asign.save(tmp_path / "asign")
    pixnet.save(tmp_path / "pixnet")
    found = si.models.AsignModel.load(tmp_path / "asign")
    a, b = (si.tl.impute_3d(still[0], m, inplace=False) for m in (asign, found))
    assert a.X.tobytes() == b.X.tobytes()
    assert a.layers["asign_sd"].tobytes() == b.layers["asign_sd"].tobytes()
    found = si.models.PixNetModel.load(tmp_path / "pixnet", encoder=type(pixnet.network.pyramid.module)())
    a, b = (si.tl.predict_regions(still[0], "s0_spots", m, inplace=False) for m in (pixnet, found))
    assert a.X.tobytes() == b.X.tobytes()


# Leaks


@given(seed=SEEDS, fill=FILLS, n_known=st.integers(4, 30))
def test_nothing_unmeasured_reaches_a_result(still, seed, fill, n_known):
    """Any stack, any spots measured, anything in the other rows: not one bit changes."""
    results = []
    for value in (np.nan, fill):
        sdata = copy.deepcopy(still[0])
        table = sdata.tables["stack"]
        rng = np.random.default_rng(seed)
        layer = rng.normal(2, 1, table.shape).astype(np.float32)
        measured = np.zeros(table.n_obs, bool)
        measured[rng.permutation(table.n_obs)[:n_known]] = True
        with np.errstate(over="ignore"):
            layer[~measured] = value
        table.layers["measured"], table.obs["measured"] = layer, measured
        table.obs["total_counts"] = np.where(measured, 1000.0, abs(value))
        table.obsm["spatial_3d"] += rng.normal(size=(table.n_obs, 3))
        si.tl.build_3d_graph(sdata)
        results.append([si.tl.impute_baseline(sdata, m, inplace=False).X.tobytes() for m in METHODS])
    assert results[0] == results[1]


@settings(max_examples=max(3, settings.default.max_examples // 5))  # each one fits two models
@given(seed=SEEDS, fill=FILLS)
def test_nothing_unmeasured_reaches_a_model(still, seed, fill):

    results = []
    for value in (np.nan, fill):
        sdata = copy.deepcopy(still[0])
        table = sdata.tables["stack"]
        rng = np.random.default_rng(seed)
        measured = (table.obs["section"] == "s1").to_numpy() & (rng.random(table.n_obs) < 0.7)
        layer = rng.normal(2, 1, table.shape).astype(np.float32)
        with np.errstate(over="ignore"):
            layer[~measured] = value
        table.layers["measured"], table.obs["measured"] = layer, measured
        model = si.tl.fit_asign(sdata, model_params={"n_steps": 2, "width": 8, "n_heads": 2, "n_folds": 2})
        found = si.tl.impute_3d(sdata, model, inplace=False)
        results.append((found.X.tobytes(), found.layers["asign_sd"].tobytes(), model.history.to_json()))
    assert results[0] == results[1]


# Shapes of any kind


@given(array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)))
def test_arrays_become_sections_or_are_refused(array):
    try:
        sdata = si.pp.assemble_stack({"s": array}, mpp=1, z=[0])
    except ValueError as error:
        assert "Section 's'" in str(error)  # noqa: PT017
    else:
        assert sdata.images["s_image"].data.size == array.size


def test_helpers_make_what_they_say():
    assert scan().shape == (80, 90, 3)
    assert isinstance(visium().shapes["spots"], gpd.GeoDataFrame)
