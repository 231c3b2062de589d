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
            rate = Rate(learning_rate)(state.count)
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
    """Turn losses into an ascent step by any rule; chain it with what should follow.

    Args: as `hiso`.

    Example:
      >>> import hiso_jax as hj, optax
      >>> tx = optax.chain(
      ...     hj.scale_by_zeroth_order(hj.rules.hiso()),
      ...     optax.add_decayed_weights(1e-4),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
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
    """HiSo on one machine, as an optax transformation (arXiv 2506.02370).

    The same numbers as `hiso_jax.federated_hiso` with one client and one local step.
    Composes with ``optax.chain`` (first in it), schedules and ``inject_hyperparams`` (with
    ``static_args=("num_perturbations",)``). For what needs a gradient tree (``optax.partition``,
    ``MultiSteps``, ``apply_if_finite``) use `value_and_grad`.

    Args:
      learning_rate: float, or optax schedule of the update count.
      num_perturbations: P >= 1; an update costs P + 1 forward passes (``"central"``: 2 P).
      smoothing: finite-difference step mu > 0.
      decay, epsilon: of the curvature average, see `hiso_jax.rules.hiso`.
      estimator: ``"forward"``, ``"central"`` or a function.
      distribution: ``"normal"``, ``"near_normal"`` or ``"rademacher"``; see
        `hiso_jax.directions.draw`.
      trainable: mask as in `hiso_jax.trees.select`; updates of other leaves are zero.
      seed: of the noise.

    Returns:
      A transformation whose update is called ``tx.update(None, state, params,
      value_fn=value_fn)`` with ``value_fn(params) -> float32 scalar``. The loss at hand is
      ``state.value``.

    Example:
      >>> import hiso_jax as hj, jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(3)}
      >>> value_fn = lambda params: (params["w"] ** 2).sum()
      >>> tx = hj.hiso(0.1)
      >>> opt_state = tx.init(params)
      >>> updates, opt_state = tx.update(None, opt_state, params, value_fn=value_fn)
      >>> params = optax.apply_updates(params, updates)
      >>> float(opt_state.value)
      3.0
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
    """Zeroth-order SGD; with its defaults, MeZO (arXiv 2305.17333). Args: as `hiso`."""
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

    The estimate ``(1/P) sum_p scalar_p u_p`` is unbiased for the gradient of the smoothed
    loss and feeds any optax chain: adam, partition, MultiSteps, apply_if_finite.

    Args: as `hiso`, and `loss_fn(params, batch) -> float32 scalar`, which need not be
      differentiable.

    Returns:
      ``(params, batch, key) -> (value, grads)``; use a new key for every call. `grads` has
      the structure and dtypes of `params`; leaves that are not trainable get zeros.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> loss_fn = lambda params, batch: ((params["w"] - batch) ** 2).sum()
      >>> value, grads = hj.value_and_grad(loss_fn, num_perturbations=8)(
      ...     {"w": jnp.zeros(3)}, jnp.ones(3), jax.random.key(0))
      >>> float(value), grads["w"].shape
      (3.0, (3,))
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
