"""The optax face: composition, and equality with the federated algorithm."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax as hj
from tests.helpers import assert_same_bits, odd_loss, quadratic_loss

PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(3)}
TARGET = {"w": jnp.full((2, 3), 0.5), "b": jnp.zeros(3)}


def value_fn(params: Any) -> jax.Array:
    parts = jax.tree.map(lambda x, y: ((x - y) ** 2).sum(), params, TARGET)
    return sum(jax.tree.leaves(parts), jnp.float32(0))


def descend(tx: optax.GradientTransformationExtraArgs, steps: int = 150) -> tuple[Any, Any]:
    """Run a jitted loop; also checks that types are stable and nothing recompiles."""

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    assert step._cache_size() == 1
    return params, state


TRANSFORMS = {
    "hiso": lambda: hj.hiso(0.03),
    "zo_sgd": lambda: hj.zo_sgd(0.03),
    "schedule, rademacher": lambda: hj.hiso(
        optax.cosine_decay_schedule(0.05, 200), distribution="rademacher"
    ),
    "chain": lambda: optax.chain(hj.hiso(0.03), optax.clip_by_global_norm(1.0)),
    "weight decay": lambda: optax.chain(
        hj.scale_by_zeroth_order(hj.rules.hiso()),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(0.03),
    ),
    "adam": lambda: optax.chain(
        hj.scale_by_zeroth_order(hj.rules.identity()),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(0.03),
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        hj.hiso, static_args=("num_perturbations",)
    )(optax.linear_schedule(0.05, 0.01, 150)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_goes_down_in_any_composition(name: str):
    params, _ = descend(TRANSFORMS[name]())
    assert float(value_fn(params)) < 0.05 * float(value_fn(PARAMS))


def test_injected_learning_rate_can_be_read_and_set():
    tx = optax.inject_hyperparams(hj.hiso, static_args=("num_perturbations",))(learning_rate=0.03)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = jax.jit(lambda s: tx.update(None, s, PARAMS, value_fn=value_fn))(state)
    assert float(optax.tree.norm(updates)) == 0


def test_injecting_the_number_of_perturbations_says_what_to_do():
    tx = optax.inject_hyperparams(hj.hiso)(learning_rate=0.03)
    with pytest.raises(TypeError, match="num_perturbations: .*static_args"):
        jax.jit(lambda s: tx.update(None, s, PARAMS, value_fn=value_fn))(tx.init(PARAMS))


GRADIENT_CHAINS = {
    "adam": lambda: optax.adam(0.05),
    "partition": lambda: optax.partition(
        {"train": optax.adam(0.05), "freeze": optax.set_to_zero()}, {"w": "train", "b": "freeze"}
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.05), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.05), 5),
}


@pytest.mark.parametrize("name", GRADIENT_CHAINS)
def test_gradient_estimates_feed_any_chain(name: str):
    tx = GRADIENT_CHAINS[name]()
    estimate = hj.value_and_grad(
        lambda p, batch: value_fn(p) * batch, num_perturbations=8, distribution="normal"
    )

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        _, grads = estimate(params, jnp.float32(1), key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(200):
        params, state = step(params, state, jax.random.key(i))
    if name == "partition":
        assert_same_bits(params["b"], PARAMS["b"])
        assert float(jnp.abs(params["w"] - TARGET["w"]).max()) < 0.2
    else:
        assert float(value_fn(params)) < 0.05 * float(value_fn(PARAMS))


@pytest.mark.parametrize("method", ["hiso", pytest.param("zo_sgd", marks=pytest.mark.slow)])
def test_equals_the_algorithm_with_one_client(method: str):
    options: dict[str, Any] = dict(num_perturbations=3, smoothing=1e-2, estimator="forward")
    data = jnp.float32([0.3, 0.4])
    if method == "hiso":
        alg, tx = hj.federated_hiso(odd_loss, 1e-2, **options), hj.hiso(1e-2, seed=7, **options)
    else:
        alg, tx = hj.decomfl(odd_loss, 1e-2, **options), hj.zo_sgd(1e-2, seed=7, **options)
    params = {"w": jnp.linspace(-1, 1, 60).reshape(4, 15)}
    state, moved = alg.init(params, jax.random.key(7)), params
    advance = jax.jit(alg.advance)
    opt_state = tx.init(params)
    for _ in range(4):
        # The loss is run by itself, so that both see the very same values of it.
        scalars = alg.probe(state, data[None, None])
        state = advance(state, alg.aggregate(scalars))
        updates, opt_state = tx.update(
            None,
            opt_state,
            moved,
            value_fn=lambda p: jax.vmap(odd_loss, (None, 0))(p, data[None])[0],
        )
        moved = optax.apply_updates(moved, updates)
    assert_same_bits(state.params, moved)
    assert_same_bits(state.rule, opt_state.rule)
    assert float(jnp.abs(moved["w"] - params["w"]).max()) > 1e-4


@pytest.mark.parametrize("distribution", [
    law if law == hj.directions.DEFAULT else pytest.param(law, marks=[pytest.mark.slow, pytest.mark.ci])
    for law in get_args(hj.directions.Distribution)
])  # fmt: skip
def test_estimates_are_unbiased(distribution: str):
    """The mean of many estimates is H^-1 grad on a quadratic, within five standard errors."""
    curvature = jnp.float32([0.5, 1, 2, 4, 8])
    x = jnp.float32([1, -2, 0.5, 3, -0.25])  # skewed, so that a wrong sign would show
    loss_fn = lambda p, scale: 0.5 * (curvature * p["x"] ** 2).sum() * scale  # noqa: E731
    gradient = curvature * x
    estimate = hj.value_and_grad(
        loss_fn, num_perturbations=4, distribution=distribution, estimator="central", smoothing=1e-2
    )
    keys = jax.random.split(jax.random.key(0), 20_000)
    _, grads = jax.jit(jax.vmap(lambda k: estimate({"x": x}, jnp.float32(1), k)))(keys)
    error = np.asarray(grads["x"]).std(0) / np.sqrt(len(keys))
    assert (np.abs(np.asarray(grads["x"]).mean(0) - gradient) < 5 * error + 1e-3).all()

    # HiSo's update with a given H has the mean H^-1 grad.
    tx = hj.scale_by_zeroth_order(
        hj.rules.hiso(), distribution=distribution, estimator="central", smoothing=1e-2
    )
    state = tx.init({"x": x})
    state = state._replace(rule=hj.rules.HisoState({"x": curvature}))

    def one(seed: jax.Array) -> jax.Array:
        own = state._replace(key=jax.random.key_data(jax.random.key(seed)))
        return tx.update(None, own, {"x": x}, value_fn=lambda p: loss_fn(p, 1.0))[0]["x"]

    steps = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(20_000)))
    error = steps.std(0) / np.sqrt(len(steps))
    assert (np.abs(steps.mean(0) - np.asarray(gradient / curvature)) < 5 * error + 1e-3).all()


def test_bfloat16_small_steps_survive():
    """A step of a hundredth of a unit in the last place still moves the mean."""
    params = {"w": jnp.ones(20_000, jnp.bfloat16)}
    rule = hj.rules.identity()._replace(
        update=lambda state, delta, scalars, last: ({"w": jnp.ones(20_000)}, state), config=None
    )
    alg = hj.scalar_algorithm(lambda p, b: jnp.float32(0) * b.sum(), 1e-4, rule=rule)
    state = alg.init(params, jax.random.key(0))
    end = jax.jit(alg.replay)(state, jnp.zeros((10, 1, 5)))
    mean = float(np.asarray(end.params["w"], np.float64).mean())
    assert abs(mean - (1 - 1e-3)) < 3e-4


@pytest.mark.parametrize("kwargs, text", [
    (dict(params=None, value_fn=value_fn), "params: needed"), (dict(params=PARAMS), "value_fn: needed"),
    (dict(params=PARAMS, value_fn=lambda p: p["b"]), "scalar loss"),
])  # fmt: skip
def test_bad_calls(kwargs: dict[str, Any], text: str):
    tx = hj.hiso(0.1)
    with pytest.raises(ValueError, match=text):
        tx.update(None, tx.init(PARAMS), **kwargs)


def test_gradients_are_refused():
    tx = hj.hiso(0.1)
    with pytest.raises(ValueError, match="updates: expected None"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=value_fn)
    with pytest.raises(TypeError, match="key: "):
        hj.value_and_grad(quadratic_loss)(PARAMS, jnp.ones(3), 0)  # pyright: ignore
