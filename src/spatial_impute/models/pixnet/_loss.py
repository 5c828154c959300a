"""Losses of PixNet on regions: squared error with correlation, Poisson and negative binomial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spatial_impute.models.asign._training import correlation_loss

_SMALLEST_RATE = 1e-8  # counts; keeps the logarithm finite


class RegionLoss(nn.Module):
    """Loss of predicted regions.

    Parameters
    ----------
    kind
        ``"mse+pcc"``, ``"poisson"`` or ``"nb"``.
    n_genes
        Genes; the negative binomial learns a dispersion for each.
    correlation_weight
        Of the correlation in ``"mse+pcc"``.

    Shapes
    ------
    predicted and true (n, n_genes) -> scalar. For counts `predicted` is the expected count.
    """

    def __init__(self, kind: str, n_genes: int, correlation_weight: float) -> None:
        super().__init__()
        self.kind, self.correlation_weight = kind, correlation_weight
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes)) if kind == "nb" else None

    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Mean over regions and genes."""
        if self.kind == "mse+pcc":
            return (predicted - true).square().mean() + self.correlation_weight * correlation_loss(predicted, true)
        rate = predicted.clamp_min(_SMALLEST_RATE)
        if self.kind == "poisson":
            return (rate - true * rate.log()).mean()
        total = self.log_dispersion.exp()  # number of failures r: variance is rate + rate^2 / r
        likelihood = (
            torch.lgamma(true + total)
            - torch.lgamma(total)
            - torch.lgamma(true + 1)
            + total * (total.log() - (total + rate).log())
            + true * (rate.log() - (total + rate).log())
        )
        return -likelihood.mean()
