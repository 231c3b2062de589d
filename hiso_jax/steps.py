"""What a record does to a run of elements: the one place where anything moves.

`advance` takes a whole round on named arrays, be they leaves or parts of them: rules work
element by element. `hiso_jax.layout` maps it over the blocks of a model, for everybody's step and
for a client's own; `hiso_jax.replay` scans it over the rounds of a ledger, block by block; the
optax face takes one `move`. They reach the same bits because they are the same code.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax import estimators, rules
from hiso_jax._engine import exact, trees

Cast = Callable[[trees.Leaves], trees.Leaves]
"""Wide arrays (see `hiso_jax.exact.wide`) -> arrays of the leaves' own dtypes."""


def admit(record: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a record as everybody computes with it, and whether it is usable.

    One of NaN, a round that nobody answered, is zeros and not usable.

    Args:
      record: float32 [K, P].
    """
    usable = jnp.isfinite(record).all()
    # Without the barrier the scalars may be computed anew, and differently, where used.
    record = lax.optimization_barrier(jnp.where(usable, record, 0))
    return exact.no_fma(record), usable


def ascent(
    rule: rules.Rule,
    state: Any,
    scalars: jax.Array,
    noise: estimators.Direction,
    like: Mapping[str, jax.Array],
) -> Any:
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
    entered: Any,
    state: Any,
    scalars: jax.Array,
    noise: estimators.Direction,
    like: Mapping[str, jax.Array],
    last: Any,
) -> tuple[trees.Leaves, Any]:
    """Return the descent step of a local step's scalars, without learning rate, and the new state.

    Args:
      rule, scalars, noise, like: as of `ascent`.
      entered: the rule's state that entered the round; directions come from it.
      state: the rule's state so far.
      last: bool: whether it is the round's last local step.
    """
    delta = ascent(rule, entered, scalars, noise, like)
    return rule.update(state, delta, scalars, last)


def local_steps(
    rule: rules.Rule,
    noise: Callable[[Any], estimators.Direction],
    entered: Any,
    leaves: trees.Leaves,
    state: Any,
    record: jax.Array,
    rate: jax.Array,
    is_last: Any = None,
) -> tuple[trees.Leaves, Any]:
    """Take the local steps of a record [K, P]: ``x <- x - rate * move_k`` for k < K.

    Args:
      rule: see `hiso_jax.rules`.
      noise: local step -> perturbation -> u of the leaves.
      entered: the rule's state that entered the round.
      leaves: name -> float32 array; or float64, which keeps its digits and takes the same float32
        shift.
      state: the rule's state so far.
      record: float32 [K, P], as `admit` gives it; [K, 2 P] with second differences.
      rate: learning rate, float32.
      is_last: bool [K]: which is the round's last local step; by default the last of the record.

    Returns:
      The moved leaves and the rule's new state.
    """
    is_last = jnp.arange(len(record)) == len(record) - 1 if is_last is None else is_last

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        (leaves, state), (k, scalars, last) = carry, inputs
        descent, state = descent_of(rule, entered, state, scalars, noise(k), leaves, last)
        shift = {n: exact.mul(rate, descent[n]).astype(x.dtype) for n, x in leaves.items()}
        return (
            {
                n: exact.flush_subnormals(exact.flush_subnormals(x) - shift[n])
                for n, x in leaves.items()
            },
            state,
        ), None

    return lax.scan(step, (leaves, state), (jnp.arange(len(record)), record, is_last))[0]


def advance(
    rule: rules.Rule,
    noise: Callable[[Any], estimators.Direction],
    entered: Any,
    leaves: trees.Leaves,
    state: Any,
    record: tuple[jax.Array, Any],
    rate: jax.Array,
    cast: Cast = lambda wide: wide,
    is_last: Any = None,
) -> tuple[trees.Leaves, Any]:
    """Take a round on leaves of any float dtype.

    Args:
      rule, noise, entered, state, rate, is_last: as of `local_steps`.
      leaves: name -> array.
      record: from `admit`, and whether it is usable; if not, nothing changes.
      cast: see `Cast`.

    Returns:
      The moved leaves and the rule's new state.
    """
    scalars, usable = record
    wide = {name: exact.wide(x) for name, x in leaves.items()}
    ends, new = local_steps(rule, noise, entered, wide, state, scalars, rate, is_last)
    kept = lambda new, old: jnp.where(usable, new, old)  # noqa: E731
    return jax.tree.map(kept, (cast(ends), new), (leaves, state))
