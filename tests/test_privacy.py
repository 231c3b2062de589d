"""Scalars of private clients: clipped, noisy by the right amount, accounted for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hiso_jax import privacy


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10), st.integers(0, 2**31 - 1))
def test_norm_is_bounded_and_small_ones_stay(clip: float, seed: int):
    scalars = 3 * jax.random.normal(jax.random.key(seed), (6, 2, 4))
    sent = privacy.privatize(scalars, jax.random.key(0), clip=clip, noise_multiplier=0)
    norms, before = (np.sqrt((np.asarray(x) ** 2).sum((1, 2))) for x in (sent, scalars))
    np.testing.assert_allclose(norms, np.minimum(before, clip), rtol=1e-5)
    cosine = (np.asarray(sent) * scalars).sum((1, 2)) / (norms * before)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)


def test_noise_is_gaussian_of_the_size_asked_for_and_of_the_key():
    zeros = jnp.zeros((5, 100, 100))
    sent = privacy.privatize(zeros, jax.random.key(1), clip=2.0, noise_multiplier=3.0)
    assert stats.kstest(np.asarray(sent).ravel() / 6.0, "norm").pvalue > 1e-6
    other = privacy.privatize(zeros, jax.random.key(2), clip=2.0, noise_multiplier=3.0)
    assert abs(np.corrcoef(np.asarray(sent).ravel(), np.asarray(other).ravel())[0, 1]) < 0.03


def test_epsilon_bounds_what_a_single_gaussian_gives_away():
    """One round: not below the exact epsilon of a Gaussian of sensitivity 2, nor far above."""
    noise, delta = 8.0, 1e-5

    def exact(epsilon: float) -> float:  # Balle and Wang 2018, Theorem 8
        a, b = 2 / noise / 2, epsilon * noise / 2
        return float(stats.norm.cdf(a - b) - np.exp(epsilon) * stats.norm.cdf(-a - b))

    found = privacy.epsilon(noise, 1, delta)
    assert exact(found) <= delta < exact(found / 2)
    assert privacy.epsilon(noise, 9, delta) > 2 * found
    assert privacy.epsilon(3 * noise, 9, delta) == pytest.approx(found, rel=0.02)


def test_bad_arguments_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="clip: .*0"):
        privacy.privatize(jnp.ones((1, 1)), key, clip=0, noise_multiplier=1)
    with pytest.raises(ValueError, match="noise_multiplier: .*-1"):
        privacy.privatize(jnp.ones((1, 1)), key, clip=1, noise_multiplier=-1)
    with pytest.raises(ValueError, match=r"scalars: .*\(3,\)"):
        privacy.privatize(jnp.ones(3), key, clip=1, noise_multiplier=1)
    with pytest.raises(ValueError, match="delta"):
        privacy.epsilon(1.0, 1, 0.0)
    for call in (lambda: privacy.epsilon(1.0, 1, 1.0), lambda: privacy.Accountant(1),
                 lambda: privacy.calibrate(8.0, 1.0, rounds=1, clients=2, asked=1),
                 lambda: privacy.Terms(delta=1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="delta: .*< 1, got 1"):
            call()
