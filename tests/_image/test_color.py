from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._image.color import fit_stain_map

SIZE = 8.0  # um per px
STAINS = {
    "source": np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]),
    "target": np.array([[0.55, 0.76, 0.35], [0.15, 0.95, 0.27]]),
}


def tissue(stains: np.ndarray, strength: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (y, x, 3) of two stains in a disc of tissue, and that disc."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:220, :220] - 110
    inside = np.hypot(x, y) < 85
    h, e = (np.abs(ndi.gaussian_filter(rng.normal(size=inside.shape), 1.0)) * 3 * strength for _ in range(2))
    mixed = rng.random(inside.shape)
    density = (mixed * h)[..., None] * stains[0] + ((1 - mixed) * e + 0.25 * strength)[..., None] * stains[1]
    density = np.where(inside[..., None], density, 0.01)
    return (255 * np.exp(-density)).astype(np.float32), inside


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_fit_stain_map_gives_the_colours_of_the_target(method):
    source, inside = tissue(STAINS["source"], 0.7, seed=0)
    target, _ = tissue(STAINS["target"], 1.3, seed=1)
    wanted, _ = tissue(STAINS["target"], 1.3, seed=0)  # the same tissue, stained as the target
    recolour = fit_stain_map(source, target, (SIZE, SIZE), method=method)
    before = np.abs(source - wanted)[inside].mean()
    assert np.abs(recolour(source) - wanted)[inside].mean() < 0.35 * before


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_fit_stain_map_of_the_same_colours_changes_nothing(method):
    source, _ = tissue(STAINS["source"], 1.0, seed=0)
    recolour = fit_stain_map(source, source, (SIZE, SIZE), method=method)
    np.testing.assert_allclose(recolour(source), source, atol=0.01)
    assert recolour(np.zeros((2, 2, 3), np.float32)).min() >= 0
    assert recolour(np.full((2, 2, 3), 255.0, np.float32)).max() <= 255


def test_fit_stain_map_needs_tissue():
    source, _ = tissue(STAINS["source"], 1.0, seed=0)
    with pytest.raises(ValueError, match="needs stained tissue on both sections"):
        fit_stain_map(np.full_like(source, 240), source, (SIZE, SIZE), method="macenko")
