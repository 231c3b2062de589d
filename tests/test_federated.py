"""The algorithm against an independent transcription of its paper, and its behavior."""

import functools
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax import directions
from tests.helpers import assert_same_bits, odd_loss, quadratic_loss

D, MU, DECAY, EPSILON, RATE = 23, 0.05, 0.9, 1e-4, 0.05


def cosine_loss(params: Any, batch: Any) -> Any:
    """A loss that runs in NumPy float64 as well as in JAX."""
    np_or_jnp = np if isinstance(params["w"], np.ndarray) else jnp
    w = params["w"].astype(np_or_jnp.float64)
    return (2 - np_or_jnp.cos(w - batch["centre"]) * batch["scale"]).mean()


@functools.cache
def drawn(seed: int, r: int, k: int, p: int) -> np.ndarray:
    """Noise of the library, in one program for all."""
    return np.asarray(_draw(jax.random.key(seed), r, k, p), np.float64)


@jax.jit
def _draw(key: jax.Array, r: int, k: int, p: int) -> jax.Array:
    key = directions.direction_key(key, r, k, p)
    return directions.noise(key, {"w": jnp.zeros(D)}, "normal")["w"]


class Transcription:
    """HiSo in float64 NumPy, from the paper; the noise is the library's."""

    def __init__(self, x: np.ndarray, seed: int, steps: int, perturbations: int, update: str):
        self.x, self.h = x.astype(np.float64), np.ones(x.size)
        self.seed, self.steps, self.perturbations, self.update = seed, steps, perturbations, update

    def direction(self, r: int, k: int, p: int) -> np.ndarray:
        return drawn(self.seed, r, k, p) / np.sqrt(self.h)  # Eq. 8: z = H^(-1/2) u

    def client(self, r: int, data: list[Any]) -> np.ndarray:
        x, sent = self.x.copy(), np.zeros((self.steps, self.perturbations))
        for k in range(self.steps):
            delta = np.zeros(D)
            for p in range(self.perturbations):
                z = self.direction(r, k, p)
                up = cosine_loss({"w": x + MU * z}, data[k])
                sent[k, p] = (up - cosine_loss({"w": x}, data[k])) / MU
                delta += sent[k, p] * z / self.perturbations
            x = x - RATE * delta
        return sent

    def round(self, r: int, data: list[list[Any]], weights: np.ndarray) -> None:
        sent = np.stack([self.client(r, own) for own in data])
        mean = np.tensordot(weights / weights.sum(), sent, 1)
        deltas = []
        for k in range(self.steps):
            zs = [self.direction(r, k, p) for p in range(self.perturbations)]
            deltas.append(sum(g * z for g, z in zip(mean[k], zs, strict=True)) / self.perturbations)
        for delta in deltas:
            self.x = self.x - RATE * delta
        entering = {"all": deltas, "last": deltas[-1:], "none": []}[self.update]
        for delta in entering:  # Eq. 12
            self.h = DECAY * self.h + (1 - DECAY) * (delta**2 + EPSILON)


# Every pair of method, K and P; "last" and "all" differ with K > 1 only.
@pytest.mark.parametrize("method, update, steps, perturbations", [
    ("hiso", "last", 1, 1), ("hiso", "last", 3, 5), ("hiso", "all", 3, 1), ("hiso", "all", 1, 5),
    ("decomfl", "none", 1, 5), ("decomfl", "none", 3, 1),
])  # fmt: skip
def test_equals_the_paper(method: str, update: str, steps: int, perturbations: int):
    """Twenty rounds with partial participation, to 1e-5 relative."""
    rng = np.random.default_rng(steps * 10 + perturbations)
    x = rng.normal(size=D).astype(np.float32)
    options: dict[str, Any] = dict(local_steps=steps, num_perturbations=perturbations, smoothing=MU)
    options |= dict(distribution="normal")  # the paper's
    with jax.enable_x64(True):  # the loss in float64, parameters and scalars in float32
        if method == "hiso":
            alg = hj.federated_hiso(
                cosine_loss, RATE, decay=DECAY, epsilon=EPSILON, update_steps=update, **options
            )
        else:
            alg = hj.decomfl(cosine_loss, RATE, **options)
        paper = Transcription(x, 3, steps, perturbations, update)
        state = alg.init({"w": jnp.asarray(x)}, jax.random.key(3))
        step = jax.jit(alg.round)
        for r in range(20):
            taking_part = rng.choice(6, 3, replace=False)
            centres = rng.normal(size=(3, steps, D)) / 4 + taking_part[:, None, None] / 10
            scales = rng.uniform(0.5, 1.5, size=(3, steps, 1))
            weights = rng.uniform(0.5, 2, size=3).astype(np.float32)
            data = [
                [{"centre": centres[c, k], "scale": scales[c, k]} for k in range(steps)]
                for c in range(3)
            ]
            paper.round(r, data, weights.astype(np.float64))
            state, _ = step(
                state, {"centre": jnp.asarray(centres), "scale": jnp.asarray(scales)}, weights
            )
        assert np.abs(paper.x - x).max() > 0.05  # something moved
        scale = np.abs(paper.x).max()
        np.testing.assert_allclose(state.params["w"], paper.x, rtol=1e-5, atol=1e-5 * scale)
        if method == "hiso":
            np.testing.assert_allclose(state.rule.curvature["w"], paper.h, rtol=1e-5)


def test_one_client_central_difference_is_mezo():
    """MeZO: x <- x - lr (f(x + mu z) - f(x - mu z)) / (2 mu) z, one z a step."""
    alg = hj.decomfl(quadratic_loss, 0.1, num_perturbations=1, estimator="central", smoothing=1e-2)
    params, batch = {"w": jnp.arange(5.0)}, jnp.ones((1, 1, 5))
    state = alg.init(params, jax.random.key(0))
    end, metrics = jax.jit(alg.round)(state, batch)
    z = directions.noise(directions.direction_key(state.key, 0, 0, 0), params)["w"]
    w = np.arange(5.0)
    f = lambda x: ((x - 1) ** 2).mean()  # noqa: E731
    g = (f(w + 0.01 * np.asarray(z)) - f(w - 0.01 * np.asarray(z))) / 0.02
    np.testing.assert_allclose(metrics.record[0, 0], g, rtol=1e-3)
    np.testing.assert_allclose(end.params["w"], w - 0.1 * g * np.asarray(z), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_clients_together_equal_a_loop_over_clients(steps: int):
    alg = hj.federated_hiso(odd_loss, 1e-2, local_steps=steps, num_perturbations=3)
    state = alg.init({"w": jnp.linspace(-1, 1, 40).reshape(8, 5)}, jax.random.key(0))
    batches = jax.random.normal(jax.random.key(1), (5, steps, 4))
    probe = jax.jit(alg.probe)
    together = probe(state, batches)
    alone = jnp.concatenate([probe(state, batches[c : c + 1]) for c in range(5)])
    assert together.shape == (5, steps, 3)
    # Equal up to the rounding of the loss (1e-7 of its value) over the smoothing of 1e-3.
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=2e-4)


def test_integer_loss_makes_clients_bit_equal():
    """Where the loss itself is exact, so are the scalars, in one program or in many."""

    def votes(params: Any, batch: Any) -> jax.Array:  # not differentiable
        return (params["w"] * batch > 0).sum().astype(jnp.float32)

    alg = hj.decomfl(votes, 1e-2, smoothing=0.25, num_perturbations=4)
    state = alg.init({"w": jnp.linspace(-1, 1, 64)}, jax.random.key(0))
    batches = jax.random.normal(jax.random.key(1), (5, 1, 64))
    probe = jax.jit(alg.probe)
    together = probe(state, batches)
    alone = jnp.concatenate([probe(state, batches[c : c + 1]) for c in range(5)])
    assert_same_bits(together, alone)
    assert len(np.unique(np.asarray(together))) > 3


def test_many_local_steps_need_no_copy_per_client():
    """With K > 1, temporary memory does not grow with the number of clients."""
    params = {"w": jnp.zeros((256, 256)), "v": jnp.zeros((64, 256))}
    size = sum(x.nbytes for x in params.values())

    def temporary(clients: int) -> int:
        alg = hj.federated_hiso(odd_loss, 1e-2, local_steps=3, distribution="rademacher")
        state = alg.init(params, jax.random.key(0))
        compiled = jax.jit(alg.round).lower(state, jnp.zeros((clients, 3, 2))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32) - temporary(2) < 0.05 * size


def test_compiles_once_per_shape():
    traces = []

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        traces.append(batch.shape)
        return quadratic_loss(params, batch)

    alg = hj.federated_hiso(loss_fn, optax.linear_schedule(0.1, 0, 9))
    step = jax.jit(alg.round)
    state = alg.init({"w": 1.0 + np.zeros(3), "scalar": 2.0}, jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, jnp.ones((2, 1, 3)))
    count = len(traces)
    state, _ = step(state, jnp.ones((2, 1, 3)))
    assert len(traces) == count and step._cache_size() == 1
    step(state, jnp.ones((5, 1, 3)))
    assert step._cache_size() == 2


def test_learning_rate_schedule_is_of_the_round():
    records = jnp.ones((2, 1, 1))
    moved = []
    for rate in (lambda r: jnp.where(r == 0, 0.5, 0.0), 0.5):
        alg = hj.decomfl(quadratic_loss, rate, num_perturbations=1)
        advance = jax.jit(alg.advance)
        first = advance(alg.init({"w": jnp.zeros(3)}, jax.random.key(0)), records[0])
        moved.append((first, advance(first, records[1])))
    assert_same_bits(moved[0][0].params, moved[1][0].params)
    assert_same_bits(moved[0][0].params, moved[0][1].params)  # rate 0 in round 1


TREES = {
    "nothing in it": dict(shapes=[[0], [2, 0, 3]], dtype=jnp.float32, clients=1, steps=1,
                          perturbations=1, distribution="normal"),
    "scalars and odd": dict(shapes=[[], [5, 1, 3], [0], []], dtype=jnp.bfloat16, clients=3, steps=2,
                            perturbations=4, distribution="near_normal"),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_odd_trees(name: str):
    check_tree(**TREES[name])


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    clients=st.integers(1, 4),
    steps=st.integers(1, 3),
    perturbations=st.integers(1, 4),
    distribution=st.sampled_from(get_args(directions.Distribution)),
)
def test_any_tree(**options: Any):
    check_tree(**options)


def check_tree(
    shapes: Any, dtype: Any, clients: int, steps: int, perturbations: int, distribution: str
):
    """Shapes, dtypes and integer leaves survive a round; the record is what moved everything."""
    params = {f"l{i}": jnp.ones(s, dtype) for i, s in enumerate(shapes)} | {"step": jnp.int32(3)}

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        parts = [jnp.sin(params[f"l{i}"].astype(jnp.float32)).sum() for i in range(len(shapes))]
        return sum(parts, jnp.float32(0)) * batch.mean()

    alg = hj.federated_hiso(
        loss_fn, 1e-2, local_steps=steps, num_perturbations=perturbations, distribution=distribution
    )
    state = alg.init(params, jax.random.key(0))
    batches = jnp.ones((clients, steps, 2))
    end, metrics = jax.jit(alg.round)(state, batches)
    assert metrics.scalars.shape == (clients, steps, perturbations)
    assert metrics.scalars.dtype == metrics.record.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(end, state)
    assert int(end.params["step"]) == 3
    assert_same_bits(end, jax.jit(alg.advance)(state, metrics.record))
