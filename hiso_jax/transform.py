"""The optax face: zeroth-order updates for one machine, from loss values alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hiso_jax import directions, estimators, rules, steps
from hiso_jax._engine import checks, exact, trees
from hiso_jax._engine.shapes import Array, Float, Index, Integer, SomeKey, UInt32
from hiso_jax.protocol import LossFn, Rate

ValueFn = Callable[[trees.Params], Float[Array, ""]]
"""params -> scalar loss, as in ``optax.lbfgs``."""
GradFn = Callable[
    [trees.Params, trees.Batch, SomeKey],
    tuple[Float[Array, ""], trees.Params],
]
"""(params, batch, key) -> (loss, gradient)."""


class ZerothOrderState(NamedTuple):
    """State of `hiso`, `zo_sgd` and `scale_by_zeroth_order`."""

    count: Integer[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]  # updates made
    key: UInt32[Array, "2"]  # root PRNG key data, never changes
    value: Float[Array, ""]  # the loss last seen
    rule: rules.RuleState  # the rule's state


def _transform(
    learning_rate: optax.ScalarOrSchedule | None,
    rule: rules.Rule,
    num_perturbations: int,
    smoothing: float,
    estimator: str | estimators.Difference,
    distribution: str,
    trainable: trees.Trainable,
    seed: Index,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation; with a learning rate of None it gives the ascent step."""
    if learning_rate is not None and not callable(learning_rate):
        checks.number("learning_rate", learning_rate, 0)
    perturbations = checks.count("num_perturbations", num_perturbations)
    checks.number("smoothing", smoothing, 0, above=True)
    noise_law = directions.check_distribution(distribution)
    estimate = estimators.get(estimator, rule.second)
    schedule = Rate(learning_rate)

    def init(params: trees.Params) -> ZerothOrderState:
        return ZerothOrderState(
            count=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
            value=jax.device_put(np.float32(np.nan)),  # computed, debug modes would refuse it
            rule=rule.init(trees.select(params, trainable)),
        )

    def update(
        updates: optax.Updates | None,
        state: Any,
        params: trees.Params | None = None,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ZerothOrderState]:
        del extra
        if updates is not None:
            raise ValueError(
                "updates: expected None, since zeroth order takes no gradients; put this "
                "transformation first in optax.chain, or use hj.value_and_grad"
            )
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(f"{missing}: needed, call update(None, state, params, value_fn=...)")
        checks.loss(jax.eval_shape(value_fn, params))
        leaves = trees.select(params, trainable)
        key = directions.as_key(state.key)

        def noise(p: Index) -> trees.Leaves:
            at = directions.direction_key(key, state.count, 0, p)
            return directions.noise(at, leaves, noise_law)

        direction = lambda p: rule.direction(state.rule, noise(p))  # noqa: E731
        loss = lambda x: jnp.asarray(value_fn(x))  # noqa: E731  # a Python float, say
        value, scalars = estimate(loss, params, direction, perturbations, smoothing)
        scalars = exact.no_fma(jax.lax.optimization_barrier(scalars))
        step, rule_state = steps.descent_of(
            rule, state.rule, state.rule, scalars, noise, leaves, jnp.bool_(True)
        )
        if learning_rate is not None:
            rate = schedule(state.count)
            keys = directions.rounding_keys(key, state.count, list(leaves))

            def moves(number: int, x: Array, step: Array) -> Array:
                wide, shift = exact.wide(x), exact.mul(rate, step)
                # The plain product, so that nothing is lost in adding and subtracting x.
                if wide.dtype == x.dtype:
                    return -shift
                rounded = directions.round_to(keys[number], wide - shift, x.dtype)
                return rounded.astype(wide.dtype) - wide

            step = {n: moves(i, x, step[n]) for i, (n, x) in enumerate(leaves.items())}
        new_updates = trees.merge(
            jax.tree.map(jnp.zeros_like, params),
            {n: step[n].astype(x.dtype) for n, x in leaves.items()},
        )
        return new_updates, ZerothOrderState(
            count=state.count + 1, key=state.key, value=value.astype(jnp.float32), rule=rule_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_zeroth_order(
    rule: rules.Rule,
    *,
    num_perturbations: int = 5,
    smoothing: float = 1e-3,
    estimator: str | estimators.Difference = "forward",
    distribution: str = directions.DEFAULT,
    trainable: trees.Trainable = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Replace updates by an ascent step made of losses, by any rule.

    The building block of `hiso` and `zo_sgd`: put it first in a chain, and what should follow
    behind it.

    Examples:
      >>> import hiso_jax as hj, optax
      >>> tx = optax.chain(
      ...     hj.scale_by_zeroth_order(hj.rules.hiso()),
      ...     optax.add_decayed_weights(1e-4),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )

    Args:
      rule: How scalars become a step, see `hiso_jax.rules`.
      num_perturbations: Number of directions P of an update, as of `hiso`.
      smoothing: Length of the finite difference mu, as of `hiso`.
      estimator: ``"forward"``, ``"central"`` or a function, as of `hiso`.
      distribution: Of the directions' elements, as of `hiso`.
      trainable: Mask of the leaves that move, as of `hiso`.
      seed: Of the noise.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``, called as that of `hiso`.
    """
    return _transform(
        None, rule, num_perturbations, smoothing, estimator, distribution, trainable, seed
    )


def hiso(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_perturbations: int = 5,
    smoothing: float = 1e-3,
    decay: float = 0.95,
    epsilon: float = 1e-8,
    estimator: str | estimators.Difference = "forward",
    distribution: str = directions.DEFAULT,
    trainable: trees.Trainable = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """HiSo: zeroth-order descent along directions that are scaled by a running estimate.

    The loss is evaluated at the parameters x and a little way along P random directions; no
    gradient is computed, so memory is that of evaluation. With u_p drawn anew for every update,
    H one positive number per parameter that starts at 1, mu the smoothing and eta the learning
    rate::

      z_p   <- u_p / sqrt(H)
      g_p   <- (f(x + mu z_p) - f(x)) / mu
      Delta <- (1/P) sum_p g_p z_p
      x     <- x - eta Delta
      H     <- decay H + (1 - decay) (Delta^2 + epsilon)

    The numbers are those of `hiso_jax.federated_hiso` with one client and one local step.
    It composes with ``optax.chain`` (first in it), schedules and ``inject_hyperparams`` (with
    ``static_args=("num_perturbations",)``). For what needs a gradient tree (``optax.partition``,
    ``MultiSteps``, ``apply_if_finite``) use `value_and_grad`.

    Examples:
      >>> import hiso_jax as hj, jax.numpy as jnp, optax
      >>> def f(params): return (params["w"] ** 2).sum()  # simple quadratic function
      >>> solver = hj.hiso(learning_rate=0.01, num_perturbations=10)
      >>> params = {"w": jnp.array([1., 2., 3.])}
      >>> opt_state = solver.init(params)
      >>> for _ in range(3):
      ...     updates, opt_state = solver.update(None, opt_state, params, value_fn=f)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(f(params) < opt_state.value < 14)
      True

    References:
      Li et al, `Converge Faster, Talk Less: Hessian-Informed Federated Zeroth-Order Optimization
      <https://arxiv.org/abs/2506.02370>`_, 2025

    Args:
      learning_rate: A global scaling factor, either fixed or evolving along iterations with a
        schedule, see ``optax.scale_by_learning_rate``.
      num_perturbations: Number of directions P >= 1; an update costs P + 1 forward passes
        (``"central"``: 2 P).
      smoothing: Length of the finite difference mu > 0.
      decay: Weight of the old estimate, see `hiso_jax.rules.hiso`.
      epsilon: A small constant added to the squared steps.
      estimator: ``"forward"``, ``"central"`` or a function.
      distribution: ``"normal"``, ``"near_normal"`` or ``"rademacher"``; see
        `hiso_jax.directions.draw`.
      trainable: Mask as in `hiso_jax.trees.select`; updates of other leaves are zero.
      seed: Of the noise.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``. Its update is called as
      ``update(None, state, params, value_fn=value_fn)`` with ``value_fn(params) -> float32
      scalar``. The loss at hand is ``state.value``.

    Raises:
      ValueError: An option is out of its range; or, of the update, gradients are given.
    """
    rule = rules.hiso(decay, epsilon)
    return _transform(
        learning_rate, rule, num_perturbations, smoothing, estimator, distribution, trainable, seed
    )


def zo_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_perturbations: int = 1,
    smoothing: float = 1e-3,
    estimator: str | estimators.Difference = "central",
    distribution: str = directions.DEFAULT,
    trainable: trees.Trainable = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Zeroth-order stochastic gradient descent; with its defaults, MeZO.

    With u_p drawn anew for every update, mu the smoothing and eta the learning rate::

      g_p <- (f(x + mu u_p) - f(x - mu u_p)) / (2 mu)
      x   <- x - (eta / P) sum_p g_p u_p

    Examples:
      >>> import hiso_jax as hj, jax.numpy as jnp, optax
      >>> def f(params): return (params["w"] ** 2).sum()  # simple quadratic function
      >>> solver = hj.zo_sgd(optax.linear_schedule(0.05, 0.0, 10), num_perturbations=8)
      >>> params = {"w": jnp.array([1., 2., 3.])}
      >>> opt_state = solver.init(params)
      >>> updates, opt_state = solver.update(None, opt_state, params, value_fn=f)
      >>> bool(f(optax.apply_updates(params, updates)) < 14)
      True

    References:
      Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
      <https://arxiv.org/abs/2305.17333>`_, 2023

    Args:
      learning_rate: A global scaling factor, either fixed or evolving along iterations with a
        schedule, see ``optax.scale_by_learning_rate``.
      num_perturbations: Number of directions P of an update, as of `hiso`.
      smoothing: Length of the finite difference mu, as of `hiso`.
      estimator: ``"forward"``, ``"central"`` or a function, as of `hiso`.
      distribution: Of the directions' elements, as of `hiso`.
      trainable: Mask of the leaves that move, as of `hiso`.
      seed: Of the noise.

    Returns:
      The corresponding ``optax.GradientTransformationExtraArgs``, called as that of `hiso`.
    """
    rule = rules.identity()
    return _transform(
        learning_rate, rule, num_perturbations, smoothing, estimator, distribution, trainable, seed
    )


def value_and_grad(
    loss_fn: LossFn,
    *,
    num_perturbations: int = 5,
    smoothing: float = 1e-3,
    estimator: str | estimators.Difference = "forward",
    distribution: str = directions.DEFAULT,
    trainable: trees.Trainable = None,
) -> GradFn:
    """Like ``jax.value_and_grad``, but the gradient is estimated from losses alone.

    The estimate ``(1/P) sum_p g_p u_p`` is unbiased for the gradient of the smoothed loss and
    feeds any optax chain: adam, partition, MultiSteps, apply_if_finite.

    Examples:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> def f(params, batch): return ((params["w"] - batch) ** 2).sum()
      >>> value, grads = hj.value_and_grad(f, num_perturbations=8)(
      ...     {"w": jnp.zeros(3)}, jnp.ones(3), jax.random.key(0))
      >>> float(value), grads["w"].shape
      (3.0, (3,))

    References:
      Nesterov and Spokoiny, `Random Gradient-Free Minimization of Convex Functions
      <https://doi.org/10.1007/s10208-015-9296-2>`_, 2017

    Args:
      loss_fn: A function of (params, batch) that returns a float32 scalar; it need not be
        differentiable.
      num_perturbations: Number of directions P of an estimate, as of `hiso`.
      smoothing: Length of the finite difference mu, as of `hiso`.
      estimator: ``"forward"``, ``"central"`` or a function, as of `hiso`.
      distribution: Of the directions' elements, as of `hiso`.
      trainable: Mask of the leaves that get an estimate, as of `hiso`.

    Returns:
      A function ``(params, batch, key) -> (value, grads)``; use a new key for every call. `grads`
      has the structure and dtypes of `params`; leaves that are not trainable get zeros.
    """
    perturbations = checks.count("num_perturbations", num_perturbations)
    checks.number("smoothing", smoothing, 0, above=True)
    noise_law = directions.check_distribution(distribution)
    estimate = estimators.get(estimator)

    def estimated(
        params: trees.Params, batch: trees.Batch, key: SomeKey
    ) -> tuple[Float[Array, ""], trees.Params]:
        key = directions.as_key(key)
        checks.loss(jax.eval_shape(loss_fn, params, batch))
        leaves = trees.select(params, trainable)

        def direction(p: Index) -> trees.Leaves:
            return directions.noise(directions.direction_key(key, 0, 0, p), leaves, noise_law)

        value, scalars = estimate(
            lambda x: jnp.asarray(loss_fn(x, batch)),
            params,
            direction,
            perturbations,
            smoothing,
        )
        delta = estimators.reconstruct(scalars, direction, leaves)
        return value, trees.merge(
            jax.tree.map(jnp.zeros_like, params),
            {n: delta[n].astype(x.dtype) for n, x in leaves.items()},
        )

    return estimated
