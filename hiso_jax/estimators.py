"""Losses at a few points in, scalars out; and the gradient estimate the scalars stand for."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax import directions, exact, trees

Loss = Callable[[trees.Params], jax.Array]
"""Parameters -> loss, any shape: one loss, or one per client."""
Direction = Callable[[Any], trees.Leaves]
"""Number of a perturbation -> direction z (or noise u)."""
Estimator = Callable[[Loss, trees.Params, Direction, int, Any], tuple[jax.Array, jax.Array]]
"""(loss, params, direction, P, smoothing) -> (value [...], scalars [P, ...])."""


def forward_difference(
    loss: Loss, params: trees.Params, direction: Direction, num_perturbations: int, smoothing: Any
) -> tuple[jax.Array, jax.Array]:
    """Estimate directional derivatives with one base loss and P perturbed ones.

    ``scalars[p] = (loss(x + smoothing z_p) - loss(x)) / smoothing`` (HiSo, Eq. 8).
    Costs P + 1 forward passes.

    Args:
      loss: parameters -> loss of any shape [...], float32.
      params: pytree x.
      direction: p -> direction z_p, one at a time, so that only one lives in memory.
      num_perturbations: P.
      smoothing: finite-difference step mu > 0.

    Returns:
      The loss at x [...], and the scalars [P, ...] in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> x, z = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 0.0])}
      >>> value, scalars = forward_difference(
      ...     lambda x: 3 * x["w"].sum(), x, lambda p: z, num_perturbations=2, smoothing=0.5)
      >>> float(value), scalars.tolist()
      (9.0, [3.0, 3.0])
    """
    base = loss(params)

    def scalar(p: jax.Array) -> jax.Array:
        moved = loss(directions.perturb(params, direction(p), smoothing))
        return ((moved - base) / smoothing).astype(jnp.float32)

    return base, lax.map(scalar, jnp.arange(num_perturbations))


def central_difference(
    loss: Loss, params: trees.Params, direction: Direction, num_perturbations: int, smoothing: Any
) -> tuple[jax.Array, jax.Array]:
    """Estimate directional derivatives with P pairs of perturbed losses.

    ``scalars[p] = (loss(x + smoothing z_p) - loss(x - smoothing z_p)) / (2 smoothing)``
    (MeZO, Definition 1). Costs 2 P forward passes; its error is of second order in smoothing.

    Args and Returns: as `forward_difference`, but the value is the mean of the
    perturbed losses, since none is taken at x itself.
    """

    def scalar(p: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = direction(p)
        up = loss(directions.perturb(params, z, smoothing))
        down = loss(directions.perturb(params, z, -smoothing))
        return (up + down) / 2, ((up - down) / (2 * smoothing)).astype(jnp.float32)

    values, scalars = lax.map(scalar, jnp.arange(num_perturbations))
    return values.mean(0), scalars


ESTIMATORS: dict[str, Estimator] = {"forward": forward_difference, "central": central_difference}


def get(estimator: str | Estimator) -> Estimator:
    """Return an estimator by name, or the function itself."""
    if callable(estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator: expected one of {tuple(ESTIMATORS)} or a function, got {estimator!r}"
        )
    return ESTIMATORS[estimator]


def reconstruct(
    scalars: jax.Array, noise: Direction, like: Mapping[str, jax.Array]
) -> trees.Leaves:
    """Add up noise by its scalars: ``(1/P) sum_p scalars[p] u_p``.

    Preconditioning is linear, so it comes after the sum, once instead of P times. The sum
    runs in the order of p and every product is rounded on its own, so that all parties,
    whatever program they compile, reach the same bits.

    Args:
      scalars: float32 [P].
      noise: p -> u_p.
      like: name -> array; gives names and shapes.

    Returns:
      name -> float32 array.
    """
    weights = exact.mul(scalars, jnp.float32(1 / scalars.shape[0]))
    # Whatever is multiplied by these stays clear of subnormal numbers.
    weights = jnp.where(jnp.abs(weights) < 2**-60, 0, weights)

    def add(p: jax.Array, total: trees.Leaves) -> trees.Leaves:
        u = noise(p)
        return {n: total[n] + exact.seal(weights[p] * u[n]) for n in total}

    zeros = {n: jnp.zeros(jnp.shape(x), jnp.float32) for n, x in like.items()}
    return lax.fori_loop(0, scalars.shape[0], add, zeros)
