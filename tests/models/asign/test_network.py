"""Oracles of the network: each of these fails on the released ASIGN code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatial_impute.models._params import AsignParams
from spatial_impute.models.asign import _network
from spatial_impute.models.asign._network import N_EDGE_FEATURES, N_EDGE_TYPES, Edges, GraphInputs, LabelInputs, MSAGNet
from spatial_impute.models.asign._training import Target, correlation_loss

N, T, D, G = 12, 5, 7, 6


@pytest.fixture
def inputs() -> GraphInputs:
    """Ring of 11 spots and one without neighbors; every edge is there in each type."""
    torch.manual_seed(0)
    ring = torch.arange(N - 1)
    index = torch.stack([torch.cat([ring, ring.roll(-1)]), torch.cat([ring.roll(-1), ring])])
    return GraphInputs(
        spot=torch.randn(N, D),
        region=torch.randn(N, T, D),
        surroundings=torch.randn(N, T, D),
        edges=tuple(Edges(index, torch.rand(index.shape[1], N_EDGE_FEATURES)).by_target() for _ in range(N_EDGE_TYPES)),
    )


@pytest.fixture
def labels() -> LabelInputs:
    torch.manual_seed(3)
    return LabelInputs(base=torch.randn(N, G), propagated=torch.randn(N, G), support=torch.rand(N, 1))


def some(labels: LabelInputs, rows: slice | torch.Tensor) -> LabelInputs:
    return LabelInputs(*(values[rows] for values in vars(labels).values()))


def network(**kwargs) -> MSAGNet:
    """Small network whose heads are not zero, as after some training."""
    torch.manual_seed(1)
    sizes = {"width": 16, "n_heads": 2, "n_graph_layers": 2, "n_level_layers": 1, "dropout": 0.0} | kwargs
    net = MSAGNet(D, torch.arange(G) % 2, AsignParams(**sizes))
    for head in (net.correction, net.merge):
        torch.nn.init.normal_(head.weight, std=0.5)
    return net.eval()


def test_network_starts_exactly_at_the_base(inputs, labels):
    net = network()
    net.return_to_base()
    assert torch.equal(net(inputs, labels), labels.base)
    untrained = MSAGNet(D, torch.arange(G) % 2, AsignParams(width=16, n_heads=2))
    assert torch.equal(untrained.eval()(inputs, labels), labels.base)


def test_reach_limits_what_is_computed_and_changes_nothing(inputs, labels):
    """Spot 0 needs its neighbors 1 and 10 from the first layer, and all other spots of the ring at most as inputs."""
    order = torch.tensor([0, 1, 10, 2, 9, 3, 4, 5, 6, 7, 8, 11])
    position = torch.argsort(order)
    edges = tuple(Edges(position[e.index], e.features).by_target() for e in inputs.edges)
    near = replace(inputs.part(order), edges=edges, reach=(3, 1))
    expected = network()(inputs, labels)[:1]
    torch.testing.assert_close(network()(near, some(labels, slice(1))), expected, rtol=0, atol=1e-5)
    wrong = replace(near, reach=(1, 1))  # the neighbors enter without their own neighbors
    with pytest.raises(IndexError):
        network()(wrong, some(labels, slice(1)))


@pytest.mark.parametrize("kind", range(N_EDGE_TYPES))
def test_many_neighbors_of_one_type_do_not_displace_another(inputs, labels, kind):
    """A spot that gets a hundred more edges of one type attends to those of another type as before."""
    layer = network().graph[0]
    nodes = torch.randn(N, 16)
    other = (kind + 1) % N_EDGE_TYPES
    edges = list(inputs.edges)
    more = torch.stack([torch.randint(N, (100,)), torch.zeros(100, dtype=torch.long)])
    edges[kind] = Edges(torch.cat([edges[kind].index, more], 1), torch.cat([edges[kind].features, torch.rand(100, 6)]))
    before, after = [], []
    layer.attention[other].register_forward_hook(lambda _m, _i, found: after.append(found))
    layer(nodes, inputs.edges)
    before.append(after.pop())
    layer(nodes, edges)
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("level", ["spot", "region", "surroundings"])
def test_network_sees_the_image_of_the_spot(inputs, labels, level):
    changed = getattr(inputs, level).clone()
    changed[3] += 1.0
    found = network()(replace(inputs, **{level: changed}), labels)
    difference = (found - network()(inputs, labels)).abs().amax(dim=1)
    assert difference[3] > 1e-3
    assert difference[N - 1] == 0  # no path leads from spot 3 to the isolated one


def test_network_sees_neighbors_within_its_layers_only(inputs, labels):
    changed = inputs.spot.clone()
    changed[0] += 1.0
    found = network()(replace(inputs, spot=changed), labels)
    difference = (found - network()(inputs, labels)).abs().amax(dim=1)
    assert (difference[[1, 2, 9, 10]] > 1e-6).all()
    assert (difference[[3, 4, 5, 6, 7, 8, 11]] == 0).all()


def test_permuting_spots_permutes_predictions(inputs, labels):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    position = torch.argsort(order)
    permuted = replace(inputs.part(order), edges=tuple(Edges(position[e.index], e.features) for e in inputs.edges))
    expected = network()(inputs, labels)[order]
    torch.testing.assert_close(network()(permuted, some(labels, order)), expected, rtol=0, atol=1e-5)


def test_evaluation_is_repeatable_and_leaves_its_inputs_alone(inputs, labels):
    before = [inputs.spot.clone(), labels.base.clone(), inputs.edges[0].features.clone()]
    net = network()
    assert torch.equal(net(inputs, labels), net(inputs, labels))
    after = [inputs.spot, labels.base, inputs.edges[0].features]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("size", [1, 4, 5, 11])
def test_prediction_does_not_depend_on_how_many_spots_are_taken_at_a_time(inputs, labels, size, monkeypatch):
    monkeypatch.setattr(_network, "_SPOTS_AT_A_TIME", size)
    net = network().eval()
    found = _network.decode_states(net, _network.graph_states(net, inputs), labels)
    torch.testing.assert_close(found, network()(inputs, labels), rtol=0, atol=1e-5)


def test_isolated_spot_is_finite(inputs, labels):
    assert torch.isfinite(network()(inputs, labels)[N - 1]).all()


def test_attention_weights_sum_to_one_and_react_to_edge_features(inputs):
    layer = network().graph[0]
    nodes = torch.randn(N, 16)

    edges = inputs.edges[0]

    def weights(features):
        _, (index, alpha) = layer.attention[0](nodes, edges.index, features, return_attention_weights=True)
        return index, alpha.detach()

    index, alpha = weights(edges.features)
    totals = torch.zeros(N, alpha.shape[1]).index_add_(0, index[1], alpha)
    torch.testing.assert_close(totals[:-1], torch.ones_like(totals[:-1]))  # the last one has no neighbors
    changed = edges.features.clone()
    changed[0] += 1.0
    assert (weights(changed)[1] - alpha).abs().max() > 1e-4


def test_every_parameter_receives_a_gradient(inputs, labels):
    net = network()
    net.train()
    (net(inputs, labels) ** 2).mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []


def test_graphs_of_all_levels_keep_less_for_the_gradient_and_have_the_same(inputs, labels, monkeypatch):
    """States that are computed a second time have the same dropout, and are not kept in between."""
    found = []
    for compute in (_network.checkpoint, lambda layer, *parts, **_: layer(*parts)):
        monkeypatch.setattr(_network, "checkpoint", compute)
        net, kept = network(level_graph=True, dropout=0.4).train(), []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            net(inputs, labels).square().sum().backward()
        found.append((sum(kept), [part.grad for part in net.parameters()]))
    (few, gradients), (many, expected) = found
    assert few < many / 2
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_merge_weight_of_one_is_label_propagation_and_zero_the_network(inputs, labels):
    net = network()
    torch.nn.init.zeros_(net.merge.weight)
    torch.nn.init.constant_(net.merge.bias, 20.0)  # tanh saturates at 1
    torch.testing.assert_close(net(inputs, labels), labels.propagated)
    torch.nn.init.zeros_(net.merge.bias)
    other = replace(labels, propagated=labels.propagated + 1.0)
    assert torch.equal(net(inputs, labels), net(inputs, other))


def test_correlation_loss_is_one_minus_pearson():
    true = torch.tensor([[1.0, 4.0, 2.0], [2.0, 3.0, 2.0], [3.0, 1.0, 2.0], [4.0, 2.0, 2.0]])
    predicted = torch.tensor([[1.0, 1.0, 5.0], [3.0, 2.0, 1.0], [2.0, 3.0, 0.0], [4.0, 4.0, 2.0]])
    # r = 0.8 and -0.8; the third gene does not vary and does not count.
    same = torch.ones(4)
    torch.testing.assert_close(correlation_loss(predicted, true, same), torch.tensor(1.0))
    torch.testing.assert_close(correlation_loss(true[:, :2], true[:, :2], same), torch.tensor(0.0), atol=1e-6, rtol=0)
    tiny = 1e-3 * true[:, :2]
    torch.testing.assert_close(correlation_loss(tiny, tiny, same), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_losses_from_sums_are_those_from_differences():
    """Both losses, and their gradient, by their definition in double precision."""
    generator = torch.Generator().manual_seed(0)
    true = 3 + torch.randn(40, 5, generator=generator)
    predicted = (0.4 * true + torch.randn(40, 5, generator=generator)).requires_grad_()
    weight = 0.2 + torch.rand(40, generator=generator)
    found = Target.of(true, weight).losses(predicted)
    (gradient,) = torch.autograd.grad(sum(found), predicted)

    other = predicted.detach().double().requires_grad_()
    difference = other - true.double()
    squared = (weight.double()[:, None] * difference.square()).mean()
    both = torch.stack([other, true.double().expand_as(other)])
    centred = both - torch.einsum("m,kmg->kg", weight.double() / weight.double().sum(), both)[:, None]
    (pp, pt, tt) = (
        torch.einsum("m,mg,mg->g", weight.double(), centred[i], centred[j]) for i, j in ((0, 0), (0, 1), (1, 1))
    )
    correlation = (1 - pt / (pp * tt).sqrt()).mean()
    (expected,) = torch.autograd.grad(squared + correlation, other)
    torch.testing.assert_close(found[0].double(), squared, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), correlation, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_correlation_loss_counts_a_spot_of_weight_two_twice():
    torch.manual_seed(0)
    predicted, true = torch.randn(5, 3), torch.randn(5, 3)
    weight = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    twice = [0, 0, 1, 2, 3, 4]
    expected = correlation_loss(predicted[twice], true[twice], torch.ones(6))
    torch.testing.assert_close(correlation_loss(predicted, true, weight), expected)
