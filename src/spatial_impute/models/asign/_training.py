"""Training of MSAGNet on masked measured spots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable

    from spatial_impute.models.asign._network import GraphInputs, MSAGNet


@dataclass(frozen=True)
class Episode:
    """One masking of one stack: what the network sees, and the spots it has to predict from it.

    The labels of these spots, and of all that are kept for watching, reach none of the inputs.
    """

    inputs: GraphInputs
    rows: Tensor
    """(m,) spots to predict."""
    expression: Tensor
    """(m, g) their expression, standardised."""
    weight: Tensor
    """(m,) weight of each of them in the loss."""

    def to(self, device: str) -> Episode:
        """Move all tensors."""
        return Episode(self.inputs.to(device), self.rows.to(device), self.expression.to(device), self.weight.to(device))


def correlation_loss(predicted: Tensor, true: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - weighted Pearson correlation of each gene across spots, mean over the genes that vary.

    Shapes: (m, g), (m, g), (m,) -> scalar. Without `weight` all spots count the same.
    """
    weight = torch.ones_like(true[:, 0]) if weight is None else weight
    share = (weight / weight.sum())[:, None]
    p = (predicted - (share * predicted).sum(dim=0)) * share.sqrt()
    t = (true - (share * true).sum(dim=0)) * share.sqrt()
    t_norm = t.norm(dim=0)
    varies = t_norm > 1e-6 * true.abs().amax(dim=0)  # centring leaves rounding errors of a constant
    if not varies.any():
        return predicted.sum() * 0.0
    r = (p * t).sum(dim=0) / (p.norm(dim=0).clamp_min(1e-12) * t_norm.clamp_min(1e-12))
    return (1.0 - r[varies]).mean()


def train(
    build: Callable[[], MSAGNet],
    episodes: list[Episode],
    held_out: list[Episode],
    *,
    n_steps: int,
    learning_rate: float,
    weight_decay: float,
    correlation_weight: float,
    seed: int,
    device: str,
    on_step: Callable[[], None],
) -> tuple[list[dict[str, Tensor]], list[dict[str, float]], list[list[Tensor]]]:
    """Train one network, one episode at a time, and watch it on held-out spots.

    In a process group (``torch.distributed``, as started by ``torchrun``) every process takes another episode, gradients
    are averaged, and all processes end with the same network.

    Parameters
    ----------
    build
        Makes the network; called after seeding.
    episodes
        To train on, in turn.
    held_out
        To watch.
    n_steps
        Steps of the optimiser.
    learning_rate, weight_decay
        Settings of AdamW.
    correlation_weight
        Weight of :func:`correlation_loss` beside the squared error.
    seed
        Seed of weights and dropout.
    device
        Torch device.
    on_step
        Called after every step, for progress.

    Returns
    -------
    states
        Weights at some 20 steps, the untrained network first.
    history
        Step, training loss, squared error on the held-out spots at the same steps.
    predictions
        The held-out spots of each episode at the same steps, (m, g).

    Raises
    ------
    ValueError
        If the loss stops being finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().to(device)
        rank, n_ranks, trained = 0, 1, network
        if distributed.is_available() and distributed.is_initialized():
            rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
            trained = DistributedDataParallel(network)
            torch.manual_seed(seed + 7919 * rank)  # processes drop different activations
        optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        episodes = [episode.to(device) for episode in episodes]
        held_out = [episode.to(device) for episode in held_out]
        check_every = max(1, n_steps // 20)
        states, history, predictions, losses = [], [], [], []
        for step in range(n_steps + 1):
            if step % check_every == 0 or step == n_steps:
                found = _predict(network, held_out)
                errors = [
                    (e.weight[:, None] * (p - e.expression).square()).mean(dim=1)
                    for p, e in zip(found, held_out, strict=True)
                ]
                loss = sum(losses) / len(losses) if losses else math.nan
                history.append({"step": step, "loss": loss, "held_out_mse": float(torch.cat(errors).mean())})
                states.append({key: value.detach().cpu().clone() for key, value in network.state_dict().items()})
                predictions.append([p.cpu() for p in found])
                losses = []
                if step and not math.isfinite(history[-1]["held_out_mse"]):
                    raise ValueError(
                        _diverged("error on held-out spots", history[-1]["held_out_mse"], step, learning_rate)
                    )
            if step == n_steps:
                break
            # Cosine decay to zero: the last steps settle instead of wandering.
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / n_steps))
            episode = episodes[(step * n_ranks + rank) % len(episodes)]
            losses.append(_step(trained, optimiser, episode, correlation_weight))
            if not math.isfinite(losses[-1]):
                raise ValueError(_diverged("loss", losses[-1], step + 1, learning_rate))
            on_step()
    return states, history, predictions


def _diverged(what: str, value: float, step: int, learning_rate: float) -> str:
    return f"The {what} became {value} in step {step}; lower `learning_rate` (now {learning_rate:g})."


def _step(network: nn.Module, optimiser: torch.optim.Optimizer, episode: Episode, correlation_weight: float) -> float:
    """One step on one episode; returns the loss before it."""
    network.train()
    optimiser.zero_grad()
    predicted = network(episode.inputs)[episode.rows]
    loss = (episode.weight[:, None] * (predicted - episode.expression).square()).mean()
    loss = loss + correlation_weight * correlation_loss(predicted, episode.expression, episode.weight)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


def _predict(network: MSAGNet, episodes: list[Episode]) -> list[Tensor]:
    network.eval()
    with torch.inference_mode():
        return [network(episode.inputs)[episode.rows] for episode in episodes]
