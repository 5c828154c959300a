"""Training of MSAGNet on masked measured spots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spatial_impute.models._msagnet import GraphInputs, MSAGNet


@dataclass(frozen=True)
class Target:
    """What is to be predicted on one stack."""

    rows: Tensor
    """(m,) spots."""
    expression: Tensor
    """(m, g)."""


def correlation_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """1 - Pearson correlation of each gene across spots, mean over the genes that vary.

    Shapes: both (m, g) -> scalar.
    """
    p = predicted - predicted.mean(dim=0)
    t = true - true.mean(dim=0)
    t_norm = t.norm(dim=0)
    varies = t_norm > 0
    if not varies.any():
        return predicted.sum() * 0.0
    r = (p * t).sum(dim=0) / (p.norm(dim=0).clamp_min(1e-12) * t_norm.clamp_min(1e-12))
    return (1.0 - r[varies]).mean()


def train(
    build: Callable[[], MSAGNet],
    inputs: list[GraphInputs],
    targets: list[Target],
    held_out: list[Target],
    *,
    n_epochs: int,
    learning_rate: float,
    weight_decay: float,
    correlation_weight: float,
    seed: int,
    device: str,
    on_epoch: Callable[[], None],
) -> tuple[list[dict[str, Tensor]], list[dict[str, float]], list[list[Tensor]]]:
    """Train one network and watch it on held-out spots.

    Parameters
    ----------
    build
        Makes the network; called after seeding.
    inputs, targets, held_out
        One entry per stack.
    on_epoch
        Called after every epoch, for progress.

    Returns
    -------
    states
        Weights after each checked epoch, the untrained network first.
    history
        Epoch, training loss, squared error on the held-out spots, for the same epochs.
    predictions
        For the same epochs, the held-out spots of each stack, (m, g).

    Raises
    ------
    ValueError
        If the loss stops being finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().to(device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        inputs = [x.to(device) for x in inputs]
        check_every = max(1, n_epochs // 20)
        states, history, predictions = [], [], []
        loss_value = math.nan
        for epoch in range(n_epochs + 1):
            if epoch % check_every == 0:
                found = _predict(network, inputs, held_out)
                errors = torch.cat([(p - t.expression).flatten() for p, t in zip(found, held_out, strict=True)])
                history.append({"epoch": epoch, "loss": loss_value, "held_out_mse": float(errors.square().mean())})
                states.append({key: value.detach().cpu().clone() for key, value in network.state_dict().items()})
                predictions.append(found)
            if epoch == n_epochs:
                break
            network.train()
            optimiser.zero_grad()
            # Cosine decay to zero: the last epochs settle instead of wandering.
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / n_epochs))
            loss = torch.zeros((), device=device)
            for x, target in zip(inputs, targets, strict=True):
                predicted = network(x)[target.rows.to(device)]
                true = target.expression.to(device)
                loss = loss + torch.nn.functional.mse_loss(predicted, true)
                loss = loss + correlation_weight * correlation_loss(predicted, true)
            loss = loss / len(inputs)
            loss_value = float(loss.detach())
            if not math.isfinite(loss_value):
                msg = f"The loss became {loss_value} in epoch {epoch + 1}; lower `learning_rate` (now {learning_rate:g})."
                raise ValueError(msg)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            on_epoch()
    return states, history, predictions


def _predict(network: MSAGNet, inputs: list[GraphInputs], targets: list[Target]) -> list[Tensor]:
    network.eval()
    with torch.inference_mode():
        return [network(x)[t.rows.to(x.base.device)].cpu() for x, t in zip(inputs, targets, strict=True)]
