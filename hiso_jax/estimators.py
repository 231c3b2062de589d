"""Losses at a few points in, scalars out; and the gradient estimate the scalars stand for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from hiso_jax import directions
from hiso_jax._engine import exact, trees
from hiso_jax._engine.shapes import Array, Float, Index, Number

Loss = Callable[[trees.Params], Float[Array, "..."]]
"""Parameters -> loss, any shape: one loss, or one per client."""
LossFn = Callable[[trees.Params, trees.Batch], Float[Array, ""]]
"""(params, batch) -> scalar loss, pure; need not be differentiable."""
Direction = Callable[[Index], trees.Leaves]
"""Number of a perturbation -> direction z (or noise u)."""
Estimate = tuple[Float[Array, "*losses"], Float[Array, "P *losses"]]
"""Value and scalars."""
Difference = Callable[[Loss, trees.Params, Direction, int, Number], Estimate]
"""(loss, params, direction, P, smoothing) -> (value [...], scalars [P, ...]); some give 2 P."""
Measured = tuple[Float[Array, ""], Float[Array, "P"]]
"""Value and scalars of one client."""
Sums = tuple[trees.Leaves, trees.Leaves]


class Estimator(NamedTuple):
    """How the losses of a client become its scalars.

    Attributes:
      scalars: ``(loss_fn, params, batch, direction) -> (value, scalars [P] or [2 P])``.
      per_direction: scalars of a direction, 1 or 2; second ones come after all first ones.
      config: as data: ``estimator``, None if it has no name, and ``smoothing``.
    """

    scalars: Callable[[LossFn, trees.Params, trees.Batch, Direction], Measured]
    per_direction: int
    config: Mapping[str, Any]

    def check(self, second: bool) -> None:
        """Raise ValueError unless a direction gives two scalars just where a rule takes two."""
        _fits(self.per_direction, second, self.config.get("estimator"))


def forward_difference(
    loss: Loss,
    params: trees.Params,
    direction: Direction,
    num_perturbations: int,
    smoothing: Number,
    base: Float[Array, "*losses"] | None = None,
) -> Estimate:
    """Estimate directional derivatives with one base loss and P perturbed ones.

    ``scalars[p] = (loss(x + smoothing z_p) - loss(x)) / smoothing`` (HiSo, Eq. 8).
    Costs P + 1 forward passes.

    Args:
      loss: parameters -> loss of any shape [...], float32.
      params: pytree x.
      direction: p -> direction z_p, one at a time, so that only one lives in memory.
      num_perturbations: P.
      smoothing: finite-difference step mu > 0.
      base: the loss at x, if it is known.

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
    base = loss(params) if base is None else base

    def scalar(p: Array) -> Array:
        moved = loss(directions.perturb(params, direction(p), smoothing))
        return ((moved - base) / smoothing).astype(jnp.float32)

    return base, lax.map(scalar, jnp.arange(num_perturbations))


def central_difference(
    loss: Loss,
    params: trees.Params,
    direction: Direction,
    num_perturbations: int,
    smoothing: Number,
) -> Estimate:
    """Estimate directional derivatives with P pairs of perturbed losses.

    ``scalars[p] = (loss(x + smoothing z_p) - loss(x - smoothing z_p)) / (2 smoothing)``
    (MeZO, Definition 1). Costs 2 P forward passes; its error is of second order in smoothing.

    Args and Returns: as `forward_difference`, but the value is the mean of the
    perturbed losses, since none is taken at x itself.
    """

    def scalar(p: Array) -> tuple[Array, Array]:
        z = direction(p)
        up = loss(directions.perturb(params, z, smoothing))
        down = loss(directions.perturb(params, z, -smoothing))
        return (up + down) / 2, ((up - down) / (2 * smoothing)).astype(jnp.float32)

    values, scalars = lax.map(scalar, jnp.arange(num_perturbations))
    return values.mean(0), scalars


def three_point(
    loss: Loss,
    params: trees.Params,
    direction: Direction,
    num_perturbations: int,
    smoothing: Number,
) -> Estimate:
    """Estimate first and second directional derivatives (HiZOO, arXiv 2402.15173).

    ``scalars[p]`` is the central difference, and ``scalars[P + p] = (loss(x + smoothing z_p) +
    loss(x - smoothing z_p) - 2 loss(x)) / smoothing^2``. Costs 2 P + 1 forward passes.

    Args and Returns: as `forward_difference`, but scalars [2 P, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> x, z = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 0.0])}
      >>> value, scalars = three_point(
      ...     lambda x: (x["w"] ** 2).sum(), x, lambda p: z, num_perturbations=1, smoothing=0.5)
      >>> float(value), scalars.tolist()
      (5.0, [2.0, 2.0])
    """
    base = loss(params)

    def pair(p: Array) -> Float[Array, "2 *losses"]:
        z = direction(p)
        up = loss(directions.perturb(params, z, smoothing))
        down = loss(directions.perturb(params, z, -smoothing))
        first, second = (up - down) / (2 * smoothing), (up + down - 2 * base) / smoothing**2
        return jnp.stack([first, second]).astype(jnp.float32)

    pairs = jnp.moveaxis(lax.map(pair, jnp.arange(num_perturbations)), 1, 0)
    return base, pairs.reshape(-1, *pairs.shape[2:])


ESTIMATORS: dict[str, Difference] = {
    "forward": forward_difference,
    "central": central_difference,
    "three_point": three_point,
}
"""By the name in a config."""


def make(
    estimator: str | Difference, num_perturbations: int, smoothing: Number, second: bool = False
) -> Estimator:
    """An estimator along P directions.

    Args:
      estimator: a name of `ESTIMATORS`, or a function as of `Difference`.
      num_perturbations: P.
      smoothing: finite-difference step mu > 0.
      second: whether second differences are wanted.

    Example:
      >>> make(central_difference, 5, 1e-3).config
      {'estimator': 'central', 'smoothing': 0.001}
    """
    difference = get(estimator, second)

    def scalars(
        loss_fn: LossFn, params: trees.Params, batch: trees.Batch, direction: Direction
    ) -> Measured:
        # Closed over, since lazy leaves cannot be arguments; an array, since it may be a float.
        loss = lambda x: jnp.asarray(loss_fn(x, batch))  # noqa: E731
        return difference(loss, params, direction, num_perturbations, smoothing)

    config = {"estimator": name_of(estimator), "smoothing": smoothing}
    return Estimator(scalars, scalars_per_direction(estimator), config)


def from_config(config: Mapping[str, Any]) -> Estimator:
    """Build an estimator again from a config; one of your own only knows its shape."""
    name, smoothing = config.get("estimator", "forward"), config.get("smoothing", 1e-3)
    if name in ESTIMATORS:
        second = scalars_per_direction(name) == 2
        return make(name, int(config["num_perturbations"]), smoothing, second)

    def unknown(*args: Any) -> Any:
        raise ValueError(f"estimator: {name!r} is none of {tuple(ESTIMATORS)}; build the algorithm "
                         "with yours to evaluate clients")  # fmt: skip

    return Estimator(unknown, 1, {"estimator": name, "smoothing": smoothing})


def name_of(estimator: str | Difference) -> str | None:
    """The name of an estimator that a ledger writes down; None if it has none of its own."""
    known = {difference: name for name, difference in ESTIMATORS.items()}
    return estimator if isinstance(estimator, str) else known.get(estimator) or called(estimator)


def called(function: Callable[..., Any]) -> str | None:
    """The name of a function, unless others may have the same: a lambda, one inside of another.

    Example:
      >>> called(called), called(lambda x: x)
      ('called', None)
    """
    name = getattr(function, "__qualname__", "<")
    return None if "<" in name else name


def scalars_per_direction(estimator: str | Difference) -> int:
    """How many scalars a direction gives: 2 of `three_point`, else 1."""
    return 2 if estimator in ("three_point", three_point) else 1


def forward_passes(estimator: str | Difference, num_perturbations: int) -> int:
    """Forward passes of a local step: P + 1, 2 P, or 2 P + 1.

    Example:
      >>> forward_passes("forward", 5), forward_passes("three_point", 5)
      (6, 11)
    """
    name = name_of(estimator)
    sides, base = 1 if name == "forward" else 2, name != "central"
    return sides * num_perturbations + base


def get(estimator: str | Difference, second: bool = False) -> Difference:
    """Return an estimator by name, or the function itself.

    Raises:
      ValueError: there is none of that name, or it gives second differences and they are not
        wanted, or the reverse.
    """
    if not callable(estimator) and estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator: expected one of {tuple(ESTIMATORS)} or a function, got {estimator!r}"
        )
    _fits(scalars_per_direction(estimator), second, estimator)
    return estimator if callable(estimator) else ESTIMATORS[estimator]


def _fits(per_direction: int, second: bool, estimator: Any) -> None:
    if second != (per_direction == 2):
        raise ValueError('estimator: expected "three_point" for a rule that takes second '
                         f"differences and for nothing else, got {estimator!r}")  # fmt: skip


def reconstruct(
    scalars: Float[Array, "P"],
    noise: Direction,
    like: Mapping[str, Array],
    seconds: Float[Array, "P"] | None = None,
) -> Any:
    """Add up noise by its scalars: ``(1/P) sum_p scalars[p] u_p``.

    Preconditioning is linear, so it comes after the sum, once instead of P times. The sum
    runs in the order of p and every product is rounded on its own, so that all parties,
    whatever program they compile, reach the same bits.

    Args:
      scalars: float32 [P].
      noise: p -> u_p.
      like: name -> array; gives names and shapes.
      seconds: float32 [P], if ``(1/P) sum_p seconds[p] u_p^2`` is wanted too.

    Returns:
      name -> float32 array; with `seconds` a pair of them.
    """

    def weights(scalars: Float[Array, "P"]) -> Float[Array, "P"]:
        shares = exact.mul(scalars, jnp.float32(1 / scalars.shape[0]))
        # Whatever is multiplied by these stays clear of subnormal numbers.
        return jnp.where(jnp.abs(shares) < 2**-60, 0, shares)

    of_noise = weights(scalars)
    of_squares = None if seconds is None else weights(seconds)

    def add(p: Array, totals: Sums) -> Sums:
        u, (sums, squares) = noise(p), totals
        sums = {n: sums[n] + exact.no_fma(of_noise[p] * u[n]) for n in sums}
        if of_squares is not None:
            # The square of noise may be tiny, but is then of no weight.
            squares = {
                n: squares[n] + exact.mul(of_squares[p], exact.mul(u[n], u[n])) for n in squares
            }
        return sums, squares

    zeros = {n: jnp.zeros(jnp.shape(x), jnp.float32) for n, x in like.items()}
    zero = (zeros, {} if of_squares is None else zeros)
    sums, squares = lax.fori_loop(0, scalars.shape[0], add, zero)
    return sums if of_squares is None else (sums, squares)
