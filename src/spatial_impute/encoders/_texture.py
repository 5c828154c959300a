"""Stain and texture statistics: the encoder that needs no weights."""

from __future__ import annotations

import itertools

import numpy as np


class TextureEncoder:
    """``"texture"``: stain and texture statistics of a patch; needs no weights and no training.

    Hematoxylin, eosin :cite:p:`Ruifrok2001` and luminance are each described by mean, standard deviation, 10th and
    90th percentile, the energy of three octaves of detail, and the mean gradient; added is the correlation of the two
    stains. 25 numbers in all. At 2 um per pixel a nucleus is 3 to 5 px across, and the octaves are nuclei, their
    spacing, and small groups.
    """

    name = "texture"
    identity = "texture-2"  # changes whenever the numbers do
    mpp = 2.0
    patch_px = 32
    n_features = 25
    dense = False
    step_px = None

    _SCALES = (1.0, 2.0, 4.0)  # px; differences of neighbouring blurs are one octave each

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255 as (n, 25)."""
        from scipy.ndimage import gaussian_filter
        from skimage.color import rgb2hed

        scaled = np.clip(np.asarray(patches, dtype=np.float32), 0, 255) / 255.0
        stains = rgb2hed(scaled)
        # (n, 3, y, x): sums over a patch then run over contiguous memory.
        channels = np.stack([stains[..., 0], stains[..., 1], scaled.mean(axis=-1)], axis=1).astype(np.float32)
        blurs = [channels] + [gaussian_filter(channels, (0, 0, s, s), mode="nearest") for s in self._SCALES]
        gradient = np.hypot(np.diff(blurs[1], axis=2)[..., 1:], np.diff(blurs[1], axis=3)[:, :, 1:])
        flat = channels.reshape(*channels.shape[:2], -1)  # (n, 3, pixels)
        low, high = np.percentile(flat, [10, 90], axis=2)
        centred = flat - flat.mean(axis=2, keepdims=True)
        spread = centred.std(axis=2)
        together = (centred[:, 0] * centred[:, 1]).mean(axis=1)
        bands = [(a - b).reshape(flat.shape).std(axis=2) for a, b in itertools.pairwise(blurs)]
        return np.concatenate(
            [
                flat.mean(axis=2),
                spread,
                low,
                high,
                *bands,
                gradient.mean(axis=(2, 3)),
                (together / np.maximum(spread[:, 0] * spread[:, 1], 1e-8))[:, None],
            ],
            axis=1,
        ).astype(np.float32)
