"""Other numbers: float64 leaves, and JAX's flags and debug modes, under which no bit may change."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from transformers import LlamaConfig

import hiso_jax as hj
from hiso_jax import models, privacy, rules
from hiso_jax.ledger import digests, replay
from hiso_jax.models import efficientnet, layers, subsets
from tests.helpers import assert_same_bits, replay_in_blocks

RNG = np.random.default_rng(0)
WIDE = {  # a pack of float64, and a leaf alone of each type
    "a": RNG.normal(size=(3, 5)),
    "b": RNG.normal(size=40).astype(np.float32),
    "c": 1 + 1e-12 * RNG.normal(size=33),
    "narrow": RNG.normal(size=37).astype(jnp.bfloat16),
}


def mixed_loss(params: Any, batch: Any) -> jax.Array:
    terms = [jnp.tanh(x.astype(jnp.float32) * batch.mean()).sum() for x in jax.tree.leaves(params)]
    return sum(terms, jnp.float32(0))


def root() -> jax.Array:
    return jax.random.key(0, impl="threefry2x32")


@pytest.mark.slow
@pytest.mark.ci
def test_float64_reaches_the_same_bits_everywhere():
    """A round, advance, replay, block by block: with leaves of three types side by side."""
    with jax.enable_x64(True):
        alg = hj.federated_hiso(mixed_loss, 1e-3, local_steps=2, num_perturbations=2)
        start = alg.init(WIDE, root())
        state, records, fused, advance = start, [], jax.jit(alg.round), jax.jit(alg.advance)
        alone = start
        with hj.Ledger.create(":memory:", alg, start) as ledger:
            for number in range(3):
                state, metrics = fused(state, jnp.full((2, 2, 3), 0.3 + number, jnp.float32))
                ledger.append(metrics.record, hj.digest(state))
                records.append(metrics.record)
                alone = advance(alone, metrics.record)
            blocks = replay_in_blocks(ledger, start.params, most=17)
        assert {n: x.dtype for n, x in state.params.items()} == {
            n: x.dtype for n, x in WIDE.items()
        }
        assert not any((state.params[n] == start.params[n]).all() for n in WIDE)
        assert_same_bits(alone, state)
        assert_same_bits(jax.jit(alg.replay)(start, jnp.stack(records)), state)
        assert_same_bits(blocks, state.params)
    with pytest.raises(ValueError, match="leaf 'a' is float64, .* set jax_enable_x64"):
        replay.Replay(ledger_of(start))


def ledger_of(start: hj.State) -> hj.Ledger:
    with jax.enable_x64(True):
        return hj.Ledger.create(":memory:", hj.decomfl(mixed_loss, 1e-3), start)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_a_float64_leaf_takes_the_shift_of_a_float32_leaf(distribution: str):
    """As NumPy adds it up; the smallest numbers become zero, as those of float32 do."""
    x = np.concatenate(
        [1 + 1e-12 * RNG.normal(size=60), [5e-324, -5e-324, 1e-310, 2.0**-1022, 0.0]]
    )
    record = jnp.float32([[0.5, -2.0, 1.0]])
    with jax.enable_x64(True):
        alg = hj.decomfl(mixed_loss, 2.0**-7, num_perturbations=3, distribution=distribution)
        zero, start = (
            alg.init({"w": jnp.asarray(w)}, root()) for w in (np.zeros(65, np.float32), x)
        )
        shift = -np.asarray(alg.advance(zero, record).params["w"])
        end = np.asarray(alg.advance(start, record).params["w"])
        still = np.asarray(alg.advance(start, record, 0.0).params["w"])
    assert end.dtype == np.float64 and shift.dtype == np.float32
    normal = np.where(np.abs(x) < 2.0**-1022, 0, x)
    np.testing.assert_array_equal(end, normal - shift.astype(np.float64))
    np.testing.assert_array_equal(still, normal)


def test_a_rate_of_zero_moves_nothing():
    with jax.enable_x64(True):
        alg = hj.federated_hiso(mixed_loss, 0.0)
        start = alg.init(WIDE, root())
        assert_same_bits(jax.jit(alg.advance)(start, jnp.ones((1, 5))).params, start.params)
        tx = hj.hiso(0.0)
        value_fn = lambda p: mixed_loss(p, jnp.float32(0.3))  # noqa: E731
        update = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=value_fn)[0])
        moved = optax.apply_updates(start.params, update(start.params))
        assert_same_bits(moved, start.params)


def test_an_update_of_float64_is_the_plain_product():
    """However small it is: the optax face moves float64 leaves as the algorithm does."""
    batch = jnp.float32([0.3, 0.4])
    with jax.enable_x64(True):
        how: Any = dict(num_perturbations=2, smoothing=1e-2, distribution="normal")
        alg = hj.federated_hiso(mixed_loss, 1e-11, **how)
        tx = hj.hiso(1e-11, **how)
        start = alg.init({n: WIDE[n] for n in ("b", "c")}, root())
        value_fn = lambda p: jax.vmap(mixed_loss, (None, 0))(p, batch[None])[0]  # noqa: E731

        @jax.jit
        def update(params: Any) -> Any:
            return tx.update(None, tx.init(params), params, value_fn=value_fn)

        updates, opt_state = update(start.params)
        record = jax.jit(alg.probe)(start, batch[None, None])[0]
        end = jax.jit(alg.advance)(start, record)
        assert_same_bits(optax.apply_updates(start.params, updates), end.params)
        assert_same_bits(opt_state.rule, end.rule)
        steps = np.abs(np.asarray(updates["c"]))
        assert updates["c"].dtype == np.float64 and (steps > 1e-13).all() and (steps < 1e-9).all()


def test_a_numpy_float64_leaf_without_64_bits_is_float32():
    alg = hj.decomfl(mixed_loss, 0.1)
    assert alg.init({"w": np.ones(3)}, root()).params["w"].dtype == jnp.float32


def test_numbers_of_arrays_are_plain_ones():
    """As arguments they are of no type of their own, and can be hashed and written down."""
    for rate in (jnp.float32(0.1), np.float32(0.1), np.array(0.1, np.float32)):
        alg = hj.decomfl(mixed_loss, rate)  # pyright: ignore
        assert float(jax.jit(alg.learning_rate)(0)) == alg.config["learning_rate"]
        assert type(alg.config["learning_rate"]) is float
    start = {"w": jnp.ones(3)}
    for make in (rules.adam, rules.hiso):
        ends = []
        for epsilon in (1e-8, np.float64(1e-8)):
            with jax.enable_x64(True):
                alg = hj.scalar_algorithm(mixed_loss, 0.1, rule=make(epsilon=epsilon))
                state = alg.init(start, root())
                ends.append(alg.advance(state, np.ones((1, 5), np.float32)))
        assert_same_bits(*ends)


def test_clients_add_the_same_noise():
    scalars = np.ones((1, 2, 5), np.float32)
    how: Any = dict(clip=np.float64(2.0), noise_multiplier=np.float64(3.0))
    narrow = privacy.privatize(scalars, root(), **how)
    with jax.enable_x64(True):
        assert_same_bits(privacy.privatize(scalars, root(), **how), narrow)


def test_models_of_float64():
    """As they are asked for, and a prefix before their tokens."""
    config = LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=16, intermediate_size=8)  # fmt: skip
    ids = np.full((2, 6), 5, np.int32)
    with jax.enable_x64(True):
        model = models.from_config(config, root(), "float64")
        assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float64)}
        prefix = model.prefix(model.params, ids[0])
        assert model.hidden(model.params, ids, np.ones_like(ids), prefix).shape == (2, 6, 8)
        norm = layers.RMSNorm(8, 1e-6)
        x = RNG.normal(size=(2, 8))
        found = norm(jnp.asarray(x))
        shape = jax.eval_shape(
            lambda x: efficientnet._depthwise({"weight": jnp.ones((2, 1, 3, 3), x.dtype)}, x, 1),
            jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32),
        )
    wanted = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-12)
    assert shape.dtype == jnp.float32


def test_a_large_mean_costs_no_digits():
    """Squares of 3000 have no room for a variance of 1 in float32."""
    rng = np.random.default_rng(0)
    x = (3000 + rng.normal(size=(3, 64))).astype(np.float32)
    wide = x.astype(np.float64)
    wide = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    found = layers.layer_norm(64, 1e-5, nnx.Rngs(0))(x)
    np.testing.assert_allclose(found, wide, atol=2e-3)


def test_every_layer_norm_is_that_one():
    folder = Path(layers.__file__).parent
    found = [p.name for p in folder.glob("*.py") if "nnx.LayerNorm(" in p.read_text()]
    assert found == ["layers.py"]


FLAGS: dict[str, Callable[[], Any]] = {
    "enable_x64": lambda: jax.enable_x64(True),
    "threefry_partitionable": lambda: jax.threefry_partitionable(False),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": lambda: jax.disable_jit(True),
    "numpy_dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "numpy_rank_promotion": lambda: jax.numpy_rank_promotion("allow"),  # "raise" everywhere here
    "default_matmul_precision": lambda: jax.default_matmul_precision("highest"),
    "enable_checks": lambda: jax.enable_checks(True),
    "default_prng_impl": lambda: jax.default_prng_impl("rbg"),
}


PARAMS = {
    "w": RNG.normal(size=(5, 33)).astype(np.float32),
    "narrow": np.linspace(-1, 1, 40).astype(jnp.bfloat16),
    "s": np.float32(0.5),
}


def plain_loss(params: Any, batch: Any) -> jax.Array:
    """Sums of few numbers in one order, which no compiler has a better idea for."""
    near = jnp.abs(params["w"][0, 1]) + jnp.abs(params["narrow"][3].astype(jnp.float32))
    return (near + jnp.abs(params["s"])) + batch[0]


def what_comes_out() -> list[str]:
    """Digests of three rounds, of an update and a gradient estimate, and of merged adapters."""
    # A power of two: dividing by it is exact, in a program as without one.
    options: Any = dict(smoothing=2.0**-10, num_perturbations=2)
    signs = hj.federated_hiso(plain_loss, 1e-3, distribution="rademacher", **options)
    schedule = optax.cosine_decay_schedule(1e-3, 37)
    steps = hj.scalar_algorithm(plain_loss, schedule, rule=rules.rms(), local_steps=2, **options)
    found = [*faces(options), merged()]
    states = [alg.init(PARAMS, root()) for alg in (signs, steps)]
    programs = [jax.jit(alg.round) for alg in (signs, steps)]
    for number in range(3):
        for i, count in enumerate((1, 2)):
            batches = np.full((2, count, 3), number, np.float32)
            states[i], _ = programs[i](states[i], batches)
            found.append(hj.digest(states[i]))
    return [digests.text(x) for x in found]


def faces(options: Any) -> tuple[jax.Array, jax.Array]:
    params, batch = jax.tree.map(jnp.asarray, PARAMS), np.float32([1, 2, 3])
    tx = hj.hiso(1e-3, **options)
    value_fn = lambda p: plain_loss(p, batch)  # noqa: E731
    update = jax.jit(lambda s, p: tx.update(None, s, p, value_fn=value_fn))
    updates, _ = update(tx.init(params), params)
    estimate = hj.value_and_grad(plain_loss, **options)
    _, grads = jax.jit(estimate)(params, batch, root())
    return hj.digest(updates), hj.digest(grads)


def merged() -> jax.Array:
    rng = np.random.default_rng(1)
    shapes = {"x/q/a": (2, 20, 4), "x/q/b": (2, 4, 12)}
    adapters: Any = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    kernels = np.zeros((2, 20, 12), np.float32)
    return hj.digest(subsets.merge_lora({"x": {"q": {"kernel": kernels}}}, adapters, 16.0))


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return what_comes_out()


# All that leave programs programs at once in every CI; each by itself in the slow tests.
TOGETHER = tuple(flag for flag in FLAGS if flag != "disable_jit")
ALONE = [pytest.param((flag,), marks=pytest.mark.slow) for flag in FLAGS]


@pytest.mark.parametrize(
    "flags",
    [pytest.param(TOGETHER, marks=(pytest.mark.slow, pytest.mark.ci)), *ALONE],
    ids="-".join,
)
def test_no_flag_of_jax_changes_a_bit(flags: tuple[str, ...], expected: list[str]):
    with contextlib.ExitStack() as stack:
        for flag in flags:
            stack.enter_context(FLAGS[flag]())
        assert what_comes_out() == expected


@pytest.mark.parametrize("wide", [False, True])
def test_a_loss_may_be_a_plain_number(wide: bool):
    with jax.enable_x64(wide):
        for loss_fn in (lambda params, batch: 0.5, lambda params, batch: np.float32(0.5)):
            for steps in (1, 2):
                alg = hj.decomfl(loss_fn, 0.1, local_steps=steps, num_perturbations=1)
                state = alg.init({"w": jnp.ones(3)}, root())
                scalars = jax.jit(alg.probe)(state, jnp.ones((2, steps, 3)))
                assert scalars.dtype == jnp.float32 and not scalars.any()


def test_adapters_begin_where_they_do_whatever_seeds_are_moved_by():
    begin, before = merged(), jax.config.jax_random_seed_offset
    jax.config.update("jax_random_seed_offset", 7)
    try:
        assert_same_bits(merged(), begin)
    finally:
        jax.config.update("jax_random_seed_offset", before)
