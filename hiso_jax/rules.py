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

A rule whose `second` is true goes with ``estimator="three_point"``: its record has 2 P
scalars, and `delta` is the pair of the ascent direction, made of the first P, and of
``(1/P) sum_p scalars[P + p] u_p^2`` with the noise as drawn.

Where `carried` is false, clients with several local steps need no copy of the state.

What makes replay exact, and possible in blocks of a leaf: every function works element by
element on the leaves (numbers that belong to no element come from `scalars` alone), and
uses `hiso_jax.exact` for products, quotients, roots and sums of scalars. `config` names the rule
and its arguments, so that a ledger can build it again; its ``rule`` is a key of `RULES`.

A rule that looks at more than one element at a time, as one with a norm or a matrix product does,
says so with `elementwise` false. It is then given all leaves at once and whole, in more memory,
and is replayed by `hiso_jax.Algorithm.replay` only, not in blocks.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hiso_jax._engine import checks, elementwise, exact, renamed
from hiso_jax._engine.shapes import Array, Bool, Float, Number
from hiso_jax._engine.trees import Leaves

RuleState = Any
"""A rule's state: any pytree; see `Rule.init`."""
Delta = Any
"""Leaves; a pair of them for a rule that takes second differences."""
_LARGE = 2.0**120  # an infinite average would stay, and has no root


class Rule(NamedTuple):
    """A scalar-only update rule; see the module's docstring for the three functions."""

    init: Callable[[Leaves], RuleState]
    direction: Callable[[RuleState, Leaves], Leaves]
    update: Callable[
        [RuleState, Delta, Float[Array, "P"], Bool[Array, ""]], tuple[Leaves, RuleState]
    ]
    config: Mapping[str, Any] | None = None  # {"rule": name, argument: value, ...}
    second: bool = False  # whether it takes second differences too
    carried: bool = True  # whether the step of `update` depends on the state given to it
    elementwise: bool = True  # else it is given all leaves at once, whole
    recipe = renamed.attribute("recipe", "config")


Rule.__new__ = renamed.arguments(recipe="config")(Rule.__new__)  # pyright: ignore


def check(rule: Rule) -> Rule:
    """Return a rule that works element by element, or says that it does not.

    Leaves are worked on in packs and in blocks. What a rule found out about a whole leaf there
    would be of something else, without any error.

    Raises:
      ValueError: it looks at more than one element at a time, but for `elementwise`; or its
        config names a rule of `RULES`, and its functions are not that one's.
    """
    if (rule.config or {}).get("rule") in RULES:
        code = lambda r: [getattr(f, "__code__", f) for f in (r.init, r.direction, r.update)]  # noqa: E731
        if code(rule) != code(from_config(rule.config or {})):
            raise ValueError(f"rule: functions of yours under the name {rule.config}, by which a "
                             "ledger builds another; give config={'rule': a new name}")  # fmt: skip
        return rule
    if not rule.elementwise:
        return rule
    leaves = {"leaf": jax.ShapeDtypeStruct((101, 103), jnp.float32)}
    scalars = jax.ShapeDtypeStruct((4 if rule.second else 2,), jnp.float32)
    state, last = jax.eval_shape(rule.init, leaves), jax.ShapeDtypeStruct((), bool)
    delta = (leaves, leaves) if rule.second else leaves
    for name, function, given in (
        ("direction", rule.direction, (state, leaves)),
        ("update", rule.update, (state, delta, scalars, last)),
    ):
        if found := elementwise.mixing(101 * 103, function, *given):
            raise ValueError(
                f"rule: its {name} looks at more than one element of a leaf at a time ({found}), "
                "and would be given packs and blocks of leaves; say Rule(..., elementwise=False)"
            )
    return rule


class HisoState(NamedTuple):
    """Curvature estimate of HiSo and HiZOO."""

    curvature: Leaves  # H, float32, one positive number per trainable parameter


def hiso(decay: Number = 0.95, epsilon: Number = 1e-8, update_steps: str = "last") -> Rule:
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
    decay = checks.number("decay", decay, 0, 1)
    epsilon = checks.number("epsilon", epsilon, 0)
    checks.choice("update_steps", update_steps, ("last", "all"))

    def update(
        state: HisoState, delta: Leaves, scalars: Float[Array, "P"], last: Bool[Array, ""]
    ) -> tuple[Leaves, HisoState]:
        del scalars
        enters = last if update_steps == "last" else jnp.ones_like(last)

        def average(h: Array, d: Array) -> Array:
            new = exact.mul(decay, h) + exact.mul(1 - decay, exact.mul(d, d) + epsilon)
            return jnp.where(enters, exact.flush_subnormals(new), h)

        return delta, HisoState({n: average(h, delta[n]) for n, h in state.curvature.items()})

    config = dict(rule="hiso", decay=decay, epsilon=epsilon, update_steps=update_steps)
    return Rule(_ones, _whitened, update, config, carried=False)


def identity() -> Rule:
    """No preconditioner: DeComFL (arXiv 2405.15861), and ZO-SGD / MeZO on one machine."""
    return Rule(
        init=lambda leaves: (),
        direction=lambda state, noise: noise,
        update=lambda state, delta, scalars, last: (delta, state),
        config=dict(rule="identity"),
    )


class ScaleState(NamedTuple):
    """A running average of one number a step."""

    square: Float[Array, ""]
    weight: Float[Array, ""]  # 1 - decay^steps, what the average has seen


def _normalized(
    square: Callable[[Float[Array, "P"]], Float[Array, ""]], decay: Number, name: str
) -> Rule:
    """Divide the step by the root of a running average of a number made of the scalars."""
    decay = checks.number("decay", decay, 0, 1, below=True)

    def update(
        state: ScaleState, delta: Leaves, scalars: Float[Array, "P"], last: Bool[Array, ""]
    ) -> tuple[Leaves, ScaleState]:
        del last
        average = lambda old, new: exact.mul(decay, old) + exact.mul(1 - decay, new)  # noqa: E731
        state = ScaleState(
            average(state.square, jnp.minimum(square(scalars), _LARGE)),
            average(state.weight, jnp.float32(1)),
        )
        # 1 / sqrt(square / weight), the root of the average free of its start at zero. Below
        # 2^-60, where all scalars are, nothing is left to normalize.
        mean = exact.mul(state.square, exact.reciprocal(jnp.maximum(state.weight, 2.0**-60)))
        scale = exact.rsqrt(jnp.maximum(mean, 2.0**-60))
        return {n: exact.mul(scale, d) for n, d in delta.items()}, state

    init = lambda leaves: ScaleState(_zero(), _zero())  # noqa: E731
    return Rule(init, lambda state, u: u, update, dict(rule=name, decay=decay))


def rms(decay: Number = 0.99) -> Rule:
    """DeComFL's step over the running root mean square of its scalars.

    ``v <- decay v + (1 - decay) mean_p(g_p^2)``, ``step = Delta / sqrt(v / (1 - decay^t))``. One
    float of state: the control for HiSo, whose H may be little more than this number in every
    element.

    Args:
      decay: weight of the old average, in [0, 1).
    """

    def square(scalars: Float[Array, "P"]) -> Float[Array, ""]:
        return exact.mul(exact.total(exact.mul(scalars, scalars)), 1 / scalars.shape[0])

    return _normalized(square, decay, "rms")


def meazo(decay: Number = 0.99) -> Rule:
    """MEAZO: one adaptive number instead of one a parameter (arXiv 2605.03869).

    ``v <- decay v + (1 - decay) (mean_p g_p)^2``, ``step = Delta / sqrt(v / (1 - decay^t))``: as
    `rms`, but of the mean scalar, whose square is P times smaller in expectation. The paper's
    small constant under the root is 2^-60 here.

    Args:
      decay: weight of the old average, in [0, 1).
    """

    def square(scalars: Float[Array, "P"]) -> Float[Array, ""]:
        mean = exact.mul(exact.total(scalars), 1 / scalars.shape[0])
        return exact.mul(mean, mean)

    return _normalized(square, decay, "meazo")


def fzoo() -> Rule:
    """FZOO: the step over the standard deviation of the perturbed losses (arXiv 2506.09034).

    ``step = Delta / std_p(g_p)``, with P - 1 under the root. The perturbed losses are
    ``f(x) + smoothing g_p``, so the paper's learning rate is ours times the smoothing. Meant for
    ``distribution="rademacher"`` and ``estimator="forward"``.

    Raises:
      ValueError: at the first update, with fewer than two perturbations.
    """

    def update(
        state: tuple[()], delta: Leaves, scalars: Float[Array, "P"], last: Bool[Array, ""]
    ) -> tuple[Leaves, tuple[()]]:
        del last
        if (count := scalars.shape[0]) < 2:
            raise ValueError("num_perturbations: fzoo needs at least 2 for a standard deviation")
        mean = exact.mul(exact.total(scalars), 1 / count)
        off = scalars - mean
        variance = exact.mul(exact.total(exact.mul(off, off)), 1 / (count - 1))
        scale = exact.rsqrt(jnp.clip(variance, 2.0**-60, _LARGE))
        return {n: exact.mul(scale, d) for n, d in delta.items()}, state

    return Rule(lambda leaves: (), lambda state, u: u, update, dict(rule="fzoo"))


def hizoo(decay: Number = 1 - 1e-6) -> Rule:
    """HiZOO: noise whitened by second differences of the loss (arXiv 2402.15173).

    ``z = u / sqrt(H)`` and, after every local step, with ``c_p`` the second directional
    derivative along ``z_p``, ``H <- decay H + (1 - decay) |mean_p(c_p u_p^2) / 2| H``. H starts at
    1. Two scalars a direction and 2 P + 1 forward passes: use ``estimator="three_point"``.

    Args:
      decay: weight of the old H, in [0, 1]; 1 less the paper's smoothing alpha.
    """
    decay = checks.number("decay", decay, 0, 1)

    def update(
        state: HisoState,
        delta: tuple[Leaves, Leaves],
        scalars: Float[Array, "P"],
        last: Bool[Array, ""],
    ) -> tuple[Leaves, HisoState]:
        del scalars, last
        step, seconds = delta

        def average(h: Array, second: Array) -> Array:
            # Ends, since a product of many decays, or of many c, could leave the normal numbers.
            new = jnp.minimum(exact.mul(jnp.abs(exact.mul(0.5, second)), h), _LARGE)
            return jnp.maximum(exact.mul(decay, h) + exact.mul(1 - decay, new), 2.0**-60)

        return step, HisoState({n: average(h, seconds[n]) for n, h in state.curvature.items()})

    return Rule(_ones, _whitened, update, dict(rule="hizoo", decay=decay), True, carried=False)


class MomentumState(NamedTuple):
    """Running sum of ascent directions."""

    trace: Leaves  # float32, one number per trainable parameter


def momentum(decay: Number = 0.9) -> Rule:
    """Heavy-ball momentum on reconstructed directions: ``m <- decay m + Delta``, step m.

    Args:
      decay: weight of the old sum, in [0, 1].
    """
    decay = checks.number("decay", decay, 0, 1)

    def update(
        state: MomentumState, delta: Leaves, scalars: Float[Array, "P"], last: Bool[Array, ""]
    ) -> tuple[Leaves, MomentumState]:
        del scalars, last
        trace = {
            n: exact.flush_subnormals(exact.mul(decay, m) + delta[n])
            for n, m in state.trace.items()
        }
        return trace, MomentumState(trace)

    init = lambda leaves: MomentumState(_zeros(leaves))  # noqa: E731
    return Rule(init, lambda state, u: u, update, dict(rule="momentum", decay=decay))


class AdamState(NamedTuple):
    """Moments of Adam."""

    first: Leaves  # float32, one number per trainable parameter
    second: Leaves
    weights: tuple[Float[Array, ""], Float[Array, ""]]  # 1 - decay^steps of each


def adam(b1: Number = 0.9, b2: Number = 0.999, epsilon: Number = 1e-8) -> Rule:
    """Adam on reconstructed directions, as zeroth-order Adam and AdaMM (arXiv 1910.06513).

    ``m <- b1 m + (1 - b1) Delta``, ``v <- b2 v + (1 - b2) Delta^2``, and the step is
    ``m_hat / (sqrt(v_hat) + epsilon)`` with both free of their start at zero (arXiv 1412.6980).

    Args:
      b1, b2: weights of the old moments, in [0, 1).
      epsilon: in the denominator, > 0.
    """
    b1 = checks.number("b1", b1, 0, 1, below=True)
    b2 = checks.number("b2", b2, 0, 1, below=True)
    epsilon = checks.number("epsilon", epsilon, 0, above=True)

    def update(
        state: AdamState, delta: Leaves, scalars: Float[Array, "P"], last: Bool[Array, ""]
    ) -> tuple[Leaves, AdamState]:
        del scalars, last

        def average(b: Number, old: Array, new: Array) -> Array:
            return exact.flush_subnormals(exact.mul(b, old) + exact.mul(1 - b, new))

        first = {n: average(b1, m, delta[n]) for n, m in state.first.items()}
        second = {n: average(b2, v, exact.mul(delta[n], delta[n])) for n, v in state.second.items()}
        one = jnp.float32(1)
        weights = (average(b1, state.weights[0], one), average(b2, state.weights[1], one))
        fresh = [exact.reciprocal(jnp.maximum(w, 2.0**-60)) for w in weights]

        def step(m: Array, v: Array) -> Array:
            # Zero has no root here; what is below 2^-100 is far below any epsilon.
            root = exact.sqrt(jnp.maximum(exact.mul(v, fresh[1]), 2.0**-100))
            return exact.mul(exact.mul(m, fresh[0]), exact.reciprocal(root + epsilon))

        steps = {n: step(m, second[n]) for n, m in first.items()}
        return steps, AdamState(first, second, weights)

    def init(leaves: Leaves) -> AdamState:
        return AdamState(_zeros(leaves), _zeros(leaves), (_zero(), _zero()))

    config = dict(rule="adam", b1=b1, b2=b2, epsilon=epsilon)
    return Rule(init, lambda state, u: u, update, config)


def _whitened(state: HisoState, noise: Leaves) -> Leaves:
    return {n: exact.mul(u, exact.rsqrt(state.curvature[n])) for n, u in noise.items()}


def _zero() -> Float[Array, ""]:
    # A buffer of its own each time, since states are donated.
    return jnp.zeros((), jnp.float32)


def _zeros(leaves: Leaves) -> Leaves:
    return {n: jnp.zeros(x.shape, jnp.float32) for n, x in leaves.items()}


def _ones(leaves: Leaves) -> HisoState:
    return HisoState({n: jnp.ones(x.shape, jnp.float32) for n, x in leaves.items()})


RULES: dict[str, Callable[..., Rule]] = {
    "hiso": hiso,
    "identity": identity,
    "rms": rms,
    "meazo": meazo,
    "fzoo": fzoo,
    "hizoo": hizoo,
    "momentum": momentum,
    "adam": adam,
}
"""By the name in a config."""


def from_config(config: Mapping[str, Any]) -> Rule:
    """Build a rule again from ``rule.config``.

    Raises:
      ValueError: no rule of that name, or arguments it does not take.

    Example:
      >>> from_config(hiso(decay=0.9).config).config["decay"]
      0.9
    """
    arguments = dict(config)
    name = arguments.pop("rule", None)
    if name not in RULES:
        raise ValueError(f"config: expected a rule of {tuple(RULES)}, got {name!r}")
    try:
        return RULES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"config: rule {name!r}: {error}") from None
