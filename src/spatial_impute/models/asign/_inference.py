"""Predict with MSAGNet part by part, so that memory does not grow with the edges of a large stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spatial_impute.models.asign._network import GraphInputs, GraphLayer, MSAGNet

_SPOTS_AT_A_TIME = 50_000  # some 300 MB at the default width and 12 edges a spot


def predict(network: MSAGNet, x: GraphInputs, *, device: str) -> Tensor:
    """(n, g) prediction of the network, on the CPU; the same as ``network(x)`` whatever the size of the parts."""
    network = network.eval().to(device)
    parts = list(_parts(len(x.spot)))
    with torch.inference_mode():
        if len(parts) == 1:
            return network(x.to(device)).cpu()
        read = [network.read(x.part(rows).to(device)) for rows in parts]
        nodes, context = (torch.cat(tensors) for tensors in zip(*read, strict=True))
        del read
        # Edges by the spot they lead to.
        order = torch.argsort(x.edge_index[1], stable=True)
        edge_index, edge_features = x.edge_index[:, order], x.edge_features[order]
        for layer in network.graph:
            nodes = torch.cat([_attend(layer, nodes, edge_index, edge_features, rows) for rows in parts])
        result = torch.empty_like(x.base)
        for rows in parts:
            result[rows] = network.decide(nodes[rows], context[rows], x.part(rows).to(device)).cpu()
    return result


def _parts(n: int) -> Iterator[slice]:
    for start in range(0, max(n, 1), _SPOTS_AT_A_TIME):
        yield slice(start, min(start + _SPOTS_AT_A_TIME, n))


def _attend(layer: GraphLayer, nodes: Tensor, edge_index: Tensor, edge_features: Tensor, rows: slice) -> Tensor:
    """Apply the layer for some spots; only they and their neighbours are gathered."""
    first, last = torch.searchsorted(edge_index[1].contiguous(), torch.tensor([rows.start, rows.stop]))
    source, target = edge_index[:, first:last]
    own = torch.arange(rows.start, rows.stop)
    gathered = torch.unique(torch.cat([own, source]))  # sorted
    local = torch.stack([torch.searchsorted(gathered, source), torch.searchsorted(gathered, target)])
    device = nodes.device
    found = layer(nodes[gathered.to(device)], local.to(device), edge_features[first:last].to(device))
    return found[torch.searchsorted(gathered, own).to(device)]
