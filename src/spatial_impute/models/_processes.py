"""Processes that train one network together, as ``torchrun`` starts them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed, nn

from spatial_impute._io.workers import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_T = TypeVar("_T")


def of_first_process(value: _T) -> _T:
    """Value that the first process has, so that all take the same decision."""
    if rank_and_size()[1] == 1:
        return value
    shared = [value]
    distributed.broadcast_object_list(shared)
    return shared[0]


def mean_gradient(network: nn.Module, optimizer: torch.optim.Optimizer, loss: float | None) -> float | None:
    """Give all processes the mean gradient, and the mean statistics of batch normalisation; return the mean loss.

    A process without a batch has no loss and does not count. The result is None if no process has one.
    """
    n_processes = rank_and_size()[1]
    if n_processes == 1:
        return loss
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    total = torch.tensor([loss or 0.0, float(loss is not None)], device=weights[0].device)
    distributed.all_reduce(total)
    if not total[1]:
        return None
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        distributed.all_reduce(weight.grad)
        weight.grad /= total[1]
    for statistic in _batch_statistics(network):
        distributed.all_reduce(statistic)
        statistic /= n_processes
    return float(total[0] / total[1])


def _batch_statistics(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from (buffer for buffer in module.buffers() if buffer.is_floating_point())
