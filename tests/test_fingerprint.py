"""The digest: what it must see, and what it must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax.ledger import digests
from tests.helpers import odd_loss, odd_tree

MIXED = {
    "f32": jnp.arange(12.0).reshape(3, 4),
    "bf16": jnp.arange(7.0, dtype=jnp.bfloat16),
    "f16": jnp.arange(7.0, dtype=jnp.float16),
    "int": jnp.arange(5),
    "byte": jnp.arange(5, dtype=jnp.int8),
    "bool": jnp.array([True, False]),
    "scalar": jnp.float32(3),
    "empty": jnp.zeros((0, 3)),
    "key": jax.random.key(1),
    "complex": jnp.array([1 + 2j]),
}


def text(tree):
    return digests.text(hj.digest(tree))


def test_nothing_is_sixteen_zeros():
    assert digests.text(np.zeros(2)) == "0" * 16


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_bit_counts(data):
    names = [n for n, x in MIXED.items() if x.size and n not in ("key", "complex", "bool")]
    name = data.draw(st.sampled_from(names))
    raw = np.array(MIXED[name]).reshape(-1)
    bits = raw.view(np.uint8)
    place = data.draw(st.integers(0, bits.size * 8 - 1))
    bits[place // 8] ^= np.uint8(1 << place % 8)
    changed = MIXED | {name: jnp.asarray(raw.reshape(MIXED[name].shape))}
    assert text(changed) != text(MIXED)


def test_other_types_count():
    for name, other in dict(
        key=jax.random.key(2), bool=jnp.array([False, True]), complex=jnp.array([2 + 1j]),
        byte=jnp.arange(5), scalar=jnp.full((1,), 3.0), f32=MIXED["f32"].reshape(4, 3),
    ).items():  # fmt: skip
        assert text(MIXED | {name: other}) != text(MIXED), name


def test_swaps_count():
    """Of elements, of signs, of leaves; also in the hard case of two numbers that repeat."""
    x = np.ones(4096, np.float32)
    x[::3] = -1
    seen, rng = {text({"w": x})}, np.random.default_rng(0)
    for _ in range(300):
        i, j = rng.integers(0, x.size, 2)
        if x[i] != x[j]:
            y = x.copy()
            y[i], y[j] = x[j], x[i]
            digest = text({"w": y})
            assert digest not in seen
            seen.add(digest)
    a, b = jnp.arange(4.0), jnp.arange(4.0) + 1
    assert text({"a": a, "b": b}) != text({"a": b, "b": a})
    assert text({"a": a}) != text({"b": a})


def test_sixty_four_bits_are_used():
    """Of 2,000 digests no lane repeats more often than chance allows, and every bit varies."""
    every = jax.jit(jax.vmap(lambda i: digests.part(i[None], digests.salts("w", i))))
    words = np.asarray(every(jnp.arange(2000)))
    for lane in words.T:
        assert len(set(lane.tolist())) >= 1998  # 2000^2 / 2^33 repeats are expected
        share = ((lane[:, None] >> np.arange(32)) & 1).mean(0)
        assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(2000)
    assert abs(np.corrcoef(words.astype(float).T)[0, 1]) < 5 / np.sqrt(2000)


def test_sharding_and_programs_do_not_count():
    tree = odd_tree()
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x, axis):
        spec = [None] * x.ndim
        if x.ndim > axis and x.shape[axis] % 8 == 0:
            spec[axis] = "model"
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    for axis in (0, 1):
        sharded = jax.tree.map(lambda x: place(x, axis), tree)
        assert not sharded["first"]["leaf11"].sharding.is_fully_replicated
        assert text(sharded) == text(tree)
    small = {n: tree["first"][n] for n in ("leaf0", "leaf4", "leaf9")}
    whole = text(small)
    with jax.disable_jit():
        assert text(small) == whole
    assert text(jax.tree.map(np.asarray, tree)) == text(tree)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 5000), block=st.integers(1, 700))
def test_parts_add_up(size, block):
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    salts, total = digests.salts("w", x), np.zeros(2, np.uint32)
    part = jax.jit(digests.part)
    for start in range(0, size, block):
        padded = np.zeros(700, np.float32)
        own = x[start : start + block]
        padded[: own.size] = own
        total += np.asarray(part(padded, salts, start, own.size))
    assert digests.text(total) == text({"w": x})


def test_a_state_is_its_parameters_and_its_rule():
    alg = hj.federated_hiso(odd_loss, 1e-2)
    state = alg.init(odd_tree(), jax.random.key(0))
    assert text(state) == text(state._replace(round=state.round + 5, key=jax.random.key(9)))
    moved = jax.jit(alg.advance)(state, jnp.ones((1, 5)))
    assert text(moved) != text(state)
    assert text(moved._replace(rule=state.rule)) != text(moved)
    assert text(moved._replace(params=state.params)) != text(moved)


def test_text_and_back():
    digest = hj.digest(MIXED)
    np.testing.assert_array_equal(digests.parse(digests.text(digest)), digest)
    for wrong in ("", "0" * 15, "G" * 16, "0" * 17):
        with pytest.raises(ValueError, match="digest: expected sixteen"):
            digests.parse(wrong)
