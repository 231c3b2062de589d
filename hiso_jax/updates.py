"""What one record does to named leaves: the arithmetic behind `advance` and block replay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax import estimators, exact, rules, trees


def local_step(
    rule: rules.Rule,
    entering: Any,
    noise: estimators.Direction,
    leaves: trees.Leaves,
    rule_state: Any,
    scalars: jax.Array,
    rate: jax.Array,
    last: jax.Array,
) -> tuple[trees.Leaves, Any]:
    """Move float32 leaves by one local step's scalars [P]; clients, server and replay alike.

    Args:
      rule: see `hiso_jax.rules`.
      entering: the rule's state that entered the round; directions come from it.
      noise: p -> u_p of the leaves.
      leaves: name -> float32 array, whole leaves or parts of them.
      rule_state: the rule's state so far.
      scalars: float32 [P].
      rate: learning rate, float32.
      last: bool, True in the round's last local step.

    Returns:
      The moved leaves and the rule's new state.
    """
    delta = rule.direction(entering, estimators.reconstruct(scalars, noise, leaves))
    move, rule_state = rule.update(rule_state, delta, scalars, last)
    moved = {n: exact.flush(exact.flush(x) - exact.mul(rate, move[n])) for n, x in leaves.items()}
    return moved, rule_state


def apply_record(
    rule: rules.Rule,
    noise: Callable[[Any], estimators.Direction],
    leaves: trees.Leaves,
    rule_state: Any,
    record: jax.Array,
    rate: jax.Array,
) -> tuple[trees.Leaves, Any]:
    """Take the K local steps of a finite record [K, P]; `noise` is k -> p -> u.

    The other arguments, and what is returned, as in `local_step`.
    """
    steps = record.shape[0]

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        k, scalars = inputs
        last, (leaves, inner) = k == steps - 1, carry
        return local_step(rule, rule_state, noise(k), leaves, inner, scalars, rate, last), None

    return lax.scan(step, (leaves, rule_state), (jnp.arange(steps), record))[0]
