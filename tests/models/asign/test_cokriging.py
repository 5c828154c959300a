from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spatial_impute.models._spots import Spots
from spatial_impute.models.asign import _cokriging
from spatial_impute.models.asign._cokriging import Axes, counting_weights, krige


def cokriging(spots: Spots) -> np.ndarray:
    return krige(spots).expression()


def field_spots(
    *, side: int = 16, noise: float = 0.3, seed: int = 0, features: bool = False, scale: float = 1.0, n_genes: int = 4
) -> tuple[Spots, np.ndarray]:
    """Two lattices over each other, the lower known; returns the true values of all spots."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(side, dtype=float), np.arange(side, dtype=float))
    plane = np.column_stack([x.ravel(), y.ravel()])
    xyz = np.concatenate([np.column_stack([plane + 0.3 * k, np.full(side**2, 0.2 * k)]) for k in (0, 1)])
    waves = np.column_stack([np.sin(xyz[:, 0] / 2.5), np.cos(xyz[:, 1] / 3), np.sin((xyz[:, 0] + xyz[:, 1]) / 4)])
    image = rng.normal(size=(len(xyz), 5))
    signal = (image if features else waves) @ rng.normal(size=(5 if features else 3, n_genes))
    signal += 2.0
    known = np.repeat([True, False], side**2)
    spots = Spots(
        xyz=xyz * 100 * scale,
        section=np.repeat([0, 1], side**2),
        known=known,
        expression=signal[known] + noise * rng.normal(size=(side**2, n_genes)),
        spacing=100.0 * scale,
        features=image if features else None,
    )
    return spots, signal


def error(predicted: np.ndarray, true: np.ndarray, rows: np.ndarray) -> float:
    return float(np.mean((predicted[rows] - true[rows]) ** 2))


def test_cokriging_recovers_a_smooth_field():
    spots, true = field_spots()
    predicted = cokriging(spots)
    mean = np.broadcast_to(spots.expression.mean(axis=0), true.shape)
    assert predicted.shape == true.shape
    assert error(predicted, true, ~spots.known) < 0.1 * error(mean, true, ~spots.known)


def test_cokriging_averages_noise_at_known_spots():
    """It says what is expected, and at known spots that is better than the noisy measurement."""
    spots, true = field_spots(noise=0.5)
    predicted = cokriging(spots)
    measured = np.zeros_like(true)
    measured[spots.known] = spots.expression
    assert error(predicted, true, spots.known) < 0.5 * error(measured, true, spots.known)


def test_cokriging_reads_the_image():
    spots, true = field_spots(features=True)
    mean = np.broadcast_to(spots.expression.mean(axis=0), true.shape)
    assert error(cokriging(spots), true, ~spots.known) < 0.15 * error(mean, true, ~spots.known)


@pytest.mark.parametrize("seed", [0, 5, 6])
@pytest.mark.parametrize("features", [False, True])
def test_cokriging_of_noise_is_about_the_mean(seed, features):
    spots, _ = field_spots(features=features)
    rng = np.random.default_rng(seed)
    noise = Spots(**(vars(spots) | {"expression": rng.normal(size=spots.expression.shape)}))
    predicted = cokriging(noise) - noise.expression.mean(axis=0)
    assert predicted[~spots.known].std() < 0.03


def test_cokriging_of_constant_expression_is_that_constant():
    spots, _ = field_spots(side=6)
    constant = Spots(**(vars(spots) | {"expression": np.full(spots.expression.shape, 1.5)}))
    np.testing.assert_allclose(cokriging(constant), 1.5)


def test_cokriging_does_not_depend_on_the_unit_of_length():
    a, b = (cokriging(field_spots(side=8, scale=scale)[0]) for scale in (1.0, 1e3))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_cokriging_shifts_with_expression():
    spots, _ = field_spots(side=8)
    moved = Spots(**(vars(spots) | {"expression": spots.expression + 10}))
    np.testing.assert_allclose(cokriging(moved), cokriging(spots) + 10, atol=1e-4)


def test_cokriging_of_more_known_spots_than_it_can_solve_agrees_with_exact(monkeypatch):
    spots, true = field_spots()
    exact = cokriging(spots)
    for name, size in {"_MAX_EXACT": 128, "_TILE_KNOWN": 40, "_TILE_NEAR": 80, "_TILE_ANYWHERE": 10}.items():
        monkeypatch.setattr(_cokriging, name, size)
    part = cokriging(spots)
    assert not np.array_equal(part, exact)
    for gene in range(true.shape[1]):
        assert np.corrcoef(part[~spots.known, gene], exact[~spots.known, gene])[0, 1] > 0.9
    mean = np.broadcast_to(spots.expression.mean(axis=0), true.shape)
    assert error(part, true, ~spots.known) < 0.25 * error(mean, true, ~spots.known)
    np.testing.assert_array_equal(part, cokriging(spots))


@pytest.mark.parametrize("left_out", [False, True])
def test_cokriging_fits_to_some_of_many_known_spots(monkeypatch, left_out):
    """Parameters come from some of the known spots, and all are solved for."""
    spots, true = field_spots(features=True)
    groups = np.arange(spots.known.sum()) if left_out else None
    exact = krige(spots, left_out=groups).expression()
    for name, size in {"_MAX_FIT": 60, "_MAX_EXACT": 120, "_TILE_KNOWN": 40, "_TILE_NEAR": 90}.items():
        monkeypatch.setattr(_cokriging, name, size)
        part = krige(spots, left_out=groups).expression()
        rows = spots.known if left_out else ~spots.known
        assert not np.array_equal(part, exact)
        assert error(part, true, rows) < 2.5 * error(exact, true, rows) + 0.02


def test_cokriging_in_blocks_of_rows_equals_whole(monkeypatch):
    spots, _ = field_spots(side=8)
    whole = cokriging(spots)
    monkeypatch.setattr(_cokriging, "_ROWS_AT_A_TIME", 17)
    np.testing.assert_allclose(cokriging(spots), whole, atol=1e-9)


def test_cokriging_gradient_is_that_of_the_likelihood():
    """The fit must end where no parameter can be improved."""
    spots, _ = field_spots(side=8, features=True)
    inputs = _cokriging._AllInputs(spots).of(np.flatnonzero(spots.known))
    target = spots.expression[:, 0]
    target = (target - target.mean()) / target.std()
    counting = np.random.default_rng(0).gamma(2.0, size=len(target))
    theta = _cokriging._Posterior(inputs, counting).mode(target)
    kernels = _cokriging._Kernels(inputs)

    def posterior(theta: np.ndarray) -> float:
        covariance = kernels.covariance(*kernels.distances(inputs), theta) + np.diag(
            _cokriging._noise_variance(theta, counting)
        )
        z = (theta - _cokriging._PRIOR_MEAN) / _cokriging._PRIOR_SD
        return float(
            -0.5 * target @ np.linalg.solve(covariance, target) - 0.5 * np.linalg.slogdet(covariance)[1] - 0.5 * z @ z
        )

    best = posterior(theta)
    for i in range(len(theta)):
        for step in (-0.1, 0.1):
            assert posterior(theta + step * np.eye(len(theta))[i]) < best


def test_cokriging_trusts_spots_with_many_counts():
    spots, true = field_spots(noise=0.0)
    rng = np.random.default_rng(1)
    totals = np.where(rng.random(len(spots.expression)) < 0.5, 100.0, 10_000.0)
    noise = np.sqrt(100.0 / totals)[:, None] * rng.normal(size=spots.expression.shape)
    noisy = replace(spots, expression=spots.expression + noise)
    known_depth = error(cokriging(replace(noisy, total_counts=totals)), true, ~spots.known)
    assert known_depth < 0.8 * error(cokriging(noisy), true, ~spots.known)


@pytest.mark.parametrize("n_groups", [5, None])
def test_left_out_groups_do_not_see_their_own_labels(n_groups):
    spots, _ = field_spots()
    n = int(spots.known.sum())
    groups = np.arange(n) if n_groups is None else np.arange(n) * n_groups // n
    changed = spots.expression.copy()
    changed[groups == groups[0]] += 5.0
    before, after = (
        krige(replace(spots, expression=values), left_out=groups).expression() for values in (spots.expression, changed)
    )
    moved = np.abs(after - before)[spots.known].max(axis=1)
    own = groups == groups[0]
    if n_groups is None:
        assert moved[own].max() < 0.2 < moved[~own].max()
    else:  # a fifth of all labels also changes what is fitted to them
        assert moved[own].mean() < 0.7 * moved[~own].max()


@pytest.mark.parametrize("tiles", [False, True])
def test_left_out_groups_are_predicted_as_if_they_were_not_known(tiles, monkeypatch):
    """With the same components and parameters; only the unit of image distance is another."""
    spots, _ = field_spots(features=True)
    groups = np.arange(spots.known.sum()) % 4
    if tiles:
        for name, size in {"_MAX_EXACT": 120, "_TILE_KNOWN": 40, "_TILE_NEAR": 400, "_TILE_ANYWHERE": 0}.items():
            monkeypatch.setattr(_cokriging, name, size)
    fitted = []
    original = _cokriging._fit_components
    monkeypatch.setattr(_cokriging, "_fit_components", lambda *a: (fitted or fitted.append(original(*a)) or fitted)[0])
    axes = Axes.of(spots)
    found = krige(spots, left_out=groups, axes=axes).expression()
    for group in range(4):
        hidden = np.zeros(len(spots.known), dtype=bool)
        hidden[np.flatnonzero(spots.known)[groups == group]] = True
        of_others = replace(axes, projected=axes.projected[groups != group])
        expected = krige(spots.hide(hidden), axes=of_others).expression()
        np.testing.assert_allclose(found[hidden], expected[hidden], atol=0.02)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e3])
def test_cokriging_fit_stays_where_numbers_are_finite(size):
    """Targets without noise, or far from the size that the prior expects, push parameters outwards."""
    spots, _ = field_spots(side=8, features=True)
    inputs = _cokriging._AllInputs(spots).of(np.flatnonzero(spots.known))
    theta = _cokriging._Posterior(inputs, np.ones(len(inputs.image))).mode(size * inputs.image[:, 0].numpy())
    assert (np.abs(theta - _cokriging._PRIOR_MEAN) <= 4 * _cokriging._PRIOR_SD + 1e-9).all()


def test_cokriging_of_several_components_is_that_of_each_covariance():
    rng = np.random.default_rng(0)
    known, others = (_cokriging._Inputs(*(torch.from_numpy(rng.normal(size=(n, d))) for d in (3, 5))) for n in (40, 25))
    kernels = _cokriging._Kernels(known)
    thetas = [rng.normal(size=6) for _ in range(3)]
    duals = rng.normal(size=(40, 3))
    expected = [
        kernels.covariance(*kernels.distances(others), theta) @ dual
        for theta, dual in zip(thetas, duals.T, strict=True)
    ]
    np.testing.assert_allclose(kernels.predict(others, thetas, duals), np.stack(expected, axis=1), rtol=1e-10)


@pytest.mark.parametrize("groups", [np.arange(30), np.arange(30) // 5])
def test_left_out_predictions_are_those_of_the_conditional_distribution(groups):
    rng = np.random.default_rng(0)
    place, target, noise = rng.normal(size=(30, 2)), rng.normal(size=30), rng.gamma(3.0, size=30)
    covariance = np.exp(-((place[:, None] - place) ** 2).sum(axis=2))
    dual, left_out = _cokriging._solve(covariance.copy(), target, noise, groups)
    np.testing.assert_allclose(dual, np.linalg.solve(covariance + np.diag(noise), target), rtol=1e-9)
    for group in np.unique(groups):
        own, rest = groups == group, groups != group
        among = covariance[rest][:, rest] + np.diag(noise[rest])
        expected = covariance[own][:, rest] @ np.linalg.solve(among, target[rest])
        np.testing.assert_allclose(left_out[own], expected, rtol=1e-8)


def test_solver_runs_on_the_device_of_the_spots_but_mps_has_no_double_precision(monkeypatch):
    spots, _ = field_spots(side=4)
    assert replace(spots, device="cuda:1").solver_device == "cuda:1"
    assert replace(spots, device="mps").solver_device == "cpu"
    devices, as_tensor = set(), torch.as_tensor
    monkeypatch.setattr(
        _cokriging.torch, "as_tensor", lambda *a, device="cpu", **k: devices.add(device) or as_tensor(*a, **k)
    )
    cokriging(replace(spots, device="cuda:1"))
    assert "cuda:1" in devices


def test_cokriging_of_many_known_spots_takes_half_the_memory(monkeypatch):
    spots, _ = field_spots()
    assert cokriging(spots).dtype == np.float64
    monkeypatch.setattr(_cokriging, "_MAX_EXACT", 128)
    assert cokriging(spots).dtype == np.float32


def test_counting_weights_find_both_parts_of_the_variance():
    rng = np.random.default_rng(0)
    counting = rng.gamma(1.0, size=3000) + 0.05
    counting /= counting.mean()
    residuals = rng.normal(size=(3000, 20)) * np.sqrt(0.5 + 2.0 * counting)[:, None]
    expected = 1.0 / (0.5 + 2.0 * counting)
    np.testing.assert_allclose(counting_weights(residuals, counting), expected / expected.mean(), rtol=0.15)


def test_counting_weights_are_one_where_depth_explains_nothing():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(counting_weights(rng.normal(size=(50, 4)), np.ones(50)), 1.0)
    assert (counting_weights(np.zeros((50, 4)), rng.random(50)) == 1).all()
