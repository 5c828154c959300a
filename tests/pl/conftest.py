from __future__ import annotations

import copy

import numpy as np
import pytest

import spatial_impute as si


@pytest.fixture(scope="session")
def plot_stack(synthetic, quick_search):
    """Registered stack with a kernel baseline, and with what impute_3d writes (made up: plots only read it)."""
    sdata = copy.deepcopy(synthetic[0])
    si.tl.register_stack(sdata, method="rigid", registration_params=quick_search, show_progress_bar=False)
    si.tl.impute_baseline(sdata, "kernel")
    table = sdata.tables["stack"]
    table.layers["asign"] = table.layers["baseline_kernel"].copy()
    table.obs["imputation_support"] = np.where(table.obs["measured"], 1.0, np.linspace(0.2, 0.6, table.n_obs))
    table.var["imputation_r"] = np.linspace(0.9, 0.0, table.n_vars)
    table.uns["asign"] = {"cross_validated_r": 0.4}
    return sdata


@pytest.fixture
def unregistered(plot_stack, monkeypatch):
    """The same stack before registration."""
    ours = plot_stack.attrs["spatial_impute"]
    monkeypatch.setitem(ours, "stack", {**ours["stack"], "registration": None})
    return plot_stack
