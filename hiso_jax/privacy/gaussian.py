"""Differential privacy where the data is: a client clips its scalars and adds noise.

What leaves a client in a round is a vector of K x P numbers, so its L2 norm is what is
clipped, and Gaussian noise on a few numbers is all the protection costs. Nobody, the server
included, has to be trusted: the guarantee is local, for all of a client's data.
"""

import jax
import jax.numpy as jnp

from hiso_jax._engine import checks
from hiso_jax._engine.shapes import Array, ArrayLike, Float, Real, SomeKey
from hiso_jax.privacy.accounting import epsilon_of


def privatize(
    scalars: Real[ArrayLike, "*C K P"], key: SomeKey, *, clip: float, noise_multiplier: float
) -> Float[Array, "*C K P"]:
    """Clip clients' scalars and add noise; what comes back may be sent.

    A client's scalars s [K, P] become ``s min(1, clip / |s|) + clip noise_multiplier N(0, I)``.

    Args:
      scalars: float32 [K, P] of one client, or [C, K, P] of several; finite.
      key: the client's own secret PRNG key, another one every round. Never the run's root
        key: whoever has that could take the noise away.
      clip: largest L2 norm of a client's scalars, > 0.
      noise_multiplier: standard deviation of the noise over `clip`, >= 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sent = privatize(jnp.full((1, 4), 10.0), jax.random.key(0), clip=2.0, noise_multiplier=0)
      >>> sent.tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    clip = checks.number("clip", clip, 0, above=True)
    noise_multiplier = checks.number("noise_multiplier", noise_multiplier, 0)
    scalars = jnp.asarray(scalars, jnp.float32)
    if scalars.ndim not in (2, 3):
        raise ValueError(f"scalars: expected [K, P] or [C, K, P], got shape {scalars.shape}")
    norm = jnp.sqrt((scalars**2).sum((-2, -1), keepdims=True))
    clipped = scalars * jnp.minimum(1, clip / jnp.maximum(norm, 1e-30))
    # Drawn flat: the same numbers, for a quarter of the compile time.
    noise = jax.random.normal(key, (scalars.size,), jnp.float32).reshape(scalars.shape)
    return clipped + clip * noise_multiplier * noise


def epsilon(noise_multiplier: float, rounds: int, delta: float = 1e-5) -> float:
    """What a client that answered in so many rounds has given away.

    The rounds are Gaussian mechanisms of sensitivity 2 (one client's data may be replaced by
    any other, which turns its clipped vector around), composed by Renyi divergences.

    Args:
      noise_multiplier: as of `privatize`, > 0.
      rounds: in which the client took part.
      delta: of (epsilon, delta)-differential privacy.

    Raises:
      ImportError: without the extra ``dp`` (dp-accounting).

    Example:
      >>> 0.4 < epsilon(50.0, 100) < 2
      True
    """
    checks.number("noise_multiplier", noise_multiplier, 0, above=True)
    checks.count("rounds", rounds)
    return epsilon_of({(noise_multiplier / 2, 1.0): rounds}, delta)
