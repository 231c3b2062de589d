"""Aggregators against NumPy, with absent clients and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiso_jax import aggregators

ALL = [aggregators.mean(), aggregators.median(), aggregators.trimmed_mean(0.2), aggregators.krum(1)]


def scalars(clients: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clients, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("weight", [1, 0.1, 0.7])
@pytest.mark.parametrize("clients", [1, 2, 5, 8])
def test_equal_weights_are_the_ordinary_statistics(clients: int, weight: float):
    g, one = scalars(clients), np.full(clients, weight, np.float32)
    np.testing.assert_allclose(aggregators.mean()(g, one), g.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aggregators.median()(g, one), np.median(g, 0), rtol=1e-6)
    cut = int(0.2 * clients)
    ordered = np.sort(g, 0)[cut : clients - cut]
    np.testing.assert_allclose(
        aggregators.trimmed_mean(0.2)(g, one), ordered.mean(0), rtol=1e-5, atol=1e-6
    )


def krum_by_hand(g: np.ndarray, byzantine: int, selected: int) -> np.ndarray:
    flat = g.reshape(len(g), -1).astype(np.float64)
    distance = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    near = np.sort(distance, 1)[:, 1 : len(g) - byzantine - 1]  # without itself
    return g[np.argsort(near.sum(1))[:selected]].mean(0)


@pytest.mark.parametrize("byzantine, selected", [(0, 1), (1, 1), (2, 1), (2, 3)])
def test_krum(byzantine: int, selected: int):
    g = scalars(8, seed=3)
    got = aggregators.krum(byzantine, selected)(g, np.ones(8, np.float32))
    np.testing.assert_allclose(got, krum_by_hand(g, byzantine, selected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregator", ALL[1:], ids=["median", "trimmed", "krum"])
def test_one_attacker_does_not_matter_much(aggregator: aggregators.Aggregator):
    g = scalars(7) * 0.1 + 1
    g[3] = 1e6
    got = np.asarray(aggregator(jnp.asarray(g), jnp.ones(7)))
    assert (np.abs(got - 1) < 0.5).all()
    assert np.abs(np.asarray(ALL[0](jnp.asarray(g), jnp.ones(7)))).min() > 1e4


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 8), st.data())
def test_an_absent_client_is_as_if_not_there(present: int, data: st.DataObject):
    """Weight 0 equals leaving the client out, wherever it stands; order does not matter."""
    g, place = scalars(present, seed=present), data.draw(st.integers(0, present))
    weights = np.ones(present, np.float32)
    more, more_weights = np.insert(g, place, 99.0, axis=0), np.insert(weights, place, 0.0)
    for aggregator in map(jax.jit, ALL):
        alone = np.asarray(aggregator(g, weights))
        np.testing.assert_allclose(aggregator(more, more_weights), alone, rtol=1e-5, atol=1e-6)
        order = data.draw(st.permutations(range(present)))
        np.testing.assert_allclose(aggregator(g[list(order)], weights), alone, rtol=1e-5, atol=1e-6)


def test_weighted_mean_and_median():
    g = np.array([1.0, 2.0, 10.0], np.float32).reshape(3, 1, 1)
    weights = np.array([1.0, 1.0, 3.0], np.float32)
    assert float(aggregators.mean()(g, weights)[0, 0]) == pytest.approx(33 / 5)
    assert float(aggregators.median()(g, weights)[0, 0]) == 10.0
    assert float(aggregators.median()(g, np.float32([2, 1, 1]))[0, 0]) == 1.5


@pytest.mark.parametrize("aggregator", [*ALL, aggregators.concatenate(9)])
@pytest.mark.parametrize("size, counts", [(aggregators.MOST, True), (3.4e38, False)])
def test_the_largest_numbers_never_make_a_record_infinite(
    aggregator: aggregators.Aggregator, size: float, counts: bool
):
    """They count up to a size that can be averaged with any weights; what is beyond does not."""
    g = scalars(9)
    g[2:4] = size
    weights = np.array([1, 1, 1e12, 1e12, 1, 1, 1, 1, 0], np.float32)
    combine = aggregators.Combine(aggregator, "exclude")
    record, used, finite = combine(jnp.asarray(g), weights, (2, 3))
    assert np.isfinite(record).all()
    assert finite[2:4].tolist() == [counts] * 2 and (np.asarray(used[2:4]) > 0).all() == counts


@pytest.mark.parametrize("trim, present, cut", [(0.42, 150, 63), (0.21, 300, 63), (0.39, 300, 117),
                                                (0.42, 300, 126), (0.1, 9, 0)])  # fmt: skip
def test_as_many_are_trimmed_as_the_fraction_says(trim: float, present: int, cut: int):
    """So many attackers change nothing; one more does."""
    weights = (np.arange(300) < present).astype(np.float32)
    for attackers in (cut, cut + 1):
        g = np.where(np.arange(300) < attackers, 1e6, 0).astype(np.float32).reshape(300, 1, 1)
        record = float(aggregators.trimmed_mean(trim)(jnp.asarray(g), jnp.asarray(weights))[0, 0])
        assert (record > 0) == (attackers > cut)


def test_krum_with_too_few_present_moves_nothing():
    """Two attackers among seven are withstood, among four that have answered they need not be."""
    g = scalars(7)
    g[:2] = 1000
    krum = aggregators.Combine(aggregators.krum(2))
    assert np.abs(np.asarray(krum(jnp.asarray(g), np.ones(7), (2, 3))[0])).max() < 10
    few = np.array([1, 1, 1, 1, 0, 0, 0], np.float32)
    assert np.isnan(krum(jnp.asarray(g), few, (2, 3))[0]).all()


@pytest.mark.parametrize("make, text", [
    (lambda: aggregators.trimmed_mean(0.5), "trim: .* < 0.5"),
    (lambda: aggregators.trimmed_mean(-0.1), "trim: .*-0.1"),
    (lambda: aggregators.krum(-1), "num_byzantine: .*-1"),
    (lambda: aggregators.krum(1, 0), "num_selected: .* got 0"),
    (lambda: aggregators.krum(2)(jnp.ones((6, 1, 1)), jnp.ones(6)), "at least 7 clients, got 6"),
])  # fmt: skip
def test_refused(make: object, text: str):
    with pytest.raises(ValueError, match=text):
        make()  # pyright: ignore[reportCallIssue]
