"""What a record does to a run of elements: the one place where anything moves.

`advance` takes a whole round on named arrays, be they leaves or parts of them: rules work element
by element, or say that they do not and get whole leaves. `hiso_jax.layout` maps it over the blocks
of a model, for everybody's step and for a client's own; `hiso_jax.replay` scans it over the rounds
of a ledger, block by block; the optax face takes one `descent_of`. They reach the same bits because
they are the same code.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax import estimators, rules
from hiso_jax._engine import exact, trees
from hiso_jax._engine.shapes import Array, Bool, Float, Index

Cast = Callable[[trees.Leaves], trees.Leaves]
"""Wide arrays (see `hiso_jax.exact.wide`) -> arrays of the leaves' own dtypes."""
Noise = Callable[[Index], estimators.Direction]
"""Local step -> perturbation -> u of the leaves: a `hiso_jax.directions.Noise` at one block."""
Moved = tuple[trees.Leaves, rules.RuleState]
"""Leaves, and the rule's state with them."""


class Round(NamedTuple):
    """What moves leaves in a round; the same for all of them.

    Attributes:
      rule: see `hiso_jax.rules`.
      scalars: float32 [K, P]; [K, 2 P] with second differences.
      usable: if not, nothing changes.
      rate: learning rate, float32.
      is_last: which is the round's last local step; by default the last of the K.
    """

    rule: rules.Rule
    scalars: Float[Array, "K P"]
    usable: Bool[Array, ""]
    rate: Float[Array, ""]
    is_last: Bool[Array, "K"] | None = None


def admit(rule: rules.Rule, record: Float[Array, "K P"], rate: Float[Array, ""]) -> Round:
    """Return the round of a record, with the scalars as everybody computes with them.

    If the record is NaN, since nobody answered, they are zeros and not usable.
    """
    usable = jnp.isfinite(record).all()
    # Without the barrier the scalars may be computed anew, and differently, where used.
    record = lax.optimization_barrier(jnp.where(usable, record, 0))
    return Round(rule, exact.no_fma(record), usable, rate)


def ascent(
    rule: rules.Rule,
    state: rules.RuleState,
    scalars: Float[Array, "P"],
    noise: estimators.Direction,
    like: Mapping[str, Array],
) -> rules.Delta:
    """Return the `delta` that a rule's update takes, made of a local step's scalars.

    Args:
      rule: see `hiso_jax.rules`.
      state: the rule's, that entered the round.
      scalars: float32 [P], or [2 P] if the rule takes second differences.
      noise: perturbation -> u.
      like: name -> array; gives names and shapes.
    """
    # Apart, so that roots are not computed once for x and once more for the rule.
    whiten = lambda total: exact.compiled_alone(rule.direction, state, total)  # noqa: E731
    if not rule.second:
        return whiten(estimators.reconstruct(scalars, noise, like))
    firsts, seconds = jnp.split(scalars, 2)
    total, squares = estimators.reconstruct(firsts, noise, like, seconds)
    return whiten(total), squares


def descent_of(
    rule: rules.Rule,
    entered: rules.RuleState,
    state: rules.RuleState,
    scalars: Float[Array, "P"],
    noise: estimators.Direction,
    like: Mapping[str, Array],
    last: Bool[Array, ""],
) -> Moved:
    """Return the descent step of a local step's scalars, without learning rate, and the new state.

    Args:
      rule, scalars, noise, like: as of `ascent`.
      entered: the rule's state that entered the round; directions come from it.
      state: the rule's state so far.
      last: whether it is the round's last local step.
    """
    delta = ascent(rule, entered, scalars, noise, like)
    return rule.update(state, delta, scalars, last)


def local_steps(
    round: Round,
    noise: Noise,
    entered: rules.RuleState,
    leaves: trees.Leaves,
    state: rules.RuleState,
) -> Moved:
    """Take the local steps of a round: ``x <- x - rate * step_k`` for k < K.

    Args:
      round: see `Round`; whether it is usable is not looked at.
      noise: see `Noise`.
      entered: the rule's state that entered the round.
      leaves: name -> float32 array; or float64, which keeps its digits and takes the same float32
        shift.
      state: the rule's state so far.

    Returns:
      The moved leaves and the rule's new state.
    """
    rule, scalars, rate, is_last = round.rule, round.scalars, round.rate, round.is_last
    numbers = lambda: jnp.arange(len(scalars))  # noqa: E731
    is_last = numbers() == len(scalars) - 1 if is_last is None else is_last

    def moved(x: Array, descent: Array) -> Array:
        shift = exact.mul(rate, descent).astype(x.dtype)
        return exact.flush_subnormals(exact.flush_subnormals(x) - shift)

    def step(carry: Moved, inputs: tuple[Array, Array, Array]) -> tuple[Moved, None]:
        (leaves, state), (k, scalars, last) = carry, inputs
        descent, state = descent_of(rule, entered, state, scalars, noise(k), leaves, last)
        return ({n: moved(x, descent[n]) for n, x in leaves.items()}, state), None

    return lax.scan(step, (leaves, state), (numbers(), scalars, is_last))[0]


def advance(
    round: Round,
    noise: Noise,
    entered: rules.RuleState,
    leaves: trees.Leaves,
    state: rules.RuleState,
    cast: Cast = lambda wide: wide,
) -> Moved:
    """Take a round on leaves of any float dtype.

    Args:
      round, noise, entered, state: as of `local_steps`.
      leaves: name -> array.
      cast: see `Cast`.

    Returns:
      The moved leaves and the rule's new state; as they were if the round is not usable.
    """
    wide = {name: exact.wide(x) for name, x in leaves.items()}
    ends, new = local_steps(round, noise, entered, wide, state)
    keep = lambda new, old: jnp.where(round.usable, new, old)  # noqa: E731
    return jax.tree.map(keep, (cast(ends), new), (leaves, state))
