"""A small pyramid and models fitted with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spatial_impute as si

QUICK = {
    "n_steps": 6,
    "n_steps_per_check": 2,
    "width": 8,
    "n_base": 16,
    "resolution": 4.0,
    "crop": 128,
    "n_cached_crops": 8,
}


class Octaves(nn.Module):
    """Colour, and its local contrast, at strides 2, 4 and 8; no weights."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for k in (2, 4, 8):
            mean = nn.functional.avg_pool2d(x, k)
            maps.append(torch.cat([mean, nn.functional.avg_pool2d(x**2, k) - mean**2], dim=1))
        return maps


@pytest.fixture(scope="session")
def pixnet_params() -> dict[str, float]:
    """`model_params` of a short fit."""
    return dict(QUICK)


@pytest.fixture(scope="session")
def octaves() -> nn.Module:
    """Encoder without weights."""
    return Octaves()


@pytest.fixture(scope="session")
def small_pixnet(small_prepared, octaves) -> si.models.PixNetModel:
    """Model fitted on the measured section of the small stack. Shared: never write to it."""
    return si.tl.fit_pixnet(small_prepared, "s1_image", "s1_spots", encoder=octaves, model_params=QUICK)
