"""Noise: the cipher, what a draw depends on, and its statistics."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry2x32_p

from hiso_jax import directions
from hiso_jax._engine import exact, trees
from hiso_jax.directions import Distribution
from tests.helpers import assert_same_bits, odd_tree

LAWS: tuple[Distribution, ...] = get_args(Distribution)


def test_cipher_is_jax_threefry():
    rng = np.random.default_rng(0)
    k0, k1, c0, c1 = (jnp.asarray(rng.integers(0, 2**32, 1000), jnp.uint32) for _ in range(4))
    ours = directions.threefry((k0, k1), (c0, c1))
    assert_same_bits(ours, tuple(threefry2x32_p.bind(k0, k1, c0, c1)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_folding_in_is_jax_fold_in(seed: int, counter: int):
    key = jax.random.key(np.uint32(seed))
    several = directions.fold_in(key, np.array([counter, 0], np.uint32))
    assert_same_bits(several[0], jax.random.fold_in(key, np.uint32(counter)))
    assert_same_bits(several[1], jax.random.fold_in(key, 0))
    further = directions.fold_in(several, np.uint32(counter))
    assert_same_bits(further[0], jax.random.fold_in(several[0], np.uint32(counter)))


@pytest.mark.parametrize(
    "law", ["normal", "rademacher", pytest.param("near_normal", marks=pytest.mark.slow)]
)
def test_noise_does_not_depend_on_context(law: Distribution):
    every = trees.select(odd_tree())
    leaves = {name: every[name] for name in list(every)[::5]}  # each is a program of its own
    draw = lambda key: directions.noise(key, leaves, law)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 3)
    plain = draw(keys[1])
    assert_same_bits(plain, jax.jit(draw)(keys[1]))
    assert_same_bits(plain, jax.tree.map(lambda x: x[1], jax.vmap(draw)(keys)))
    scanned = jax.lax.map(draw, keys)
    assert_same_bits(plain, jax.tree.map(lambda x: x[1], scanned))
    for name in list(leaves)[::2]:
        assert_same_bits(plain[name], directions.noise(keys[1], {name: leaves[name]}, law)[name])


@pytest.mark.parametrize("law", LAWS)
def test_noise_under_sharding(law: Distribution):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    draw = lambda key: directions.draw(key, (512, 100), law)  # noqa: E731
    key = jax.random.key(3)
    assert_same_bits(draw(key), jax.jit(draw, out_shardings=sharding)(key))


@pytest.mark.parametrize("law", LAWS)
def test_a_shorter_draw_is_a_prefix(law: Distribution):
    key = jax.random.key(2)
    assert_same_bits(directions.draw(key, (1000,), law)[:77], directions.draw(key, (77,), law))


def test_every_counter_and_name_matters():
    leaves = {"a": jnp.zeros(64), "b": jnp.zeros(64)}
    seen = set()
    for root in (0, 1):
        for at in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
            key = directions.direction_key(jax.random.key(root), *at)
            for u in directions.noise(key, leaves).values():
                seen.add(np.asarray(u).tobytes())
    assert len(seen) == 2 * 4 * 2


@pytest.mark.parametrize("law", LAWS)
def test_second_moment_is_the_identity(law: Distribution):
    """E[u] = 0 and E[u u^T] = I, each entry within five standard errors."""
    n, d = 20_000, 24
    draw = lambda key: directions.noise(key, {"a": jnp.zeros(d // 2), "b": jnp.zeros((3, 4))}, law)  # noqa: E731
    keys = jax.vmap(lambda i: directions.direction_key(jax.random.key(0), i, 0, 0))(jnp.arange(n))
    drawn = jax.jit(jax.vmap(draw))(keys)
    u = np.concatenate([np.asarray(drawn["a"]), np.asarray(drawn["b"]).reshape(n, -1)], 1)
    assert np.abs(u.mean(0)).max() < 5 / np.sqrt(n)
    moment = u.T @ u / n
    variance = 0.0 if law == "rademacher" else 2.0  # of u_j^2
    assert np.abs(np.diag(moment) - 1).max() <= 5 * np.sqrt(variance / n) + 1e-6
    assert np.abs(moment - np.diag(np.diag(moment))).max() < 5 / np.sqrt(n)


@pytest.mark.parametrize("law", ["normal", "near_normal"])
def test_normal_has_the_normal_distribution(law: Distribution):
    """Kolmogorov-Smirnov distance, even moments and tails of a million draws."""
    from scipy import stats

    u = np.asarray(directions.draw(jax.random.key(5), (1_000_000,), law), np.float64)
    assert stats.kstest(u[:100_000], "norm").pvalue > 1e-4
    for power, moment, square in ((2, 1, 3), (4, 3, 105), (6, 15, 10395)):
        error = np.sqrt((square - moment**2) / u.size)
        bias = 0.01 * moment if law == "near_normal" and power > 2 else 0
        assert abs((u**power).mean() - moment) < 5 * error + bias, power
    beyond = 2 * stats.norm.sf(4) * u.size
    assert abs((np.abs(u) > 4).sum() - beyond) < 5 * np.sqrt(beyond)


def test_near_normal_is_as_near_as_it_says():
    """Of all values that the two words give, the distribution function and the variance."""
    from scipy import stats

    ones = np.arange(33) - 16
    chance = stats.binom.pmf(ones + 16, 32, 0.5)
    triangle = np.convolve(np.ones(2**8), np.ones(2**8)) / 2**16  # of halves, coarser
    steps = (np.arange(2**9 - 1) - 2**8 + 1) << 8
    values = (ones[:, None] << 16) + steps
    z = np.asarray(exact.near_normal(jnp.asarray(values.ravel(), jnp.int32)), np.float64)
    z, same = np.unique(z, return_inverse=True)
    weight = np.bincount(same, (chance[:, None] * triangle).ravel())
    below = np.cumsum(weight) - weight / 2
    assert np.abs(below - stats.norm.cdf(z)).max() < 1.5e-4
    assert abs((weight * z**2).sum() - 1) < 1e-5 and abs((weight * z).sum()) < 1e-9
    assert abs((weight * z**4).sum() - 3) < 0.01 and abs(z).max() < 6.5


def test_signs_of_a_word_and_of_neighbors_are_uncorrelated():
    u = np.asarray(directions.draw(jax.random.key(6), (400_000,), "rademacher"))
    for lag in (1, 2, 31, 32, 33, 64, 1024):
        assert abs((u[lag:] * u[:-lag]).mean()) < 5 / np.sqrt(u.size - lag), lag


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(LAWS))
def test_any_shape(shape: list[int], law: Distribution):
    u = directions.draw(jax.random.key(0), tuple(shape), law)
    assert u.shape == tuple(shape) and u.dtype == jnp.float32
    assert bool(jnp.isfinite(u).all())


def test_old_style_keys_are_the_same_keys():
    assert_same_bits(directions.as_key(jax.random.PRNGKey(7)), jax.random.key(7))


@pytest.mark.parametrize("bad, error", [
    (7, TypeError), (np.zeros(2, np.uint32), TypeError), (jnp.zeros(3, jnp.uint32), TypeError),
    (jax.random.split(jax.random.key(0)), TypeError), (jax.random.key(0, impl="rbg"), ValueError),
])  # fmt: skip
def test_bad_keys(bad: object, error: type[Exception]):
    with pytest.raises(error, match="^key: "):
        directions.as_key(bad)


def test_bad_distribution():
    with pytest.raises(ValueError, match="distribution: .*'cauchy'"):
        directions.check_distribution("cauchy")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_rounding_keeps_the_expectation(dtype: jnp.dtype):
    x = jnp.float32(1.0) + jnp.float32(2**-8) * 0.3  # between two bfloat16 numbers
    key = directions.rounding_keys(jax.random.key(0), 0, ["w"])[0]
    rounded = directions.round_to(key, jnp.full(100_000, x), dtype)
    values = np.unique(np.asarray(rounded, np.float32))
    assert rounded.dtype == dtype and len(values) <= 2
    gap = values[-1] - values[0]
    mean = np.asarray(rounded, np.float64).mean()
    assert abs(mean - float(x)) <= 5 * max(gap, 1e-6) / np.sqrt(100_000)
