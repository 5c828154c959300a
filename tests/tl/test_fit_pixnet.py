"""Fit PixNet and predict at regions."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, Sequence, get_transformation, set_transformation

import spatial_impute as si
from spatial_impute._scores import pearson_by_gene
from spatial_impute.encoders._networks import build_resnet
from spatial_impute.encoders._pyramids import Box
from spatial_impute.models.pixnet._region_weights import CellGrid
from spatial_impute.models.pixnet._tiles import region_sums


def weights(model) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


def same(a, b) -> bool:
    return all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())


def fit(sdata, octaves, params, **kwargs):
    return si.tl.fit_pixnet(sdata, "s1_image", "s1_spots", encoder=octaves, model_params=params, **kwargs)


@pytest.fixture(scope="module")
def big(octaves, _quiet):
    """Stack large enough to learn from, and its truth."""
    return si.datasets.synthetic_stack(2, extent=2000.0, measured=["s0"], n_genes=12, elastic_amplitude=0.0, truth=True)


def test_fit_pixnet_learns_what_the_image_shows(big, octaves, pixnet_params):
    """Genes that follow the nuclei are found on a section never measured, better than where nothing is to be found."""
    sdata, truth = big
    model = si.tl.fit_pixnet(
        sdata,
        "s0_image",
        "s0_spots",
        encoder=octaves,
        model_params=pixnet_params | {"n_steps": 40, "n_cached_crops": 32},
    )
    table = si.tl.predict_regions(sdata, "s1_spots", model, inplace=False)
    rows = [f"s1_{i}" for i in table.obs["instance_id"]]
    true = truth[rows, model.var_names]
    r = pearson_by_gene(table.X, np.asarray(true.X.toarray() if hasattr(true.X, "toarray") else true.X))
    kind = true.var["kind"].to_numpy()
    assert np.nanmean(r[kind == "texture"]) > 0.5
    assert abs(np.nanmean(r[kind == "noise"])) < 0.25
    assert model.predictability[kind == "texture"].mean() > 0.4
    kept = model.history.loc[model.history["kept"], "held_out_loss"]
    assert len(kept) == 1
    assert kept.iloc[0] <= model.history["held_out_loss"].iloc[0]


def test_fit_pixnet_is_deterministic(small_prepared, small_pixnet, octaves, pixnet_params):
    assert same(small_pixnet, fit(small_prepared, octaves, pixnet_params))
    assert not same(small_pixnet, fit(small_prepared, octaves, pixnet_params, seed=1))


@pytest.mark.parametrize("how", ["zero", "noise", "inf"])
def test_fit_pixnet_never_sees_unmeasured_rows(small_prepared, small_pixnet, octaves, pixnet_params, how):
    sdata = copy.deepcopy(small_prepared)
    table = sdata.tables["stack"]
    rows = ~table.obs["measured"].to_numpy()
    fill = {"zero": 0.0, "noise": np.random.default_rng(0).normal(size=(rows.sum(), table.n_vars)), "inf": np.inf}
    table.layers["measured"][rows] = fill[how]
    assert same(small_pixnet, fit(sdata, octaves, pixnet_params))
    known = np.flatnonzero(~rows)
    table.layers["measured"][known[0]] += 0.5
    assert not same(small_pixnet, fit(sdata, octaves, pixnet_params))


def test_fit_pixnet_writes_nothing(small_stack, octaves, pixnet_params):
    before = {key: list(getattr(small_stack, key)) for key in ("images", "shapes", "tables", "labels")}
    attrs = copy.deepcopy(small_stack.attrs)
    fit(small_stack, octaves, pixnet_params)
    assert before == {key: list(getattr(small_stack, key)) for key in before}
    assert small_stack.attrs == attrs


def test_training_taken_up_equals_training_in_one_go(small_prepared, octaves, pixnet_params, tmp_path):
    pixnet_params = pixnet_params | {"schedule": "constant"}  # the only one that does not depend on the number of steps
    whole = fit(small_prepared, octaves, pixnet_params)
    fit(small_prepared, octaves, pixnet_params | {"n_steps": 2}, checkpoint=tmp_path / "state")
    resumed = fit(small_prepared, octaves, pixnet_params, checkpoint=tmp_path / "state")
    assert same(whole, resumed)
    np.testing.assert_array_equal(whole.history.to_numpy(float), resumed.history.to_numpy(float))
    with pytest.raises(ValueError, match=r"belongs to another training: \['seed'\] differ"):
        fit(small_prepared, octaves, pixnet_params, checkpoint=tmp_path / "state", seed=3)


def test_interrupted_training_continues_on_its_schedule(small_prepared, octaves, pixnet_params, tmp_path, monkeypatch):
    from spatial_impute.models.pixnet import _training

    whole = fit(small_prepared, octaves, pixnet_params)
    take_step = _training._take_step

    def fails_late(*arguments):
        if arguments[-1] == pixnet_params["n_steps"]:
            raise KeyboardInterrupt
        return take_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_training, "_take_step", fails_late)
        with pytest.raises(KeyboardInterrupt):
            fit(small_prepared, octaves, pixnet_params, checkpoint=tmp_path)
    resumed = fit(small_prepared, octaves, pixnet_params, checkpoint=tmp_path)
    assert same(whole, resumed)
    np.testing.assert_array_equal(whole.history.to_numpy(float), resumed.history.to_numpy(float))
    with pytest.raises(ValueError, match=r"belongs to another training: \['params'\] differ"):
        fit(small_prepared, octaves, pixnet_params | {"n_steps": 9}, checkpoint=tmp_path)


def test_random_state_of_the_user_stays(small_prepared, octaves, pixnet_params):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    fit(small_prepared, octaves, pixnet_params)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_is_near_single_precision(small_prepared, octaves, pixnet_params, small_pixnet):
    rounded = fit(small_prepared, octaves, pixnet_params, precision="bfloat16")
    losses = [m.history["loss"].dropna().to_numpy() for m in (rounded, small_pixnet)]
    assert (losses[0] != losses[1]).all()
    np.testing.assert_allclose(*losses, rtol=0.05)
    model = copy.deepcopy(small_pixnet)
    torch.nn.init.constant_(model.network.head.weight[:, model.network.n_base :], 0.1)  # as if the decoder were kept
    maps = [
        si.tl.predict_dense(small_prepared, "s0_image", model, precision=precision, inplace=False)
        for precision in ("float32", "bfloat16")
    ]
    a, b = (m.compute().to_numpy().astype(float) for m in maps)
    assert 0 < np.nanmax(np.abs(a - b)) < 0.1 * np.nanstd(a)
    with pytest.raises(ValueError, match="`precision` must be one of"):
        fit(small_prepared, octaves, pixnet_params, precision="half")


def test_base_of_many_regions_is_fitted_on_a_sample(small_prepared, octaves, pixnet_params, monkeypatch):
    """And is known for all of them: what training starts from is nearly the same."""
    from spatial_impute.models.pixnet import _fit

    params = pixnet_params | {"n_steps": 0}
    whole = fit(small_prepared, octaves, params).history["held_out_loss"].iloc[0]
    n = int(small_prepared.tables["stack"].obs["measured"].sum())
    monkeypatch.setattr(_fit, "_MAX_BASE_REGIONS", n - 3)
    sample = fit(small_prepared, octaves, params).history["held_out_loss"].iloc[0]
    assert sample != whole
    assert sample == pytest.approx(whole, rel=0.2)


def test_training_starts_at_the_base_of_the_whole_slide(small_prepared, small_pixnet, octaves, pixnet_params):
    """What is held out is predicted with windows that reach beyond a crop."""
    from spatial_impute.models.pixnet import _training

    seen = {}
    evaluate = _training.evaluate

    def spy(network, windows, *args, **kwargs):
        seen.setdefault("network", copy.deepcopy(network))
        seen.setdefault("windows", windows)
        return evaluate(network, windows, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training, "evaluate", spy)
        fit(small_prepared, octaves, pixnet_params | {"n_steps": 0})
    network, entry = seen["network"].eval(), seen["windows"][0].crop.slide
    height, width = entry.image.shape
    rows, columns = (-(-n // network.multiple) * network.multiple for n in (height, width))
    with torch.inference_mode():
        rgb = entry.stain.apply(torch.from_numpy(entry.image.window(0, rows, 0, columns))[None])
        genes = network.genes(network.features(rgb))[0]
        grid = CellGrid.whole(network.stride, genes.shape[1], genes.shape[2])
        box = Box(0, height, 0, width)
        sums, n_pixels = region_sums(genes, entry.regions, box, grid, box)
        expected = (sums / n_pixels[:, None]).numpy()
    np.testing.assert_allclose(entry.base, expected, rtol=1e-3, atol=1e-4)


def test_without_held_out_regions_the_model_is_the_base(small_prepared, octaves, pixnet_params, monkeypatch):
    from spatial_impute.models.pixnet import _fit

    monkeypatch.setattr(_fit, "held_out_blocks", lambda slides, *_: [np.zeros(len(s.regions), bool) for s in slides])
    model, base = (fit(small_prepared, octaves, pixnet_params | n) for n in ({}, {"n_steps": 0}))
    assert model.identity == base.identity


def test_the_published_network_trains_its_encoder(small_prepared):
    """Its settings, on few and small crops and with a narrow decoder: ResNet-18 with random weights, no base."""
    encoder = build_resnet("resnet18")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    params = si.models.PixNetParams.paper()
    assert params.width == 512
    params = replace(params, width=32, resolution=8.0, crop=64, n_crops=2, n_steps=2, n_steps_per_check=2)
    model = si.tl.fit_pixnet(small_prepared, "s1_image", "s1_spots", encoder=encoder, model_params=params)
    assert model.network.stride == 4
    assert not model.network.n_base
    after = model.network.pyramid.module.state_dict()
    kept = int(model.history.loc[model.history["kept"], "step"].iloc[0])
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert bool(moved) == (kept > 0)
    assert not [key for key in moved if "running" in key or "num_batches" in key]  # published statistics stay
    found = si.tl.predict_regions(small_prepared, "s0_spots", model, inplace=False)
    assert np.isfinite(found.X).all()


def test_attention_is_refused_before_training_and_accepted_in_windows(small_prepared, pixnet_params, monkeypatch):
    from spatial_impute.models.pixnet import _fit

    class Global(torch.nn.Module):
        def forward(self, x):
            cells = torch.nn.functional.avg_pool2d(x, 8)
            return cells - cells.mean(dim=(2, 3), keepdim=True)

    def fit_with(**kwargs):
        return si.tl.fit_pixnet(
            small_prepared, "s1_image", "s1_spots", encoder=Global(), model_params=pixnet_params | kwargs
        )

    with monkeypatch.context() as patch:
        patch.setattr(_fit, "train", lambda *_: pytest.fail("training began"))
        patch.setattr(_fit, "fit_base", lambda *_, **__: pytest.fail("the base was fitted"))
        with pytest.raises(ValueError, match="encoder_window"):
            fit_with()
    model = fit_with(encoder_window=32)
    assert model.network.stride == 4
    maps = [
        si.tl.predict_dense(small_prepared, "s0_image", model, tile_size=size, tissue_only=False, inplace=False)
        for size in (64, 4096)
    ]
    a, b = (m.compute().to_numpy().astype(float) for m in maps)
    np.testing.assert_allclose(a, b, atol=0.01 * b.std())


def test_save_and_load_give_the_same_prediction(small_prepared, small_pixnet, octaves, tmp_path):
    small_pixnet.save(tmp_path / "model")
    loaded = si.models.PixNetModel.load(tmp_path / "model", encoder=octaves)
    assert same(small_pixnet, loaded)
    assert loaded.identity == small_pixnet.identity
    a, b = (si.tl.predict_regions(small_prepared, "s0_spots", m, inplace=False) for m in (small_pixnet, loaded))
    np.testing.assert_array_equal(a.X, b.X)
    assert loaded.config == small_pixnet.config
    assert loaded.history.equals(small_pixnet.history)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        small_pixnet.save(tmp_path / "model")
    with pytest.raises(ValueError, match="pass a module of this architecture as `encoder=`"):
        si.models.PixNetModel.load(tmp_path / "model")
    with pytest.raises(ValueError, match="expected 'AsignModel'"):
        si.models.AsignModel.load(tmp_path / "model")


def test_several_sizes_train_together(small_stack, octaves, pixnet_params):
    """Spots, and squares about half as wide with the same values."""
    circles = small_stack.shapes["s1_spots"]
    geometry = shapely.buffer(circles.geometry.to_numpy(), circles["radius"].to_numpy() / 2, cap_style="square")
    squares = ShapesModel.parse(
        gpd.GeoDataFrame(geometry=geometry, index=circles.index),
        transformations={"s1": get_transformation(circles, to_coordinate_system="s1")},
    )
    small_stack.shapes["squares"] = squares
    rows = small_stack.tables["stack"].obs["region"] == "s1_spots"
    table = small_stack.tables["stack"][rows].copy()
    del table.uns["spatialdata_attrs"]
    table.obs["region"] = "squares"
    table.X = table.layers["measured"].copy()
    small_stack.tables["bins"] = TableModel.parse(
        table, region="squares", region_key="region", instance_key="instance_id"
    )
    model = si.tl.fit_pixnet(
        small_stack, "s1_image", ["s1_spots", "squares"], encoder=octaves, model_params=pixnet_params
    )
    radius = [entry["radius_um"] for entry in model.config["trained_on"]]
    assert radius[0] == pytest.approx(50, abs=0.1)
    assert radius[1] == pytest.approx(50 / np.sqrt(np.pi), abs=0.1)


@pytest.mark.parametrize("loss", ["poisson", "nb"])
def test_counts_are_predicted_as_sums(small_prepared, octaves, pixnet_params, loss):
    """Expected counts of a spot are near those measured, and grow with the area of the region."""
    model = fit(small_prepared, octaves, pixnet_params | {"loss": loss}, table_key="s1_counts", aggregate="sum")
    sdata = copy.deepcopy(small_prepared)
    counts = sdata.tables["s1_counts"]
    found = si.tl.predict_regions(sdata, "s1_spots", model, inplace=False)
    assert (found.X >= 0).all()
    total, true = found.X.sum(axis=0), np.asarray(counts.X.sum(axis=0)).ravel()
    np.testing.assert_allclose(total, true, rtol=0.35)
    sdata.shapes["s1_spots"]["radius"] *= 0.5
    smaller = si.tl.predict_regions(sdata, "s1_spots", model, inplace=False)
    np.testing.assert_allclose(smaller.X.sum() / found.X.sum(), 0.25, rtol=0.1)


def test_predict_regions_joins_by_id_not_by_row(small_stack, small_pixnet):
    si.tl.predict_regions(small_stack, "s0_spots", small_pixnet)
    first = small_stack.tables["s0_spots_expression"]
    order = np.random.default_rng(0).permutation(len(small_stack.shapes["s0_spots"]))
    small_stack.shapes["s0_spots"] = small_stack.shapes["s0_spots"].iloc[order]
    second = si.tl.predict_regions(small_stack, "s0_spots", small_pixnet, inplace=False)
    np.testing.assert_allclose(second[first.obs_names].X, first.X, rtol=1e-5, atol=1e-5)
    assert first.var["imputation_r"].equals(small_pixnet.predictability.rename("imputation_r"))
    assert first.uns["spatialdata_attrs"]["region"] == "s0_spots"


def test_a_changed_slide_is_named_and_another_slide_with_the_same_grid_is_not(small_stack, small_pixnet, caplog):

    def warnings() -> list[str]:
        caplog.clear()
        with caplog.at_level("WARNING", "spatial_impute"):
            si.tl.predict_regions(small_stack, "s1_spots", small_pixnet, inplace=False)
        return [text for text in caplog.messages if "was fitted on" in text]

    assert not warnings()
    small_stack.images["s1_image"] = Image2DModel.parse(
        255 - small_stack.images["s1_image"].data,
        dims=("c", "y", "x"),
        transformations=get_transformation(small_stack.images["s1_image"], get_all=True),
    )
    assert "before their image changed" in warnings()[0]
    table = small_stack.tables["stack"]
    table.layers["measured"] = 0.9 * table.layers["measured"]
    assert not warnings()
    si.pp.select_genes(small_stack, n_top_genes=2)
    assert re.search(
        "What the model was fitted on, 's1_image' and 's1_spots', cannot be compared .* not found", warnings()[0]
    )


def test_frame_of_another_unit_gives_the_same_values(small_stack, small_pixnet):
    """Image and spots in a frame whose unit is 2 um."""
    for element in (small_stack.images["s0_image"], small_stack.shapes["s0_spots"]):
        um = get_transformation(element, to_coordinate_system="s0")
        set_transformation(element, Sequence([um, Scale([0.5, 0.5], axes=("x", "y"))]), "half")
    expected = si.tl.predict_regions(small_stack, "s0_spots", small_pixnet, inplace=False)
    found = si.tl.predict_regions(
        small_stack, "s0_spots", small_pixnet, coordinate_system="half", mpp=2.0, inplace=False
    )
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.obsm["spatial"], expected.obsm["spatial"])


def test_regions_off_the_image_are_nan_and_counted(small_stack, small_pixnet):
    polygons = [shapely.box(-500, -500, -400, -400), shapely.box(0, 0, 300, 300), shapely.box(-50, 100, 50, 200)]
    small_stack.shapes["areas"] = ShapesModel.parse(
        gpd.GeoDataFrame(geometry=polygons, index=["off", "large", "border"]), transformations={"s0": Identity()}
    )
    table = si.tl.predict_regions(small_stack, "areas", small_pixnet, image_key="s0_image", inplace=False)
    n_pixels = table.obs["n_pixels"]
    assert n_pixels.loc["off"] == 0
    assert np.isnan(table["off"].X).all()
    assert np.isfinite(table[["large", "border"]].X).all()
    assert n_pixels.loc["large"] == 75 * 75
    assert n_pixels.loc["border"] == pytest.approx(12.5 * 25, abs=13)


def test_table_streamed_to_disk_equals_that_in_memory(small_prepared, small_pixnet, tmp_path):
    import anndata as ad

    expected = si.tl.predict_regions(small_prepared, "s0_spots", small_pixnet, inplace=False)
    lazy = si.tl.predict_regions(
        small_prepared, "s0_spots", small_pixnet, store=tmp_path / "bins.zarr", inplace=False, tile_size=64
    )
    found = ad.read_zarr(tmp_path / "bins.zarr")
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(lazy.X.compute(), found.X)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bins.zarr"]
    with pytest.raises(FileExistsError, match="another `store`"):
        si.tl.predict_regions(small_prepared, "s0_spots", small_pixnet, store=tmp_path / "bins.zarr", inplace=False)


ERRORS = [
    ({"image_key": "nope"}, KeyError, r"'nope' not found in `sdata.images`"),
    ({"shapes_key": "nope"}, KeyError, r"'nope' not found in `sdata.shapes`"),
    ({"table_key": "nope"}, KeyError, r"'nope' not found in `sdata.tables`"),
    ({"table_key": "s1_counts"}, ValueError, r"holds raw counts .*target_sum=1e4"),
    ({"target_sum": 1e4}, ValueError, "does not hold counts"),
    ({"layer": "nope"}, KeyError, "layers"),
    ({"genes": ["nope"]}, KeyError, "var_names"),
    ({"shapes_key": "s0_spots"}, KeyError, "frame|coordinate|'s1' not found"),
    ({"encoder": "resnet19"}, ValueError, "`encoder` must be one of"),
    ({"aggregate": "sum"}, ValueError, "needs counts"),
    ({"aggregate": "max"}, ValueError, "'mean' or 'sum'"),
    ({"model_params": {"loss": "poisson"}}, ValueError, "'sum' for losses on counts"),
    ({"model_params": {"loss": "poisson"}, "aggregate": "sum"}, ValueError, "need raw counts"),
    ({"model_params": {"widht": 8}}, TypeError, r"Unknown fields \['widht'\]"),
    ({"model_params": {"resolution": 1.0}}, ValueError, "has 4 um per pixel, but the model works at 1"),
    ({"model_params": {"width": 0}}, ValueError, "`width` must be a whole number of at least 1"),
    ({"image_key": ["s1_image"] * 2, "shapes_key": ["s1_spots"] * 3}, ValueError, "has 2 entries where another"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_fit_pixnet_says_what_is_wrong(small_prepared, octaves, pixnet_params, change, error, message):
    arguments = {"image_key": "s1_image", "shapes_key": "s1_spots", "encoder": octaves, "model_params": pixnet_params}
    with pytest.raises(error, match=message):
        si.tl.fit_pixnet(small_prepared, **(arguments | change))


def test_section_without_measurement_is_refused(small_prepared, octaves, pixnet_params):
    with pytest.raises(ValueError, match="was measured: no row of"):
        si.tl.fit_pixnet(small_prepared, "s0_image", "s0_spots", encoder=octaves, model_params=pixnet_params)


def test_predict_regions_says_what_is_wrong(small_stack, small_pixnet):
    with pytest.raises(KeyError, match=r"model.var_names"):
        si.tl.predict_regions(small_stack, "s0_spots", small_pixnet, genes=["nope"])
    small_stack.shapes["other"] = small_stack.shapes["s0_spots"].copy()
    with pytest.raises(ValueError, match="name their image with `image_key=`"):
        si.tl.predict_regions(small_stack, "other", small_pixnet)
    set_transformation(small_stack.shapes["s0_spots"], Scale([1.0, 1.5], axes=("x", "y")), "s0")
    with pytest.raises(ValueError, match=r"stretches one axis 1.50 times"):
        si.tl.predict_regions(small_stack, "s0_spots", small_pixnet)
    assert "s0_spots_expression" not in small_stack.tables
