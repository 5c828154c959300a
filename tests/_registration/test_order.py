from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._registration import Likeness, RegistrationParams, SectionImage, exchanged_sections
from spatial_impute._registration.chain import most_alike


@pytest.fixture(scope="module")
def block() -> Likeness:
    """Four sections of a block whose pattern changes from one to the next."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:160, :180] - np.array([80, 90])[:, None, None]
    mask = np.hypot(y / 65, x / 75) < 1
    patterns = [ndi.gaussian_filter(rng.normal(size=mask.shape), 4) for _ in range(2)]
    patterns = [pattern / pattern.std() for pattern in patterns]
    images = {}
    for name, angle in zip("abcd", np.deg2rad([0, 30, 60, 90]), strict=True):
        own = ndi.gaussian_filter(rng.normal(size=mask.shape), 2)
        pattern = np.cos(angle) * patterns[0] + np.sin(angle) * patterns[1] + 0.7 * own / own.std()
        light = np.where(mask, 240 * np.exp(-np.clip(0.6 + 0.15 * pattern, 0.1, 2)), 240)
        images[name] = SectionImage(np.stack([light] * 3, axis=-1).astype(np.uint8), (20.0, 20.0), mask)
    placed = dict.fromkeys(images, SimpleNamespace(matrix=np.eye(3)))
    return Likeness(images, placed, RegistrationParams())


def test_likeness_falls_with_the_distance(block):
    values = [block("a", other).mean() for other in "abcd"]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(1)
    np.testing.assert_array_equal(block("a", "c"), block("c", "a"))


def test_stack_in_order_gives_no_warning(block):
    assert exchanged_sections("abcd", block) == []
    assert exchanged_sections("dcba", block) == []


@pytest.mark.parametrize(("order", "pair"), [("bacd", "ba"), ("acbd", "cb"), ("abdc", "dc")])
def test_exchanged_sections_are_found(block, order, pair):
    found = exchanged_sections(order, block)
    assert [a + b for a, b, _ in found] == [pair]
    assert found[0][2] > 0


def test_two_sections_have_no_order(block):
    assert exchanged_sections("ad", block) == []


def test_sections_of_equal_likeness_give_no_warning():
    """Differences within the noise of the tiles are no evidence."""
    rng = np.random.default_rng(1)
    noise = {pair: rng.normal(0.3, 0.02, 50) for pair in map(frozenset, ("ab", "ac", "ad", "bc", "bd", "cd"))}
    assert exchanged_sections("abcd", lambda a, b: noise[frozenset((a, b))]) == []


@pytest.mark.parametrize("order", ["xabc", "axbc", "abxc", "abcx"])
def test_an_odd_section_is_not_reported_as_exchanged(order):
    """A damaged section is little like all others, wherever it lies."""
    near = {frozenset(pair): value for pair, value in {"ab": 0.5, "bc": 0.5, "ac": 0.4}.items()}

    def likeness(a, b):
        own = np.random.default_rng(ord(a) + ord(b)).normal(0, 0.001, 50)
        return near.get(frozenset((a, b)), 0.2) + own

    assert exchanged_sections(order, likeness) == []


@pytest.mark.parametrize("order", ["xabc", "axbc", "abxc", "abcx"])
def test_a_section_with_less_noise_is_not_reported_as_exchanged(order):
    """In a stack that does not change, a clear section is more like all others, wherever it lies."""

    def likeness(a, b):
        own = np.random.default_rng(ord(a) + ord(b)).normal(0, 0.001, 50)
        return (0.5 if "x" in (a, b) else 0.4) + own

    assert exchanged_sections(order, likeness) == []


@pytest.mark.parametrize("order", ["abcd", "acbd", "cabd", "dcba"])
def test_order_is_inferred(block, order):
    values = np.array([[0.0 if a == b else block(a, b).mean() for b in order] for a in order])
    found = "".join(order[i] for i in most_alike(values))
    assert found in ("abcd", "dcba")
    assert (found == "dcba") == (order == "dcba")  # the direction nearer to the present order


@pytest.mark.parametrize("seed", range(5))
def test_inferred_order_has_the_largest_likeness_of_all(seed):
    rng = np.random.default_rng(seed)
    values = rng.random((7, 7))
    values += values.T

    def total(order):
        return values[list(order[:-1]), list(order[1:])].sum()

    assert total(most_alike(values)) == pytest.approx(max(map(total, permutations(range(7)))))


def test_shuffled_line_of_forty_sections():
    place = np.random.default_rng(0).permutation(40)
    found = most_alike(np.exp(-np.abs(place[:, None] - place) / 5.0))
    assert np.all(np.abs(np.diff(place[found])) == 1)
