"""Windows of dense maps beside the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spatial_impute as si
from spatial_impute.models.pixnet._tiles import DenseJob


class Blur(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.avg_pool2d(x, k) for k in (2, 4)]


@pytest.fixture(scope="module")
def fitted(small_prepared):
    """Small stack with a lazy map of s0, and the model."""
    import copy

    params = {"n_steps": 0, "width": 4, "n_base": 6, "resolution": 4.0, "crop": 64}
    sdata = copy.deepcopy(small_prepared)
    model = si.tl.fit_pixnet(sdata, "s1_image", "s1_spots", encoder=Blur(), model_params=params)
    si.tl.predict_dense(sdata, "s0_image", model, tile_size=64)
    return sdata, model


@pytest.fixture
def mapped(fitted):
    return fitted[0]


def test_dense_shows_image_and_genes_in_um(mapped):
    axes = si.pl.dense(mapped, "s0_image_expression", ["smooth_0", "texture_3"], return_ax=True)
    assert [ax.get_title() for ax in axes] == ["s0_image", "smooth_0", "texture_3"]
    assert all(ax.get_xlim() == (0, 1400) for ax in axes)
    assert all(ax.get_ylim() == (1400, 0) for ax in axes)
    values = mapped.images["s0_image_expression"].sel(c="texture_3").compute().to_numpy().astype(np.float32)
    drawn = axes[2].images[0].get_array()
    np.testing.assert_array_equal(drawn.filled(np.nan), values)


@pytest.mark.parametrize(
    ("record", "label"),
    [
        ({}, "log1p of counts per\n10000 (all genes)"),
        ({"units": "counts"}, "counts per µm²"),
        ({"features": True}, "feature of the network"),
        ({"units": None}, "expression, units\nunknown"),
    ],
)
def test_color_bars_state_the_units_of_the_map(mapped, monkeypatch, record, label):
    kept = mapped.attrs["spatial_impute"]["dense"]
    changed = {"s0_image_expression": kept["s0_image_expression"] | record}
    monkeypatch.setitem(mapped.attrs["spatial_impute"], "dense", changed)
    axes = si.pl.dense(mapped, "s0_image_expression", ["smooth_0", "texture_3"], return_ax=True)
    bars = axes[0].figure.axes[3:]
    assert [bar.get_ylabel() for bar in bars] == [label, label]


def test_window_computes_only_its_tiles(fitted, monkeypatch):
    mapped, model = fitted
    calls = []
    compute = DenseJob.compute
    monkeypatch.setattr(DenseJob, "compute", lambda self, tile: calls.append(tile) or compute(self, tile))
    si.tl.predict_dense(mapped, "s0_image", model, tile_size=64, key_added="again")
    axes = si.pl.dense(mapped, "again", "smooth_0", window=(520, 760, 520, 760), return_ax=True)
    assert axes[1].get_xlim() == (520, 760)
    assert calls == [(2, 2)]
    assert axes[1].images[0].get_array().shape == (30, 30)  # cells of 8 um


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"map_key": "nope"}, KeyError, "si.tl.predict_dense"),
        ({"genes": "nope"}, KeyError, "channels of"),
        ({"genes": []}, ValueError, "`genes` is empty"),
        ({"image_key": "nope"}, KeyError, "sdata.images"),
        ({"coordinate_system": "nope"}, KeyError, "coordinate systems of"),
        ({"window": (9000, 9100, 0, 100)}, ValueError, "does not meet"),
        ({"vmin": [0, 1, 2]}, ValueError, "one limit or one per gene"),
        ({"title": ["a"]}, ValueError, "one entry for the image and each of the 1 genes"),
    ],
)
def test_dense_says_what_is_wrong(mapped, change, error, message):
    with pytest.raises(error, match=message):
        si.pl.dense(mapped, **({"map_key": "s0_image_expression", "genes": "smooth_0"} | change))
