from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from spatial_impute._settings import logger
from spatial_impute.models.asign import _propagation
from spatial_impute.models.asign._propagation import KnownGraph, propagate


def path(n: int) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1))


def random_graph(n: int = 40, *, seed: int = 0, density: float = 0.15) -> sparse.csr_matrix:
    """Connected symmetric graph with weights in 0.1-2."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(0.1, 2, (n, n)) * (rng.random((n, n)) < density), 1)
    chain = np.triu(path(n).toarray()) * rng.uniform(0.1, 2, (n, n))
    return sparse.csr_matrix(np.maximum(upper, chain) + np.maximum(upper, chain).T)


def mask(n: int, *known: int) -> np.ndarray:
    return np.isin(np.arange(n), [i % n for i in known])


def solve(
    weights: sparse.csr_matrix, known: np.ndarray, values: np.ndarray, leak: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same fixed point by a direct solution."""
    w = weights.toarray()
    unknown = ~known
    system = np.diag(w[unknown].sum(axis=1) + leak) - w[np.ix_(unknown, unknown)]
    mass = np.linalg.solve(system, w[np.ix_(unknown, known)].sum(axis=1))
    weighted = np.linalg.solve(system, w[np.ix_(unknown, known)] @ values)
    return weighted / mass[:, None], mass


def test_propagate_takes_the_mean_of_two_neighbors():
    values, mass = propagate(path(3), mask(3, 0, 2), np.array([[1.0], [3.0]]), leak=0.0)
    np.testing.assert_allclose(values[:, 0], [1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_propagate_interpolates_along_a_path():
    values, _ = propagate(path(4), mask(4, 0, 3), np.array([[0.0], [3.0]]), leak=0.0)
    np.testing.assert_allclose(values[:, 0], [0, 1, 2, 3], atol=1e-4)


def test_propagate_shifts_with_the_known_values():
    values, _ = propagate(path(4), mask(4, 0, 3), np.array([[-6.0], [-3.0]]), leak=0.0)
    np.testing.assert_allclose(values[:, 0], [-6, -5, -4, -3], atol=1e-4)


@pytest.mark.parametrize("n", [30, 100])
def test_propagate_without_leak_converges_on_long_paths(n):
    """To the harmonic solution, not to wherever the iterations happened to stop."""
    values, mass = propagate(path(n), mask(n, 0, -1), np.array([[0.0], [1.0]]), leak=0.0)
    np.testing.assert_allclose(values[:, 0], np.linspace(0, 1, n), atol=0.01)
    np.testing.assert_allclose(mass, 1, atol=0.01)


def test_propagate_keeps_a_single_negative_value_along_a_chain():
    values, _ = propagate(path(12), mask(12, 0), np.array([[-5.0]]), leak=0.0)
    np.testing.assert_allclose(values, -5, atol=1e-9)


@pytest.mark.parametrize("leak", [0.0, 0.1, 5.0])
def test_propagate_from_one_known_spot_is_constant(leak):
    values, mass = propagate(random_graph(), mask(40, 7), np.array([[2.0, -3.0]]), leak=leak)
    np.testing.assert_allclose(values, np.broadcast_to([2.0, -3.0], (40, 2)), atol=1e-9)
    assert mass[7] == 1
    assert ((mass > 0) & (mass <= 1)).all()


@pytest.mark.parametrize("leak", [0.0, 0.1, 1.0])
def test_propagate_equals_the_direct_solution(leak):
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    given_values = np.random.default_rng(1).normal(size=(4, 3))
    values, mass = propagate(graph, known, given_values, leak=leak)
    expected, expected_mass = solve(graph, known, given_values, leak)
    np.testing.assert_allclose(values[~known], expected, atol=1e-3)
    np.testing.assert_allclose(mass[~known], expected_mass, atol=1e-3)
    np.testing.assert_array_equal(values[known], given_values)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), leak=st.sampled_from([0.0, 0.1, 2.0]), offset=st.floats(-50, 50))
def test_propagate_stays_within_the_known_values(seed, leak, offset):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 25))
    known = rng.random(n) < 0.3
    known[0] = True
    given_values = rng.normal(size=(known.sum(), 2)) + offset
    values, mass = propagate(random_graph(n, seed=seed), known, given_values, leak=leak)
    slack = 1e-6 * (1 + abs(offset))
    assert (values >= given_values.min(axis=0) - slack).all()
    assert (values <= given_values.max(axis=0) + slack).all()
    assert ((mass >= 0) & (mass <= 1)).all()


def test_propagate_flags_spots_that_nothing_reaches():
    graph = sparse.block_diag([path(3), path(2), np.zeros((1, 1))]).tocsr()
    values, mass = propagate(graph, mask(6, 0), np.array([[4.0]]))
    np.testing.assert_allclose(values[:3], 4)
    assert np.isnan(values[3:]).all()
    assert (mass[3:] == 0).all()
    assert (mass[:3] > 0).all()


def test_propagate_explicit_zeros_are_no_edges():
    graph = path(3)
    graph.data[(graph.tocoo().row == 2) | (graph.tocoo().col == 2)] = 0
    values, mass = propagate(graph, mask(3, 0), np.array([[1.0]]))
    assert np.isnan(values[2, 0])
    assert mass[2] == 0


def test_propagate_of_all_known_is_the_identity():
    given_values = np.random.default_rng(0).normal(size=(5, 2))
    values, mass = propagate(path(5), np.ones(5, bool), given_values)
    np.testing.assert_array_equal(values, given_values)
    assert (mass == 1).all()


def test_propagate_of_nothing_known_flags_all():
    values, mass = propagate(path(5), np.zeros(5, bool), np.empty((0, 2)))
    assert values.shape == (5, 2)
    assert np.isnan(values).all()
    assert (mass == 0).all()


def test_propagate_is_linear_and_treats_genes_apart():
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    a, b = np.random.default_rng(0).normal(size=(2, 4, 2))
    one, two = propagate(graph, known, a)[0], propagate(graph, known, b)[0]
    np.testing.assert_allclose(propagate(graph, known, 2 * a - 3 * b)[0], 2 * one - 3 * two, atol=1e-4)
    np.testing.assert_allclose(propagate(graph, known, a[:, :1])[0], one[:, :1], atol=1e-4)


def test_propagate_is_equivariant_to_permutation():
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    full = np.full((40, 1), np.nan)
    full[known] = np.random.default_rng(0).normal(size=(4, 1))
    order = np.random.default_rng(1).permutation(40)
    values, mass = propagate(graph, known, full[known])
    turned, turned_mass = propagate(graph[order][:, order], known[order], full[order][known[order]])
    np.testing.assert_allclose(turned, values[order], atol=1e-8)
    np.testing.assert_allclose(turned_mass, mass[order], atol=1e-8)


def test_propagate_without_leak_ignores_the_scale_of_a_row():
    graph, known = random_graph(), mask(40, 0, 5, 11)
    given_values = np.random.default_rng(0).normal(size=(3, 2))
    scaled = sparse.diags(np.random.default_rng(1).uniform(0.5, 4, 40)) @ graph
    np.testing.assert_allclose(
        propagate(scaled.tocsr(), known, given_values, leak=0.0)[0],
        propagate(graph, known, given_values, leak=0.0)[0],
        atol=1e-4,
    )


def test_propagate_leaves_nothing_of_where_it_started():
    """Few known neighbors everywhere: what is left of the start after 20 steps would be (5/6)^20 = 2.6 %."""
    n = 60
    weights = sparse.csr_matrix(np.ones((n, n)) - np.eye(n))
    known = np.arange(n) < n // 6
    values, _ = propagate(weights, known, np.full((n // 6, 1), 7.0), leak=0.0)
    np.testing.assert_allclose(values, 7, atol=1e-8)
    given_values = np.linspace(5, 9, n // 6)[:, None]
    values, _ = propagate(weights, known, given_values, leak=0.0)
    np.testing.assert_allclose(values[~known], 7, atol=1e-3)


def test_propagate_support_falls_with_distance_and_weak_edges():
    _, mass = propagate(path(8), mask(8, 0), np.array([[1.0]]))
    assert (np.diff(mass) < 0).all()
    _, weak = propagate(path(8) * 0.1, mask(8, 0), np.array([[1.0]]))
    assert (weak[1:] < mass[1:]).all()


def test_propagate_leak_favours_the_near_value():
    known, given_values = mask(5, 0, 4), np.array([[0.0], [1.0]])
    leaky, _ = propagate(path(5), known, given_values, leak=1.0)
    assert leaky[1, 0] < 0.25 - 0.05
    assert leaky[2, 0] == pytest.approx(0.5, abs=1e-5)


def test_propagate_leaves_its_input():
    graph, known, given_values = random_graph(), mask(40, 0, 5), np.ones((2, 1))
    before = graph.copy()
    propagate(graph, known, given_values)
    assert abs(graph - before).max() == 0
    assert (given_values == 1).all()


def test_propagate_default_leak_is_six_neighbors_one_spacing_away():
    """The pull of six neighbors at a weight of exp(-1/2) each."""
    pair = sparse.csr_matrix(np.array([[0.0, 1.0], [1.0, 0.0]]))
    _, mass = propagate(pair, np.array([True, False]), np.array([[2.0]]))
    assert mass[1] == pytest.approx(1 / (1 + 3.6), abs=1e-6)
    assert 6 * np.exp(-0.5) == pytest.approx(3.6, abs=0.05)


def test_propagate_goes_on_until_the_slowest_gene_has_settled():
    """A gene without variation is there at once, and must not end the others."""
    n = 60
    path = sparse.csr_matrix(sparse.diags([np.ones(n - 1), np.ones(n - 1)], [1, -1]))
    known = np.zeros(n, dtype=bool)
    known[[0, -1]] = True
    values, _ = propagate(path, known, np.array([[5.0, 0.0], [5.0, 1.0]]), leak=0.0)
    np.testing.assert_allclose(values[:, 0], 5.0)
    np.testing.assert_allclose(values[:, 1], np.linspace(0, 1, n), atol=1e-5)


def test_propagate_does_not_depend_on_how_many_genes_are_solved_at_a_time(monkeypatch):
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    given_values = np.random.default_rng(0).normal(size=(4, 7))
    expected, expected_mass = propagate(graph, known, given_values)
    widths, solve_columns = [], _propagation._conjugate_gradients
    monkeypatch.setattr(
        _propagation,
        "_conjugate_gradients",
        lambda system, source, *options: widths.append(source.shape[1]) or solve_columns(system, source, *options),
    )
    for n_genes in (1, 3):
        monkeypatch.setattr(_propagation, "_MAX_VALUES", n_genes * 36)
        widths.clear()
        values, mass = propagate(graph, known, given_values)
        assert widths == [1, *[n_genes] * (7 // n_genes), *[7 % n_genes] * (7 % n_genes > 0)]
        np.testing.assert_allclose(values, expected, atol=1e-7)
        np.testing.assert_array_equal(mass, expected_mass)
    monkeypatch.setattr(_propagation, "_MAX_VALUES", 5)  # fewer than one gene takes
    np.testing.assert_allclose(propagate(graph, known, given_values)[0], expected, atol=1e-7)


def test_propagate_says_when_it_has_not_settled(monkeypatch):
    told = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: told.append(text % values))
    known, given_values = mask(200, 0, -1), np.array([[0.0], [1.0]])
    with monkeypatch.context() as patch:
        patch.setattr(_propagation, "_MAX_STEPS", 3)
        propagate(path(200), known, given_values, leak=0.0)
    assert len(told) == 2  # for the mass, and for the values
    assert "stopped after 3 steps" in told[0]
    told.clear()
    values, _ = propagate(path(200), known, given_values, leak=0.0)
    assert not told
    np.testing.assert_allclose(values[:, 0], np.linspace(0, 1, 200), atol=1e-6)


def test_propagate_takes_no_longer_than_there_are_unknown_spots(monkeypatch):
    """Conjugate gradients end after as many steps as there are unknowns, also where degrees differ by powers of ten."""
    monkeypatch.setattr(logger, "warning", lambda *args: pytest.fail("has not settled"))
    graph = random_graph(seed=3)
    scale = sparse.diags(10.0 ** np.random.default_rng(0).uniform(-3, 3, 40))
    known = mask(40, 0, 5, 11, 30)
    given_values = np.random.default_rng(1).normal(size=(4, 3))
    weights = (scale @ graph @ scale).tocsr()
    monkeypatch.setattr(_propagation, "_MAX_STEPS", 50)
    values, mass = propagate(weights, known, given_values)
    expected, expected_mass = solve(weights, known, given_values, 3.6)
    np.testing.assert_allclose(values[~known], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mass[~known], expected_mass, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-200, 1e-12, 1e12, 1e150])
def test_propagate_knows_no_unit_of_the_values(size):
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    given_values = np.random.default_rng(1).normal(size=(4, 3))
    expected, _ = propagate(graph, known, given_values)
    values, _ = propagate(graph, known, given_values * size)
    np.testing.assert_allclose(values / size, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1e-100, 1e-9, 1e9])
def test_propagate_without_leak_knows_no_unit_of_the_weights(size):
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    given_values = np.random.default_rng(1).normal(size=(4, 3))
    expected, _ = propagate(graph, known, given_values, leak=0.0)
    values, mass = propagate(graph * size, known, given_values, leak=0.0)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    np.testing.assert_allclose(mass, 1, atol=1e-6)


def test_propagate_finds_small_differences_on_a_high_level():
    """Values are centred per gene: what is common to all of them costs no digits, whatever its size."""
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    given_values = np.random.default_rng(1).normal(size=(4, 3))
    expected, _ = propagate(graph, known, given_values)
    values, _ = propagate(graph, known, given_values + np.array([1e6, -1e6, 3e6]))
    np.testing.assert_allclose(values - np.array([1e6, -1e6, 3e6]), expected, atol=1e-6)


def test_propagate_settles_to_the_direct_solution():
    """To the tolerance that is asked for by default, which is far below the noise of any measurement."""
    graph, known = random_graph(), mask(40, 0, 5, 11, 30)
    given_values = np.random.default_rng(1).normal(size=(4, 3))
    values, mass = propagate(graph, known, given_values, leak=0.5)
    expected, expected_mass = solve(graph, known, given_values, 0.5)
    np.testing.assert_allclose(values[~known], expected, atol=1e-6)
    np.testing.assert_allclose(mass[~known], expected_mass, atol=1e-6)


def test_single_precision_is_enough():
    graph, known = random_graph(200), np.arange(200) % 7 == 0
    given_values = np.random.default_rng(1).normal(size=(known.sum(), 3))
    expected, expected_mass = propagate(graph, known, given_values)
    values, mass = propagate(graph, known, given_values, dtype=np.float32)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-4)
    np.testing.assert_allclose(mass, expected_mass, atol=1e-5)


def two_parts() -> sparse.csr_matrix:
    """Two graphs without an edge between them; the second has no known spot once the last one is hidden."""
    return sparse.block_diag([random_graph(80), random_graph(20, seed=1)]).tocsr()


@pytest.mark.parametrize("columns_at_a_time", [1, 7, 100])
def test_graph_of_the_known_spots_propagates_as_the_whole_graph(monkeypatch, columns_at_a_time):
    """Groups hidden one by one, and one within another."""
    graph = two_parts()
    rng = np.random.default_rng(0)
    known = rng.random(100) < 0.5
    known[80:] = np.arange(20) == 19
    values = rng.normal(size=(known.sum(), 3)) + 5
    monkeypatch.setattr(_propagation, "_MAX_VALUES", columns_at_a_time * int((~known).sum()))
    reduced = KnownGraph.of(graph, known)
    outer = rng.random(known.sum()) < 0.3
    inner = ~outer & (rng.random(known.sum()) < 0.3)
    inner[-1] = True
    for found, hidden, wanted in [
        (reduced.propagate(outer, values[~outer]), outer, outer),
        (reduced.hide(outer).propagate(inner[~outer], values[~outer & ~inner]), outer | inner, inner & ~outer),
    ]:
        rows = np.flatnonzero(known)
        expected, mass = propagate(graph, np.isin(np.arange(100), rows[~hidden]), values[~hidden])
        np.testing.assert_allclose(found[0], expected[rows[wanted]], atol=1e-4)
        np.testing.assert_allclose(found[1], mass[rows[wanted]], atol=1e-5)
    assert found[1][-1] == 0  # no known spot is connected
    assert np.isnan(found[0][-1]).all()


def test_graph_of_the_known_spots_without_other_spots():
    graph = random_graph()
    hidden, values = mask(40, 3, 4, 20), np.random.default_rng(0).normal(size=(37, 2))
    found, mass = KnownGraph.of(graph, np.ones(40, dtype=bool)).propagate(hidden, values)
    expected, expected_mass = propagate(graph, ~hidden, values)
    np.testing.assert_allclose(found, expected[hidden], atol=1e-5)
    np.testing.assert_allclose(mass, expected_mass[hidden], atol=1e-6)
