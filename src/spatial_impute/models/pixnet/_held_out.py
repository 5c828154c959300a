"""Loss of PixNet on regions, and the held-out regions of a training: windows, errors, weights of base and decoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_1samp
from torch import Tensor, nn

from spatial_impute._scores import pearson_by_gene
from spatial_impute.models._spots import given
from spatial_impute.models.asign._blend import blend_weights
from spatial_impute.models.asign._training import correlation_loss
from spatial_impute.models.pixnet._crops import Crop, cover, make_crop, predict_crops

if TYPE_CHECKING:
    from spatial_impute.models._params import PixNetParams
    from spatial_impute.models.pixnet._crops import CropSettings, TrainingSlide
    from spatial_impute.models.pixnet._network import PixNetNetwork

_MAX_WINDOWS = 48  # more would take longer than the steps between two checks
_CHANCE = 0.05  # a decoder that has learned nothing passes the confirmation this often
_N_FOLDS = 12  # of the blocks, which are six per slide; the weights of base and decoder in a fold come from the others
_SMALLEST_VARIANCE = 1e-8
_SMALLEST_RATE = 1e-8  # counts; keeps the logarithm finite


class RegionLoss(nn.Module):
    """Loss of predicted regions (n, n_genes): ``"mse+pcc"`` (squared error and correlation), ``"poisson"``, or ``"nb"``.

    For counts `predicted` is the expected count; the negative binomial learns a dispersion for each gene.
    """

    def __init__(self, kind: str, n_genes: int, correlation_weight: float) -> None:
        super().__init__()
        self.kind, self.correlation_weight = kind, correlation_weight
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes)) if kind == "nb" else None

    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Mean over regions and genes."""
        value = self.per_region(predicted, true).mean()
        if self.kind == "mse+pcc":
            value = value + self.correlation_weight * correlation_loss(predicted, true)
        return value

    def per_region(self, predicted: Tensor, true: Tensor) -> Tensor:
        """(n,) squared error, or negative log-likelihood of counts: mean over genes."""
        if self.kind == "mse+pcc":
            return (predicted - true).square().mean(dim=1)
        rate = predicted.clamp_min(_SMALLEST_RATE)
        if self.log_dispersion is None:
            return (rate - true * rate.log()).mean(dim=1)
        total = self.log_dispersion.exp()  # number of failures r: variance is rate + rate^2 / r
        likelihood = (
            torch.lgamma(true + total)
            - torch.lgamma(total)
            - torch.lgamma(true + 1)
            + total * (total.log() - (total + rate).log())
            + true * (rate.log() - (total + rate).log())
        )
        return -likelihood.mean(dim=1)


@dataclass(frozen=True)
class HeldOutCrop:
    """Held-out regions of one window."""

    crop: Crop
    owned: np.ndarray  # (n_rows,) bool: regions that are evaluated in this window and in no other
    maps: list[Tensor] | None  # Maps of the encoder, if it is not trained


def cut_windows(
    network: PixNetNetwork,
    slides: list[TrainingSlide],
    crop_settings: CropSettings,
    params: PixNetParams,
    *,
    seed: int,
    device: str,
) -> list[HeldOutCrop]:
    """Windows that cover the regions of slides, a sample if there are many; with their maps if the encoder is not trained."""
    windows = [
        (slide, *window) for slide in slides for window in cover(slide, crop_settings.size, crop_settings.margin)
    ]
    if len(windows) > _MAX_WINDOWS:
        kept = np.random.default_rng(seed).choice(len(windows), _MAX_WINDOWS, replace=False)
        windows = [windows[k] for k in np.sort(kept)]
    found = []
    for slide, center, rows in windows:
        crop = make_crop(slide, center, crop_settings)
        maps = None
        if not params.encoder_learning_rate:
            with torch.no_grad():
                maps = network.encode(crop.rgb[None].to(device))
        found.append(HeldOutCrop(crop, np.isin(crop.rows, rows), maps))
    return found


@dataclass(frozen=True)
class Evaluation:
    """Errors on the held-out regions."""

    r: np.ndarray  # (n_genes,) correlation of each gene, mean over slides and sizes
    block: np.ndarray  # (n_blocks, 2) slide and number of each held-out block
    error: np.ndarray  # (n_blocks,) error of each block, mean over sizes
    weights: np.ndarray | None = None  # (n_genes, 2) best weights of base and decoder; None if only one of them is used

    @property
    def half(self) -> np.ndarray:
        """(n_blocks,) bool: one of two halves that confirm each other's choice, of other slides if there are several."""
        slide = np.unique(self.block[:, 0], return_inverse=True)[1]
        return (slide if slide.max(initial=0) else np.arange(len(slide))) % 2 == 0


@dataclass(frozen=True)
class _Predictions:
    """Predictions of all held-out regions."""

    decoded: np.ndarray  # (n, n_genes) by the decoder
    base: np.ndarray | None  # (n, n_genes) by the base, if there is one
    true: np.ndarray  # (n, n_genes)
    place: pd.DataFrame  # Slide and block of each region, and the number of regions of its size on the slide

    @classmethod
    def of(cls, network: PixNetNetwork, windows: list[HeldOutCrop], device: str) -> _Predictions:
        """Apply the decoder; the base is known."""
        network.eval()
        decoded, base, true, place = [], [], [], []
        for window in windows:
            crop, owned = window.crop, window.owned
            with torch.no_grad():
                maps = network.encode(crop.rgb[None].to(device)) if window.maps is None else window.maps
                decoded.append(predict_crops(network, maps, [crop]).cpu().numpy()[owned])
            slide, rows = crop.slide, crop.rows[owned]
            true.append(slide.expression[rows])
            base += [given(slide.base)[rows]] if network.n_base else []
            place.append(pd.DataFrame({"slide": slide.slide, "size": len(slide.regions), "block": slide.block[rows]}))
        found = np.concatenate(base) if network.n_base else None
        return cls(np.concatenate(decoded), found, np.concatenate(true), pd.concat(place, ignore_index=True))

    @cached_property
    def sizes(self) -> list[np.ndarray]:
        """Regions of each size on each slide."""
        return list(self.place.groupby(["slide", "size"]).indices.values())

    @cached_property
    def variance(self) -> np.ndarray:
        """(n,) variance of the true values of the same size, mean over the genes."""
        result = np.empty(len(self.true))
        for rows in self.sizes:
            result[rows] = max(float(self.true[rows].var(axis=0).mean()), _SMALLEST_VARIANCE)
        return result

    @cached_property
    def fold(self) -> np.ndarray:
        """(n,) fold of each region: its block, or several blocks if there are many."""
        return self.place.groupby(["slide", "block"]).ngroup().to_numpy() % _N_FOLDS

    def blend(self) -> tuple[np.ndarray, np.ndarray]:
        """(n_genes, 2) best weights of base and decoder in a sum, and this sum (n, n_genes) with the weights of other blocks.

        The base has learned from all spots what is linear. Weights from few blocks would lose some of it in every gene, for a
        decoder that is better on average. So each gene follows the sum only as far as the blocks show a gain (see
        :func:`_trust`), and the base with its best factor for the rest.
        """
        (of_base, scaled), (of_both, mixed) = self.scaled_base, self._weigh([given(self.base), self.decoded])
        gain = ((scaled - self.true) ** 2 - (mixed - self.true) ** 2) / self.variance[:, None]
        by_fold = pd.DataFrame(gain).groupby(self.fold).mean().to_numpy()
        # The trust in a fold comes from the other folds, as its weights do.
        elsewhere = np.stack([_trust(np.delete(by_fold, k, axis=0)) for k in range(len(by_fold))])[self.fold]
        trust = _trust(by_fold)[:, None]
        of_base = np.pad(of_base, [(0, 0), (0, 1)])
        return of_base + trust * (of_both - of_base), scaled + elsewhere * (mixed - scaled)

    @cached_property
    def scaled_base(self) -> tuple[np.ndarray, np.ndarray]:
        """(n_genes, 1) best factor of the base, and the base (n, n_genes) with that of the other blocks."""
        return self._weigh([given(self.base)])

    def _weigh(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(n_genes, k) best weights of some predictions, and their sum (n, n_genes) with the weights of other blocks."""
        if not self.fold.any():  # a single block cannot choose weights for another one
            return np.tile([1.0] + [0.0] * (len(parts) - 1), (self.true.shape[1], 1)), parts[0]
        return blend_weights(np.stack(parts), self.true, self.fold, 1 / self.variance, alone=[0])


def evaluate(
    network: PixNetNetwork, windows: list[HeldOutCrop], loss: RegionLoss, device: str, *, base_alone: bool = False
) -> Evaluation:
    """Correlations and errors on the held-out regions: of the weighted sum of base and decoder, or of the base alone.

    The error of log values is in units of their variance at each size, so that small regions, which vary most, do not
    outweigh the others. That of counts is the loss. The error of the base alone is that with its best factor, so that a
    decoder without any information does not lower it.
    """
    found = _Predictions.of(network, windows, device)
    weights, predicted, shown = None, found.decoded, found.decoded
    if base_alone:
        predicted, shown = found.scaled_base[1], given(found.base)
    elif found.base is not None:
        weights, predicted = found.blend()
        shown = predicted
    correlations = [pearson_by_gene(shown[rows], found.true[rows]) for rows in found.sizes]
    r = np.ma.masked_invalid(correlations).mean(axis=0).filled(np.nan)
    with torch.no_grad():
        parts = (torch.from_numpy(part.astype(np.float32)).to(device) for part in (predicted, found.true))
        error = loss.per_region(*parts).cpu().numpy()
    if loss.kind == "mse+pcc":
        error = error / found.variance
    by_size = found.place.assign(error=error).groupby(["slide", "size", "block"])["error"].mean()
    mean = by_size.groupby(level=["slide", "block"]).mean()
    return Evaluation(r, np.array(mean.index.to_list()), mean.to_numpy(), weights)


def is_confirmed(errors: np.ndarray, half: np.ndarray) -> bool:
    """True if training helps where it did not choose: (n_checks, n_blocks) errors, the first check is the start.

    The check that is best on one half of the blocks is compared with the start on the other half, and the reverse. Over all
    blocks its gain must be larger than chance (paired t-test). What is kept, the best check on all blocks, is chosen in the
    same way from more.
    """
    gain = np.zeros(errors.shape[1])
    for chooses in (half, ~half):
        if chooses.all() or not chooses.any():
            return False  # one block alone cannot confirm anything
        chosen = errors[:, chooses].mean(axis=1).argmin()
        gain[~chooses] = (errors[0] - errors[chosen])[~chooses]
    return bool(gain.any()) and bool(ttest_1samp(gain, 0.0, alternative="greater").pvalue < _CHANCE)


def _trust(gain: np.ndarray) -> np.ndarray:
    """(m,) trust in (n, m) gains, 0 to 1: none below one standard error of their mean, .75 at two, .89 at three.

    One minus the share of chance in the square of the mean, the shrinkage of James and Stein.
    """
    if len(gain) < 2:
        return np.zeros(gain.shape[1])
    mean, variance = gain.mean(axis=0), gain.var(axis=0, ddof=1) / len(gain)
    return np.where(mean > 0, np.maximum(0.0, 1 - variance / np.maximum(mean**2, 1e-30)), 0.0)
