"""Update rules: how the shared scalars become a step.

A rule is three pure functions over named leaves (see `hiso_jax.trees`):

* ``init(leaves) -> state``
* ``direction(state, noise) -> direction``: precondition the noise u into z, linearly;
* ``update(state, delta, scalars, last) -> (step, state)``: `delta` is the ascent
  direction ``(1/P) sum_p scalars[p] z_p`` rebuilt from the record; the parameters move by
  ``-learning_rate * step``. `scalars` is the record's [P] of this local step, `last` a bool
  array that is True in the round's last local step.

Everything a rule knows comes from the shared key and the record, so any rule keeps
scalar-only communication. All K local steps of a round take their directions from the
state that entered the round.

What makes replay exact, and possible in blocks of a leaf: every function works element by
element on the leaves (numbers that belong to no element come from `scalars` alone), and
uses `hiso_jax.exact` for products and roots. `recipe` names the rule and its arguments, so that
a ledger can build it again; it is a function of `RULES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hiso_jax import checks, exact
from hiso_jax.trees import Leaves


class Rule(NamedTuple):
    """A scalar-only update rule; see the module's docstring for the three functions."""

    init: Callable[[Leaves], Any]
    direction: Callable[[Any, Leaves], Leaves]
    update: Callable[[Any, Leaves, jax.Array, jax.Array], tuple[Leaves, Any]]
    recipe: Mapping[str, Any] | None = None  # {"rule": name, argument: value, ...}


class HisoState(NamedTuple):
    """Curvature estimate of HiSo."""

    curvature: Leaves  # H, float32, one positive number per trainable parameter


def hiso(decay: Any = 0.95, epsilon: Any = 1e-8, update_steps: str = "last") -> Rule:
    """HiSo: noise whitened by a global diagonal curvature estimate (arXiv 2506.02370).

    ``z = u / sqrt(H)`` and, after the round, ``H <- decay H + (1 - decay)(Delta^2 + epsilon)``
    (Eq. 8 and 12, with `decay` the weight of the old value). H starts at 1 and costs one
    float32 per trainable parameter.

    Args:
      decay: weight of the old H, in [0, 1]. 1 keeps H = 1: DeComFL to the bit.
      epsilon: floor of the estimate, >= 0. The paper adds one without naming a value; the
        authors' code adds none.
      update_steps: ``"last"``: only the round's last local step enters H (the authors'
        default); ``"all"``: every local step does, in order.
    """
    checks.number("decay", decay, 0, 1)
    checks.number("epsilon", epsilon, 0)
    checks.choice("update_steps", update_steps, ("last", "all"))

    def init(leaves: Leaves) -> HisoState:
        return HisoState(
            curvature={n: jnp.ones_like(x, dtype=jnp.float32) for n, x in leaves.items()}
        )

    def direction(state: HisoState, noise: Leaves) -> Leaves:
        return {n: exact.mul(u, exact.rsqrt(state.curvature[n])) for n, u in noise.items()}

    def update(
        state: HisoState, delta: Leaves, scalars: jax.Array, last: jax.Array
    ) -> tuple[Leaves, HisoState]:
        del scalars
        enters = last if update_steps == "last" else jnp.ones_like(last)

        def average(h: jax.Array, d: jax.Array) -> jax.Array:
            new = exact.mul(decay, h) + exact.mul(1 - decay, exact.mul(d, d) + epsilon)
            return jnp.where(enters, exact.flush(new), h)

        return delta, HisoState({n: average(h, delta[n]) for n, h in state.curvature.items()})

    recipe = dict(rule="hiso", decay=decay, epsilon=epsilon, update_steps=update_steps)
    return Rule(init, direction, update, recipe)


def identity() -> Rule:
    """No preconditioner: DeComFL (arXiv 2405.15861), and ZO-SGD / MeZO on one machine."""
    return Rule(
        init=lambda leaves: (),
        direction=lambda state, noise: noise,
        update=lambda state, delta, scalars, last: (delta, state),
        recipe=dict(rule="identity"),
    )


RULES: dict[str, Callable[..., Rule]] = {"hiso": hiso, "identity": identity}
"""By the name in a recipe."""


def from_recipe(recipe: Mapping[str, Any]) -> Rule:
    """Build a rule again from ``rule.recipe``.

    Raises:
      ValueError: no rule of that name, or arguments it does not take.

    Example:
      >>> from_recipe(hiso(decay=0.9).recipe).recipe["decay"]
      0.9
    """
    arguments = dict(recipe)
    name = arguments.pop("rule", None)
    if name not in RULES:
        raise ValueError(f"recipe: expected a rule of {tuple(RULES)}, got {name!r}")
    try:
        return RULES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"recipe: rule {name!r}: {error}") from None
