"""Perturbed where it is used, moved block by block, packed: the bits of the plain way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import OPTConfig

import hiso_jax as hj
from hiso_jax import directions, models
from hiso_jax._engine import lazy
from hiso_jax.layout import Layout
from tests.helpers import assert_same_bits, laid_out, odd_loss, odd_tree, small_config


def loss_of(model: models.Model) -> Any:
    def loss_fn(params: Any, ids: jax.Array) -> jax.Array:
        x = model.hidden(params, ids, jnp.ones_like(ids))[:, -1]
        if model.config.model_type == "bert":
            return jnp.square(x).mean()
        return jax.nn.logsumexp(model.head(params, x, jnp.array([5, 6])), -1).mean()

    return loss_fn


@pytest.mark.parametrize(
    "kind,steps,law",
    [
        pytest.param("opt", 2, "rademacher", marks=pytest.mark.slow),
        pytest.param("bert", 1, "normal", marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("opt", 1, "normal", marks=pytest.mark.slow),
        pytest.param("llama", 1, "rademacher", marks=pytest.mark.slow),
    ],
)
def test_scalars_are_those_of_whole_copies(kind: str, steps: int, law: str):
    model = models.from_config(small_config(kind), jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, 640, (3, steps, 2, 8), dtype=np.int32)
    found = {}
    for late in (False, True):
        alg = laid_out(hj.federated_hiso(
            loss_of(model), 0.1, local_steps=steps, distribution=law, lazy=late, num_perturbations=2
        ))  # fmt: skip
        state = alg.init(model.params, jax.random.key(1))
        state = jax.jit(alg.advance)(state, jnp.full((steps, 2), 0.5))  # so that H is not 1
        found[late] = jax.jit(alg.probe)(state, ids)
    assert np.abs(np.asarray(found[False])).max() > 0.01
    # Not the same program: sums of matrix products may round differently, by 2^-24 over mu.
    np.testing.assert_allclose(found[True], found[False], atol=2e-3)


@pytest.mark.parametrize("law", ["normal", "near_normal", "rademacher"])
def test_lazy_leaf(law: Any):
    """Whole, as rows and as layers: bits of the leaf that is perturbed at once."""
    x = jax.random.normal(jax.random.key(0), (6, 32, 5))
    h = jnp.abs(x) + 0.1
    key, rule = jax.random.key(3), hj.rules.hiso()
    noise = lambda name, k, p, size, start: directions.draw(key, size, law, start)  # noqa: E731
    state = rule.init({"w": x})._replace(curvature={"w": h})

    def moved(late: bool) -> Any:
        laid = Layout(lazy=late, large=10, small=10).lay({"w": x}, state)
        return directions.perturb({"w": x}, laid.direction(rule, noise, 0)(0), 0.25)["w"]

    late, whole = moved(True), moved(False)
    assert isinstance(late, lazy.Lazy) and isinstance(whole, jax.Array)
    z = directions.draw(key, x.shape, law) / np.sqrt(h)
    np.testing.assert_allclose(whole, x + 0.25 * z, rtol=1e-5, atol=1e-6)
    assert_same_bits(whole, late[...])
    assert_same_bits(whole, jnp.asarray(late))
    ids = jnp.array([[4, 0], [5, 4], [-1, -6]])
    assert_same_bits(whole[ids], lazy.take(late, ids))
    assert_same_bits(whole[ids], lazy.take(whole, ids))
    assert len(late) == 6 and len(list(late)) == 6
    assert_same_bits(list(whole), list(late))
    outside = lazy.take(late, jnp.array([6, -7]))
    assert_same_bits(outside, lazy.take(whole, jnp.array([6, -7])))
    scanned = lazy.scan(lambda i, inputs: (i + 1, inputs), 0, {"a": late, "b": x}, {"n": x})
    assert scanned[0] == 6
    assert_same_bits(scanned[1], ({"a": whole, "b": x}, {"n": x}))
    for begin, end in ((2, None), (0, 4), (1, 3), (5, 5)):  # some of the layers
        cut = lazy.scan(lambda i, own: (i + 1, own), 0, {"a": late, "b": x}, {"n": x}, begin, end)
        wanted = ({"a": whole[begin:end], "b": x[begin:end]}, {"n": x[begin:end]})
        assert cut[0] == len(x[begin:end])
        assert_same_bits(cut[1], wanted)


def test_a_loss_that_knows_nothing_of_lazy_leaves():
    """``jnp.asarray`` and ``[...]`` make arrays of them; what needs one says so."""
    params = {"w": jnp.ones((64, 32))}
    batches = jnp.ones((2, 1, 32))
    good = lambda params, batch: jnp.tanh(jnp.dot(jnp.asarray(params["w"]), batch)).sum()  # noqa: E731
    bad = lambda params, batch: jnp.tanh(params["w"].T * batch[:, None]).sum()  # noqa: E731
    probes = [laid_out(hj.decomfl(good, 0.1, lazy=late)) for late in (False, True)]
    state = probes[0].init(params, jax.random.key(0))
    one, two = (jax.jit(alg.probe)(state, batches) for alg in probes)
    np.testing.assert_allclose(one, two, atol=1e-2)
    with pytest.raises(AttributeError, match=r"Lazy.*leaf\[\.\.\.\]"):
        jax.jit(laid_out(hj.decomfl(bad, 0.1, lazy=True)).probe)(state, batches)


def test_a_record_of_nan_moves_nothing_in_any_block():
    alg = laid_out(hj.federated_hiso(odd_loss, 0.1), block=1024)
    state = alg.init(odd_tree(), jax.random.key(0))
    after = jax.jit(alg.advance)(state, jnp.full((1, 5), jnp.nan))
    assert_same_bits((state.params, state.rule), (after.params, after.rule))


@pytest.mark.slow
@pytest.mark.ci
def test_memory_of_a_round_is_that_of_a_layer():
    """Compiled, not measured: beyond a forward pass less than a third of a copy, at any C."""
    config = OPTConfig(vocab_size=2048, hidden_size=128, num_hidden_layers=24, ffn_dim=512,
                       num_attention_heads=4, word_embed_proj_dim=128)  # fmt: skip
    model = models.from_config(config, jax.random.key(0))
    held = sum(x.nbytes for x in jax.tree.leaves(model.params))
    temp = []
    for clients in (1, 8):
        ids = np.ones((clients, 1, 1, 4), np.int32)
        alg = laid_out(hj.decomfl(loss_of(model), 0.1, lazy=True, distribution="rademacher"))
        state = jax.eval_shape(alg.init, model.params, jax.random.key(0))
        program = jax.jit(alg.round, donate_argnums=0).lower(state, ids).compile()
        temp.append(program.memory_analysis().temp_size_in_bytes / held)
    assert temp[0] < 0.33 and temp[1] < temp[0] + 0.05


def test_a_leaf_of_more_numbers_than_a_stream_has():
    alg = hj.decomfl(odd_loss, 0.1)
    params = {"w": jax.ShapeDtypeStruct((3, 2**31), jnp.float32)}
    state = jax.eval_shape(alg.init, params, jax.random.key(0))
    with pytest.raises(ValueError, match="'w'.*2\\^32"):
        jax.eval_shape(alg.advance, state, jnp.ones((1, 5)))
