"""Crops, base and losses of PixNet."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from spatial_impute.encoders._pyramids import ModulePyramid
from spatial_impute.models._params import PixNetParams
from spatial_impute.models.pixnet import _fit
from spatial_impute.models.pixnet._crops import (
    CropSettings,
    TrainingSlide,
    assign_blocks,
    cover,
    held_out_blocks,
    make_crop,
    random_crop,
)
from spatial_impute.models.pixnet._fit import BaseData, LinearBase, set_base, standardise_decoder
from spatial_impute.models.pixnet._held_out import Evaluation, RegionLoss, _Predictions, _trust, is_confirmed
from spatial_impute.models.pixnet._network import PixNetNetwork, Stain
from spatial_impute.models.pixnet._region_weights import Discs
from spatial_impute.models.pixnet._training import history_row

WHITE = Stain((255.0, 255.0, 255.0))
GRID = SimpleNamespace(stride=8, multiple=32)  # of a network
CROP = CropSettings(256, 8, margin=8, max_regions=999)


def fit_base(features, target, number, block, **kwargs):
    return _fit.fit_base(BaseData(features, target, number, block), **kwargs)


class Ramp:
    """Image whose colour tells where one is; stands in for a working image."""

    to_um = np.eye(3)
    shape = (600, 700)

    def stripe(self, core: int, halo: int) -> int:
        return 700

    def window(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        y, x = np.meshgrid(np.arange(y0, y1) + 0.5, np.arange(x0, x1) + 0.5, indexing="ij")
        return np.stack([255 * x / 700, 255 * y / 600, 0 * x + 100]).clip(1, 255).astype(np.float32)


def slide(n: int = 200, *, number: int = 0, radius: float = 10.0) -> TrainingSlide:
    rng = np.random.default_rng(number)
    centers = rng.uniform(50, [650, 550], (n, 2))
    blocks = assign_blocks(centers, np.zeros(2), np.array([700.0, 600.0]))
    return TrainingSlide(Ramp(), WHITE, Discs(centers, np.full(n, radius)), rng.normal(size=(n, 2)), number, blocks)


def pooled(crop) -> np.ndarray:
    """Mean colour of each region, from 8 x 8 means of the crop's pixels."""
    cells = nn.functional.avg_pool2d(crop.rgb[None].double(), 8)[0].flatten(1).T
    sums = nn.functional.embedding_bag(
        torch.from_numpy(crop.stencil.cells),
        cells,
        torch.from_numpy(crop.stencil.start[:-1]),
        mode="sum",
        per_sample_weights=torch.from_numpy(crop.stencil.weights),
    )
    return (sums / torch.from_numpy(crop.stencil.n_pixels)[:, None]).numpy()


@pytest.mark.parametrize("turn", range(8))
def test_regions_turn_and_flip_with_the_image(turn):
    """The colour at a region tells its place, whichever way the crop lies; the ramp is linear, so means are exact."""
    entry = slide()
    crop = make_crop(entry, np.array([350.3, 300.7]), CROP, turn=turn)
    assert len(crop.rows) > 15
    expected = entry.regions.centers[crop.rows] * [255 / 700, 255 / 600]
    np.testing.assert_allclose(pooled(crop)[:, :2], expected, atol=0.25)  # a pixel is 0.4 grey values


def test_only_whole_regions_enter_a_crop():
    entry = slide()
    crop = make_crop(entry, np.array([350.0, 300.0]), CROP)
    centers = entry.regions.centers
    inside = ((np.abs(centers - [350, 300]) + 10) <= 120).all(axis=1)
    np.testing.assert_array_equal(crop.rows, np.flatnonzero(inside))
    assert len(make_crop(entry, np.array([350.0, 300.0]), replace(CROP, max_regions=5)).rows) == 5


def test_random_crops_hold_their_region_and_repeat_with_the_seed():
    entries = [slide(), slide(number=1, radius=30.0)]
    size = CropSettings.of(GRID, entries, PixNetParams(crop=128, margin=8, max_regions=99))
    arguments = {"flips": True, "stain_jitter": 0.1}
    crops = [random_crop(entries, size, rng=np.random.default_rng(k), **arguments) for k in range(20)]
    assert {crop.slide.slide for crop in crops} == {0, 1}
    assert all(len(crop.rows) for crop in crops)
    again = random_crop(entries, size, rng=np.random.default_rng(3), **arguments)
    assert torch.equal(again.rgb, crops[3].rgb)


def test_crops_grow_until_a_region_fits():
    params = PixNetParams(crop=64, margin=8)
    assert CropSettings.of(GRID, [slide(radius=100.0)], params).size == 224
    assert CropSettings.of(GRID, [slide(radius=5.0)], params).size == 64


def test_windows_cover_every_region_once():
    entry = slide()
    windows = cover(entry, 256, 8)
    rows = np.concatenate([r for _, r in windows])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(entry.regions)))
    for center, owned in windows:
        crop = make_crop(entry, center, CROP)
        assert np.isin(owned, crop.rows).all()


def test_held_out_regions_are_whole_blocks_of_every_slide():
    """Two sizes on one slide share what is held out: no pixel is trained on and looked at."""
    a, b, c = slide(), slide(50, radius=4.0), slide(number=1)
    out = held_out_blocks([a, b, c], 0.2, seed=0)
    for entry, held in zip((a, b, c), out, strict=True):
        assert 0 < held.mean() < 0.5
        assert not set(entry.block[held]) & set(entry.block[~held])
    assert not set(a.block[out[0]]) & set(b.block[~out[1]])


def make_data(n: int = 150, n_features: int = 40, n_genes: int = 60):
    """Genes follow two directions of the features, under noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, n_features)) * np.linspace(0.5, 3, n_features) + 5
    signal = (x[:, :2] - 5) / x[:, :2].std(axis=0) @ rng.normal(size=(2, n_genes))
    return x, signal, signal + 3 * rng.normal(size=signal.shape), np.arange(n) // 5


def test_base_shrinks_patterns_that_are_noise():
    x, signal, y, block = make_data()
    base = fit_base(x, y, np.zeros(len(x)), block, n_components=40)
    shrinkage = base.choice.shrinkage
    assert shrinkage[:2].min() > 0.6
    assert shrinkage[10:].max() < 0.3
    assert (np.diff(shrinkage) <= 1e-12).all()
    alike = replace(base.choice, shrinkage=np.ones(40))
    full = fit_base(x, y, np.zeros(len(x)), block, n_components=40, choice=alike)
    errors = [np.mean((b.predict(x) - y.mean(axis=0) - signal + signal.mean(axis=0)) ** 2) for b in (base, full)]
    assert errors[0] < 0.7 * errors[1]


def test_base_ignores_the_level_of_a_slide():
    x, _, y, block = make_data()
    number = (np.arange(len(x)) % 2).astype(float)
    shifted = y + 100 * number[:, None]
    base = fit_base(x, y, number, block, n_components=40)
    moved = fit_base(x, shifted, number, block, n_components=40)
    np.testing.assert_allclose(moved.weights, base.weights, atol=1e-8)


def test_base_learns_nothing_from_noise():
    x, _, _, block = make_data()
    y = np.random.default_rng(1).normal(size=(len(x), 60))
    assert fit_base(x, y, np.zeros(len(x)), block, n_components=40).predict(x).std(axis=0).mean() < 0.15


def test_constant_features_and_more_components_than_regions_are_no_problem():
    x, _, y, block = make_data(n=20)
    x = np.column_stack([x, np.full(20, 7.0)])
    base = fit_base(x, y, np.zeros(20), block, n_components=64)
    assert base.projection.shape == (41, 64)
    assert np.isfinite(base.predict(x)).all()


def test_base_of_large_regions_can_be_read_at_cells():
    """Of features of single nuclei little is left in a region; they must not fill the map with what averaged out."""
    rng = np.random.default_rng(0)
    n, n_cells = 200, 100
    field = rng.normal(size=(n, 1))
    coarse = np.repeat((field + 0.5 * rng.normal(size=(n, 10)))[:, None], n_cells, axis=1)
    fine = 0.1 * field[:, None] + rng.normal(size=(n, n_cells, 30))
    cells = np.concatenate([coarse, fine], axis=2)
    y = field @ rng.normal(size=(1, 20)) + rng.normal(size=(n, 20))
    x, within = cells.mean(axis=1), cells.var(axis=1).mean(axis=0)
    held = np.arange(n) >= 150
    r = {}
    for name, value in (("cells", within), ("regions", 0.0)):
        base = fit_base(x[~held], y[~held], np.zeros(150), np.arange(150) // 5, n_components=40, within=value)
        found = base.predict(cells[held].reshape(-1, 40))
        true = np.repeat(field[held], n_cells, axis=0) @ (base.predict(x).T @ field / (field**2).sum()).T
        r[name] = np.mean([np.corrcoef(found[:, g], true[:, g])[0, 1] for g in range(20)])
    assert r["cells"] > 0.85 > 0.7 > r["regions"]


@pytest.mark.parametrize("informative", ["fine", "wide"])
def test_base_finds_few_fine_features_among_many_wide_ones(informative):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 220))
    extent = np.repeat([8.0, 400.0], [20, 200])
    signal = x[:, :4] if informative == "fine" else x[:, 20:40]
    y = signal @ rng.normal(size=(signal.shape[1], 30)) + 2 * rng.normal(size=(300, 30))
    rows, block = np.arange(300) < 200, np.arange(200) // 5
    base, alike = (
        fit_base(x[rows], y[rows], np.zeros(200), block, n_components=128, extent=value) for value in (extent, 1.0)
    )
    r = [np.corrcoef(b.predict(x[~rows]).ravel(), y[~rows].ravel())[0, 1] for b in (base, alike)]
    assert (base.choice.decay > 0) == (informative == "fine")
    assert r[0] > r[1] + (0.1 if informative == "fine" else -0.01)


def test_network_computes_its_base():
    """1x1 convolutions and head of the network against the regression on the same features."""

    class Two(nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [nn.functional.avg_pool2d(image, k) for k in (2, 4)]

    params = PixNetParams(width=4, context_um=(), finest_stride=1)
    network = PixNetNetwork(ModulePyramid(Two(), name="two"), params, n_genes=60, n_base=5).double().eval()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    y = rng.normal(size=(50, 60)) + x @ rng.normal(size=(6, 60))
    base = fit_base(x, y, np.zeros(50), np.arange(50) // 5, n_components=5)
    set_base(network, base)
    rgb = torch.rand(1, 3, 16, 16, dtype=torch.float64) * 255
    with torch.inference_mode():
        found = network.genes(network.features(rgb))[0].flatten(1).T
        levels = network.levels(network.encode(rgb))[0].flatten(1).T.numpy()
    np.testing.assert_allclose(found, base.predict(levels), rtol=1e-8, atol=1e-8)


def test_result_is_the_weighted_sum_of_base_and_decoder():
    class Two(nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [nn.functional.avg_pool2d(image, k) for k in (2, 4)]

    torch.manual_seed(0)
    params = PixNetParams(width=4, context_um=(), finest_stride=1)
    network = PixNetNetwork(ModulePyramid(Two(), name="two"), params, n_genes=3, n_base=5).double().eval()
    nn.init.normal_(network.head.weight)
    nn.init.normal_(network.head.bias)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    data = BaseData(x, x @ rng.normal(size=(6, 3)) + rng.normal(size=(50, 3)), np.zeros(50), np.arange(50) // 5)
    fitted = _fit.fit_base(data, n_components=5)
    rgb = torch.rand(1, 3, 16, 16, dtype=torch.float64) * 255
    with torch.inference_mode():
        maps = network.encode(rgb)
        decoded = network.from_pooled(network.decode(maps)[0].flatten(1).T).numpy()
        of_base = fitted.predict(network.levels(maps)[0].flatten(1).T.numpy())
        settings = SimpleNamespace(seed=0)
        weights = np.array([[1.0, 0.0], [0.2, 1.1], [0.0, 0.7]])
        LinearBase(fitted, data, np.zeros(6)).finish(network, weights, settings)
        found = network.genes(network.features(rgb))[0].flatten(1).T
        np.testing.assert_allclose(found, of_base * weights[:, 0] + decoded * weights[:, 1], rtol=1e-8, atol=1e-8)
        LinearBase(fitted, data, np.zeros(6)).finish(network, None, settings)
        found = network.genes(network.features(rgb))[0].flatten(1).T
    np.testing.assert_allclose(found, of_base, rtol=1e-8, atol=1e-8)


def test_each_gene_takes_what_predicts_it():
    """Where the base is noise it has no weight, although it has one for other genes."""
    rng = np.random.default_rng(0)
    true, noise = rng.normal(size=(400, 6)), 0.5 * rng.normal(size=(2, 400, 6))
    base = np.where(np.arange(6) < 3, true, 0) + noise[0]
    decoded = np.where(np.arange(6) < 3, 0, true) + noise[1]
    place = pd.DataFrame({"slide": 0, "size": 400, "block": np.arange(400) // 40})
    weights, blended = _Predictions(decoded, base, true, place).blend()
    assert weights[:3, 0].min() > 0.6 > 0.2 > weights[3:, 0].max()
    assert weights[3:, 1].min() > 0.6 > 0.2 > weights[:3, 1].max()
    alone = [np.mean((part - true) ** 2) for part in (base, decoded)]
    assert np.mean((blended - true) ** 2) < 0.4 * min(alone)
    one = _Predictions(decoded, base, true, place.assign(block=0)).blend()
    np.testing.assert_array_equal(one[0], np.tile([1.0, 0.0], (6, 1)))
    np.testing.assert_array_equal(one[1], base)


def test_genes_that_the_base_predicts_do_not_pay_for_the_others():
    """The decoder of a gene that the base knows better has no weight, with few blocks too; that of the others has."""
    rng = np.random.default_rng(1)
    true = rng.normal(size=(160, 40))
    linear = np.arange(40) < 20
    base = np.where(linear, true + 0.3 * rng.normal(size=true.shape), 0.7 * rng.normal(size=true.shape))
    decoded = true + np.where(linear, 3.0, 0.5) * rng.normal(size=true.shape)
    place = pd.DataFrame({"slide": 0, "size": 160, "block": np.arange(160) // 16})
    weights, _ = _Predictions(decoded, base, true, place).blend()
    assert np.mean(weights[linear, 1] == 0) > 0.85
    assert (weights[~linear, 1] > 0.5).all()


def test_weights_follow_the_evidence():
    """Half a standard error of gain counts nothing; two count three quarters; a loss counts nothing."""
    spread = np.array([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0])[:, None]
    error = spread.std(ddof=1) / np.sqrt(6)
    gain = spread + error * np.array([-3.0, 0.5, 1.0, 2.0, 10.0])
    np.testing.assert_allclose(_trust(gain), [0, 0, 0, 0.75, 0.99], atol=1e-12)
    np.testing.assert_array_equal(_trust(gain[:1]), np.zeros(5))  # one block is no evidence


def test_decoder_reads_maps_of_any_scale_alike():
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            maps = [nn.functional.avg_pool2d(image, k) for k in (2, 4)]
            return [torch.cat([self.scale * m[:, :2] + 3 * self.scale], dim=1) for m in maps]

    rgb, found = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255, []
    for scale in (1e-3, 1.0, 1e3):
        torch.manual_seed(0)
        params = PixNetParams(width=4, context_um=(), finest_stride=1)
        network = PixNetNetwork(ModulePyramid(Scaled(scale), name="s"), params, n_genes=2, n_base=2).eval()
        with torch.inference_mode():
            features = network.levels(network.encode(rgb))[0].flatten(1).T.numpy().astype(float)
            standardise_decoder(network, features, np.zeros(features.shape[1]))
            found.append(network.decode(network.encode(rgb)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[2], found[1], rtol=1e-2, atol=1e-2)
    assert torch.isfinite(found[0]).all()


def test_loss_is_error_and_correlation_per_gene():
    rng = np.random.default_rng(0)
    p, t = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    t[:, 3] = 1.0  # a gene that does not vary has no correlation
    r = [np.corrcoef(p[:, g], t[:, g])[0, 1] for g in range(3)]
    expected = np.mean((p - t) ** 2) + 0.5 * (1 - np.mean(r))
    found = RegionLoss("mse+pcc", 4, 0.5)(torch.from_numpy(p), torch.from_numpy(t))
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["poisson", "nb"])
def test_losses_of_counts_are_lowest_at_the_mean(kind):
    counts = torch.from_numpy(np.random.default_rng(0).poisson(5.0, (400, 1))).double()
    loss = RegionLoss(kind, 1, 0.5).double()
    values = [float(loss(torch.full_like(counts, rate), counts)) for rate in (3.0, float(counts.mean()), 8.0)]
    assert np.argmin(values) == 1


def test_negative_binomial_is_that_of_scipy():
    from scipy.stats import nbinom

    counts = torch.arange(6.0).double()[:, None]
    loss = RegionLoss("nb", 1, 0.5).double()
    with torch.no_grad():
        loss.log_dispersion.fill_(float(np.log(2.5)))
    expected = -nbinom.logpmf(np.arange(6), 2.5, 2.5 / (2.5 + 4.0)).mean()
    assert float(loss(torch.full_like(counts, 4.0), counts)) == pytest.approx(expected, rel=1e-9)


def test_a_row_of_the_history_can_be_kept_in_a_checkpoint():
    better = np.float64(0.4) < np.float64(0.5)
    found = Evaluation(np.array([0.2, np.nan]), np.zeros((2, 2)), np.array([0.3, 0.5]))
    row = history_row(10, 0.5, found, kept=better)
    assert json.loads(json.dumps(row)) == {
        "step": 10,
        "loss": 0.5,
        "held_out_loss": 0.4,
        "held_out_r": 0.2,
        "kept": True,
        "block_error": [0.3, 0.5],
    }


def test_loss_of_correlation_lets_a_head_that_starts_at_zero_learn():
    """Around a constant prediction the gradient is bounded, and after 200 steps of Adam the head still moves."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=rng)
    true = x @ torch.randn(8, 5, generator=rng)
    true = (true - true.mean(dim=0)) / true.std(dim=0)
    head = nn.Linear(8, 5)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-4)
    loss, weights = RegionLoss("mse+pcc", 5, 0.5), []
    for step in range(200):
        optimizer.zero_grad()
        loss(head(x), true).backward()
        if step == 0:
            assert 0 < head.weight.grad.abs().max() < 10
        optimizer.step()
        weights.append(head.weight.detach().clone())
    assert (weights[199] - weights[198]).abs().max() > 1e-4  # at most 5e-4, the step size
    assert loss(head(x), true) < 0.9 * loss(torch.zeros_like(true), true)


def errors_of(gain: float, *, n_checks: int = 15, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """(n_checks, 12) errors of blocks around 1 that fall by `gain` during training, under noise of every check."""
    rng = np.random.default_rng(seed)
    errors = 1 - gain * np.linspace(0, 1, n_checks)[:, None] + noise * rng.normal(size=(n_checks, 12))
    errors[0] = 1.0
    return errors


def test_what_is_chosen_must_hold_where_it_was_not_chosen():
    """The best of 15 random checks always looks better than the start where it was chosen; elsewhere it does not."""
    half = np.arange(12) % 2 == 0
    chance = [is_confirmed(errors_of(0.0, seed=seed), half) for seed in range(200)]
    best = [errors_of(0.0, seed=seed).mean(axis=1).min() < 1 for seed in range(200)]
    assert np.mean(best) > 0.95
    assert np.mean(chance) < 0.12
    assert np.mean([is_confirmed(errors_of(0.2, seed=seed), half) for seed in range(50)]) > 0.95
    harm = errors_of(0.2)
    harm[1:, ~half] += 0.4  # it helps one slide and harms the other
    assert not is_confirmed(harm, half)
    assert not is_confirmed(errors_of(0.2), np.ones(12, bool))


def test_slides_confirm_each_other():
    block = np.column_stack([np.repeat([3, 7, 8], 4), np.tile(np.arange(4), 3)])
    half = Evaluation(np.zeros(1), block, np.zeros(12)).half
    assert [set(half[block[:, 0] == slide]) for slide in (3, 7, 8)] == [{True}, {False}, {True}]
    assert Evaluation(np.zeros(1), block[:4], np.zeros(4)).half.sum() == 2
