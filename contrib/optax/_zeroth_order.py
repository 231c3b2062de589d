# Copyright 2026 The hiso_jax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ==============================================================================
"""Zeroth-order optimizers: updates from values of the objective alone.

Implementations of "Fine-Tuning Language Models with Just Forward Passes"
(https://arxiv.org/abs/2305.17333) by Sadhika Malladi et al., and of the update
for one client of HiSo, "Converge Faster, Talk Less"
(https://arxiv.org/abs/2506.02370) by Zhe Li et al.
"""

from typing import Any, Callable, NamedTuple, Optional

import jax
import jax.numpy as jnp
from optax._src import base
from optax._src import combine
from optax._src import numerics
from optax._src import transform
import optax.tree

Sampler = Callable[..., jax.Array]
"""(key, shape, dtype) -> independent numbers of mean zero and variance one."""


class ScaleByZerothOrderState(NamedTuple):
  """State of the zeroth-order transformations.

  Attributes:
    count: number of updates so far.
    key: PRNG key, from which the directions of all updates are derived; it does
      not change.
    value: value of the objective, as the last update has seen it.
    nu: curvature estimate, one positive number per parameter; ``None`` without
      a preconditioner.
  """

  count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
  key: jax.Array
  value: jax.typing.ArrayLike
  nu: Optional[base.Updates]


def _direction(
    key: jax.Array, params: base.Params, nu: Any, sampler: Sampler
) -> base.Updates:
  """Draws a direction in float32, whitened by the curvature, if there is one."""
  noise = optax.tree.random_like(key, params, sampler, dtype=jnp.float32)
  if nu is None:
    return noise
  return jax.tree.map(lambda u, h: u / jnp.sqrt(h), noise, nu)


def _estimate(
    value_fn: Callable[[base.Params], jax.typing.ArrayLike],
    params: base.Params,
    key: jax.Array,
    nu: Any,
    num_perturbations: int,
    smoothing: jax.typing.ArrayLike,
    central: bool,
    sampler: Sampler,
) -> tuple[jax.Array, base.Updates]:
  """Returns the value and the mean over directions of slope times direction."""

  def moved(direction, by):
    return jax.tree.map(
        lambda x, z: (x + by * z).astype(x.dtype), params, direction
    )

  value = None if central else jnp.asarray(value_fn(params))

  def body(carry, p):
    total, seen = carry
    z = _direction(jax.random.fold_in(key, p), params, nu, sampler)
    ahead = jnp.asarray(value_fn(moved(z, smoothing)), jnp.float32)
    if central:
      behind = jnp.asarray(value_fn(moved(z, -smoothing)), jnp.float32)
      slope, here = (ahead - behind) / (2 * smoothing), (ahead + behind) / 2
    else:
      slope, here = (ahead - value) / smoothing, jnp.float32(value)
    total = jax.tree.map(lambda t, d: t + slope * d, total, z)
    return (total, seen + here), None

  zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
  (total, seen), _ = jax.lax.scan(
      body, (zeros, jnp.float32(0)), jnp.arange(num_perturbations)
  )
  return seen / num_perturbations, optax.tree.scale(1 / num_perturbations, total)


def zeroth_order_value_and_grad(
    value_fn: Callable[..., jax.typing.ArrayLike],
    num_perturbations: int = 1,
    smoothing: jax.typing.ArrayLike = 1e-3,
    central: bool = True,
    sampler: Sampler = jax.random.normal,
) -> Callable[..., tuple[jax.Array, base.Updates]]:
  r"""Estimates value and gradient from values of the objective alone.

  A replacement of :func:`jax.value_and_grad` for objectives that cannot, or
  should not, be differentiated: the estimate goes into any optimizer.

  .. math::

    \hat g = \frac{1}{P} \sum_{p=1}^{P}
      \frac{f(\theta + \mu u_p) - f(\theta - \mu u_p)}{2 \mu} \, u_p

  It is unbiased for the gradient of :math:`f` smoothed by :math:`\mu`.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax import contrib
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> estimate = contrib.zeroth_order_value_and_grad(f, num_perturbations=1000)
    >>> params = jnp.array([1., 2., 3.])
    >>> value, grad = estimate(params, jax.random.key(0))
    >>> print(bool(jnp.all(jnp.abs(grad - 2 * params) < 2)))
    True

  References:
    Nesterov and Spokoiny, `Random Gradient-Free Minimization of Convex
    Functions <https://doi.org/10.1007/s10208-015-9296-2>`_, 2017

  Args:
    value_fn: Objective, a function of the parameters and of further arguments
      that returns a scalar.
    num_perturbations: Number of directions :math:`P`.
    smoothing: Length of the finite difference :math:`\mu`.
    central: Whether differences are central, at :math:`2 P` evaluations, or
      forward, at :math:`P + 1`.
    sampler: Of the directions' elements: :func:`jax.random.normal` or
      :func:`jax.random.rademacher`.

  Returns:
    A function of the parameters, a PRNG key, and the further arguments, which
    returns the value of the objective and the estimate.
  """

  def estimate(params, key, *args, **kwargs):
    value, grad = _estimate(
        lambda x: value_fn(x, *args, **kwargs),
        params, key, None, num_perturbations, smoothing, central, sampler,
    )
    return value, jax.tree.map(lambda g, x: g.astype(x.dtype), grad, params)

  return estimate


def scale_by_zeroth_order(
    num_perturbations: int = 1,
    smoothing: jax.typing.ArrayLike = 1e-3,
    central: bool = True,
    decay: Optional[jax.typing.ArrayLike] = None,
    eps: jax.typing.ArrayLike = 1e-8,
    sampler: Sampler = jax.random.normal,
    key: Optional[jax.Array] = None,
) -> base.GradientTransformationExtraArgs:
  """Replaces updates by a zeroth-order estimate of the gradient.

  See :func:`optax.contrib.mezo` and :func:`optax.contrib.hiso`. The incoming
  updates are ignored: put this transformation first in a chain.

  Args:
    num_perturbations: Number of directions of an update.
    smoothing: Length of the finite difference.
    central: Whether differences are central or forward.
    decay: Decay rate of the curvature estimate by which directions are
      whitened; ``None`` for no preconditioner.
    eps: A small constant added to the squares that enter the estimate.
    sampler: Of the directions' elements.
    key: PRNG key; ``None`` for ``jax.random.key(0)``.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` whose update needs
    ``params`` and ``value_fn``.
  """

  def init_fn(params):
    nu = None if decay is None else optax.tree.ones_like(
        params, dtype=jnp.float32
    )
    return ScaleByZerothOrderState(
        count=jnp.zeros([], jnp.int32),
        key=jax.random.key(0) if key is None else key,
        value=jnp.full([], jnp.nan, jnp.float32),
        nu=nu,
    )

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    del updates, extra_args
    if params is None:
      raise ValueError(base.NO_PARAMS_MSG)
    if value_fn is None:
      raise ValueError("value_fn must be provided to a zeroth-order update.")
    value, delta = _estimate(
        value_fn, params, jax.random.fold_in(state.key, state.count), state.nu,
        num_perturbations, smoothing, central, sampler,
    )
    nu = state.nu
    if decay is not None:
      nu = jax.tree.map(
          lambda h, d: decay * h + (1 - decay) * (d**2 + eps), nu, delta
      )
    delta = jax.tree.map(lambda d, x: d.astype(x.dtype), delta, params)
    count_inc = numerics.safe_increment(state.count)
    return delta, ScaleByZerothOrderState(count_inc, state.key, value, nu)

  return base.GradientTransformationExtraArgs(init_fn, update_fn)


def mezo(
    learning_rate: base.ScalarOrSchedule,
    num_perturbations: int = 1,
    smoothing: jax.typing.ArrayLike = 1e-3,
    sampler: Sampler = jax.random.normal,
    key: Optional[jax.Array] = None,
) -> base.GradientTransformationExtraArgs:
  r"""MeZO: stochastic gradient descent by central differences.

  The objective is evaluated a little ahead and a little behind along random
  directions; no gradient is computed, so memory is that of evaluation. For
  :math:`\theta` the parameters, :math:`\eta` the learning rate and
  :math:`\mu` the smoothing,

  .. math::

    \begin{align*}
      u_p &\sim \mathcal{N}(0, I) \\
      g_p &\leftarrow \frac{f(\theta + \mu u_p) - f(\theta - \mu u_p)}{2 \mu} \\
      \theta &\leftarrow \theta - \frac{\eta}{P} \sum_{p=1}^{P} g_p u_p
    \end{align*}

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax import contrib
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> solver = contrib.mezo(learning_rate=0.01, num_perturbations=10)
    >>> params = jnp.array([1., 2., 3.])
    >>> opt_state = solver.init(params)
    >>> for _ in range(5):
    ...  updates, opt_state = solver.update(None, opt_state, params, value_fn=f)
    ...  params = optax.apply_updates(params, updates)
    >>> print(bool(f(params) < 13.0))  # from 14.0
    True

  References:
    Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, 2023

  Args:
    learning_rate: A global scaling factor, either fixed or evolving along
      iterations with a scheduler, see :func:`optax.scale_by_learning_rate`.
    num_perturbations: Number of directions :math:`P` of an update, which
      costs :math:`2 P` evaluations.
    smoothing: Length of the finite difference :math:`\mu`.
    sampler: Of the directions' elements: :func:`jax.random.normal` or
      :func:`jax.random.rademacher`.
    key: PRNG key; ``None`` for ``jax.random.key(0)``.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. Its update
    is called with ``params`` and ``value_fn``, a function of the parameters;
    the incoming updates are ignored and may be ``None``.

  .. seealso:: :func:`optax.contrib.hiso`
  """
  return combine.chain(
      scale_by_zeroth_order(
          num_perturbations, smoothing, sampler=sampler, key=key
      ),
      transform.scale_by_learning_rate(learning_rate),
  )


def hiso(
    learning_rate: base.ScalarOrSchedule,
    num_perturbations: int = 5,
    smoothing: jax.typing.ArrayLike = 1e-3,
    decay: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    sampler: Sampler = jax.random.normal,
    key: Optional[jax.Array] = None,
) -> base.GradientTransformationExtraArgs:
  r"""HiSo: zeroth-order descent along whitened directions.

  As :func:`optax.contrib.mezo` with forward differences, but directions are
  scaled by a running estimate :math:`h` of the squared steps, which starts at
  one. With :math:`\beta` the decay and :math:`\varepsilon` a small constant,

  .. math::

    \begin{align*}
      z_p &\leftarrow u_p / \sqrt{h}, \quad u_p \sim \mathcal{N}(0, I) \\
      g_p &\leftarrow (f(\theta + \mu z_p) - f(\theta)) / \mu \\
      \Delta &\leftarrow \frac{1}{P} \sum_{p=1}^{P} g_p z_p \\
      \theta &\leftarrow \theta - \eta \Delta \\
      h &\leftarrow \beta h + (1 - \beta) (\Delta^2 + \varepsilon)
    \end{align*}

  .. note::
    Measured, the estimate is mostly one number, the size of the steps: the
    method tolerates a wider range of learning rates than plain differences, but
    does not reach better optima where both are tuned.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax import contrib
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> solver = contrib.hiso(learning_rate=0.01, num_perturbations=10)
    >>> params = jnp.array([1., 2., 3.])
    >>> opt_state = solver.init(params)
    >>> for _ in range(5):
    ...  updates, opt_state = solver.update(None, opt_state, params, value_fn=f)
    ...  params = optax.apply_updates(params, updates)
    >>> print(bool(f(params) < 13.0))  # from 14.0
    True

  References:
    Li et al, `Converge Faster, Talk Less: Hessian-Informed Federated
    Zeroth-Order Optimization <https://arxiv.org/abs/2506.02370>`_, 2025

  Args:
    learning_rate: A global scaling factor, either fixed or evolving along
      iterations with a scheduler, see :func:`optax.scale_by_learning_rate`.
    num_perturbations: Number of directions :math:`P` of an update, which
      costs :math:`P + 1` evaluations.
    smoothing: Length of the finite difference :math:`\mu`.
    decay: Exponential decay rate :math:`\beta` of the estimate; 1 keeps it at
      one.
    eps: A small constant :math:`\varepsilon` added to the squared steps.
    sampler: Of the directions' elements: :func:`jax.random.normal` or
      :func:`jax.random.rademacher`.
    key: PRNG key; ``None`` for ``jax.random.key(0)``.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`. Its update
    is called with ``params`` and ``value_fn``, a function of the parameters;
    the incoming updates are ignored and may be ``None``.

  .. seealso:: :func:`optax.contrib.mezo`
  """
  return combine.chain(
      scale_by_zeroth_order(
          num_perturbations,
          smoothing,
          central=False,
          decay=decay,
          eps=eps,
          sampler=sampler,
          key=key,
      ),
      transform.scale_by_learning_rate(learning_rate),
  )
