"""Numbers worked out by hand for ASIGN that no other test holds.

The others: propagation in ``models/test_propagation.py`` (paths, maximum principle, components, linearity), overlap of
discs in ``test_geometry.py``, the centre form of ITK in ``_registration/test_pair.py``, constant profiles in
``metrics/test_scores.py``, edges in ``tl/test_graph.py``, the network in ``models/test_msagnet.py``, leaks in
``test_leak.py``.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import sparse

import spatial_impute as si
from spatial_impute._geometry import apply_affine
from spatial_impute._scores import pearson_by_spot
from spatial_impute.models.asign._propagation import propagate
from spatial_impute.models.asign._training import correlation_loss


@pytest.mark.parametrize(("p", "after_20_steps"), [(1 / 3, 3.0e-4), (1 / 6, 2.61e-2)])
def test_nothing_of_the_start_is_left_where_twenty_steps_leave_some(p, after_20_steps):
    """Every unknown spot has a share p of its weight on known ones; t steps leave (1 - p) ** t of where they start."""
    assert (1 - p) ** 20 == pytest.approx(after_20_steps, rel=0.01)
    n = 12
    ring = np.roll(np.eye(n), 1, axis=1) * (1 - p) / 2
    weights = np.zeros((n + 1, n + 1))
    weights[:n, :n] = ring + ring.T
    weights[:n, n] = weights[n, :n] = p
    known = np.arange(n + 1) == n
    values, _ = propagate(sparse.csr_matrix(weights), known, np.array([[-5.0]]), leak=0.0)
    np.testing.assert_allclose(values, -5.0, rtol=1e-6)


def test_affine_and_its_inverse():
    matrix = np.array([[0.0, -1.0, 10.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(apply_affine([[1.0, 2.0]], matrix), [[8.0, 1.0]])
    np.testing.assert_allclose(apply_affine([[8.0, 1.0]], np.linalg.inv(matrix)), [[1.0, 2.0]])


def test_log_values_of_other_normalisations_are_taken_as_they_are(stack):
    """ln((c + 1) / sum(c + 1)) of counts 0, 1, 3, as the paper normalises, is negative throughout."""
    sdata = copy.deepcopy(stack)
    counts = np.array([0.0, 1.0, 3.0]) + 1
    labels = np.log(counts / counts.sum())
    np.testing.assert_allclose(labels, [-1.945910, -1.252763, -0.559616], atol=1e-6)
    assert np.log(1 / 250) == pytest.approx(-5.521461)
    table = sdata.tables["s1_counts"]
    table.layers["published"] = np.tile(labels, (table.n_obs, table.n_vars // 3 + 1))[:, : table.n_vars]
    genes = list(table.var_names[:3])
    si.pp.select_genes(sdata, genes=genes, layer="published", log_normalized=True)
    measured = sdata.tables["stack"].layers["measured"]
    np.testing.assert_allclose(measured[~np.isnan(measured).any(axis=1)][0], labels, rtol=1e-6)


def test_loss_of_correlation():
    predicted, true = torch.tensor([[1.0, 3], [2, 2], [3, 1]]), torch.tensor([[2.0, 2], [4, 4], [6, 6]])
    torch.testing.assert_close(correlation_loss(predicted, true), torch.tensor(1.0))  # the mean of 0 and 2
    flat = torch.ones(3, 2)
    torch.testing.assert_close(correlation_loss(flat, true), torch.tensor(1.0))
    a, b = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[1.0], [3], [2], [4]])
    loss, squared = correlation_loss(a, b), (a - b).square().mean()
    torch.testing.assert_close(torch.stack([loss, squared, 0.5 * loss + 0.5 * squared]), torch.tensor([0.2, 0.5, 0.35]))


def test_small_rows_correlate_like_large_ones():
    rows = np.array([[1e-3, 2e-3, 3e-3]])
    assert pearson_by_spot(rows, rows)[0] == pytest.approx(1.0)
