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
"""Tests for the zeroth-order optimizers in `_zeroth_order.py`."""

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
from optax._src import alias
from optax._src import combine
from optax._src import update
from optax.contrib import _zeroth_order
from optax.schedules import _inject
from optax.schedules import _schedule
import optax.tree


def _params():
  return {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.3])}


def _quadratic(params):
  return optax.tree.norm(params, squared=True)


def _normal_leaves(key, params):
  """The directions as the transformations draw them."""
  return optax.tree.random_like(
      key, params, jax.random.normal, dtype=jnp.float32
  )


class ZerothOrderTest(parameterized.TestCase):

  @parameterized.parameters(True, False)
  def test_estimate_of_linear_function_is_projection(self, central):
    slope = jax.tree.map(lambda x: x + 1.0, _params())
    linear = lambda x: optax.tree.vdot(slope, x)
    estimate = _zeroth_order.zeroth_order_value_and_grad(
        linear, num_perturbations=3, smoothing=0.1, central=central
    )
    key = jax.random.key(1)
    value, grad = estimate(_params(), key)
    directions = [
        _normal_leaves(jax.random.fold_in(key, p), _params()) for p in range(3)
    ]
    expected = optax.tree.zeros_like(_params())
    for u in directions:
      expected = optax.tree.add_scale(
          expected, optax.tree.vdot(slope, u) / 3, u
      )
    chex.assert_trees_all_close(grad, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(value, linear(_params()), rtol=1e-4)

  @parameterized.parameters(jax.random.normal, jax.random.rademacher)
  def test_estimate_is_unbiased(self, sampler):
    estimate = _zeroth_order.zeroth_order_value_and_grad(
        _quadratic, num_perturbations=4000, sampler=sampler
    )
    _, grad = jax.jit(estimate)(_params(), jax.random.key(0))
    exact = jax.grad(_quadratic)(_params())
    # The standard error of an element is at most |gradient| sqrt(2 / P).
    error = 5 * np.sqrt(2 / 4000) * float(optax.tree.norm(exact))
    chex.assert_trees_all_close(grad, exact, atol=error)

  def test_hiso_is_the_papers_update(self):
    rate, decay, mu, eps = 0.05, 0.9, 1e-2, 1e-4
    solver = _zeroth_order.hiso(
        rate, num_perturbations=2, smoothing=mu, decay=decay, eps=eps
    )
    params, state = _params(), solver.init(_params())
    x, h = params, optax.tree.ones_like(params)
    f = lambda tree: sum(float((leaf**2).sum()) for leaf in tree.values())
    for t in range(4):
      updates, state = solver.update(None, state, params, value_fn=_quadratic)
      params = update.apply_updates(params, updates)
      key = jax.random.fold_in(jax.random.key(0), t)
      x = {n: np.asarray(leaf, np.float64) for n, leaf in x.items()}
      delta = {n: np.zeros_like(leaf) for n, leaf in x.items()}
      for p in range(2):
        noise = _normal_leaves(jax.random.fold_in(key, p), _params())
        z = {n: np.asarray(u, np.float64) / np.sqrt(h[n])
             for n, u in noise.items()}
        g = (f({n: x[n] + mu * z[n] for n in x}) - f(x)) / mu
        delta = {n: delta[n] + g * z[n] / 2 for n in x}
      x = {n: x[n] - rate * delta[n] for n in x}
      h = {n: decay * h[n] + (1 - decay) * (delta[n] ** 2 + eps) for n in x}
    chex.assert_trees_all_close(params, x, rtol=2e-3, atol=2e-3)
    chex.assert_trees_all_close(state[0].nu, h, rtol=2e-2, atol=2e-2)

  def test_hiso_that_keeps_its_estimate_has_plain_directions(self):
    plain = combine.chain(
        _zeroth_order.scale_by_zeroth_order(5, central=False),
        alias.sgd(0.1),
    )
    solver = _zeroth_order.hiso(0.1, decay=1.0)
    args = {"params": _params(), "value_fn": _quadratic}
    one, _ = plain.update(None, plain.init(_params()), **args)
    other, _ = solver.update(None, solver.init(_params()), **args)
    chex.assert_trees_all_close(one, other, rtol=1e-6)

  @parameterized.parameters(
      (_zeroth_order.mezo, {"num_perturbations": 4}),
      (_zeroth_order.hiso, {}),
      (_zeroth_order.hiso, {"sampler": jax.random.rademacher}),
  )
  def test_falls_on_a_parabola(self, make, options):
    solver = make(_schedule.linear_schedule(0.05, 0.0, 300), **options)

    def step(carry, _):
      params, state = carry
      updates, state = solver.update(None, state, params, value_fn=_quadratic)
      return (update.apply_updates(params, updates), state), state[0].value

    start = (_params(), solver.init(_params()))
    (params, state), values = jax.jit(
        lambda start: jax.lax.scan(step, start, None, length=300)
    )(start)
    self.assertLess(_quadratic(params), 0.02 * _quadratic(_params()))
    self.assertEqual(state[0].count, 300)
    self.assertTrue(bool(jnp.isfinite(values).all()))

  def test_directions_differ_between_updates_and_keys(self):
    def first_two(key):
      solver = _zeroth_order.mezo(0.1, key=key)
      state, out = solver.init(_params()), []
      for _ in range(2):
        updates, state = solver.update(
            None, state, _params(), value_fn=_quadratic
        )
        out.append(updates["w"])
      return out

    one, other = first_two(jax.random.key(0)), first_two(jax.random.key(1))
    self.assertFalse(bool((one[0] == one[1]).any()))
    self.assertFalse(bool((one[0] == other[0]).any()))

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_dtypes_are_kept(self, dtype):
    params = optax.tree.cast(_params(), dtype)
    value_fn = lambda x: _quadratic(optax.tree.cast(x, jnp.float32))
    solver = _zeroth_order.hiso(0.01, smoothing=0.1)
    updates, state = solver.update(
        None, solver.init(params), params, value_fn=value_fn
    )
    chex.assert_trees_all_equal_dtypes(updates, params)
    self.assertEqual(state[0].nu["w"].dtype, jnp.float32)

  def test_incoming_updates_are_ignored(self):
    solver = _zeroth_order.mezo(0.1)
    state = solver.init(_params())
    call = lambda given: solver.update(
        given, state, _params(), value_fn=_quadratic
    )[0]
    chex.assert_trees_all_equal(call(None), call(_params()))

  def test_inject_hyperparams(self):
    make = _inject.inject_hyperparams(
        _zeroth_order.mezo, static_args=("num_perturbations", "sampler")
    )
    injected, plain = make(learning_rate=0.1), _zeroth_order.mezo(0.1)
    args = {"params": _params(), "value_fn": _quadratic}
    one, _ = injected.update(None, injected.init(_params()), **args)
    other, _ = plain.update(None, plain.init(_params()), **args)
    chex.assert_trees_all_close(one, other, rtol=1e-6)

  def test_missing_arguments_raise(self):
    solver = _zeroth_order.mezo(0.1)
    state = solver.init(_params())
    with self.assertRaisesRegex(ValueError, "value_fn must be provided"):
      solver.update(None, state, _params())
    with self.assertRaisesRegex(ValueError, "params"):
      solver.update(None, state, value_fn=_quadratic)


if __name__ == "__main__":
  absltest.main()
