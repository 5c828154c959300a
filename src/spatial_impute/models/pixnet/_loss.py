"""Losses of PixNet on regions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spatial_impute.models.asign._training import correlation_loss

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
