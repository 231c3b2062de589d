"""Named leaves: selection, masks, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax._engine import trees

PARAMS = {"a": {"w": np.ones((2, 3), np.float32)}, "b": [jnp.zeros(4), jnp.arange(3)], "flag": True}


def test_select_and_merge_are_inverse():
    leaves = trees.select(PARAMS)
    assert list(leaves) == ["a/w", "b/0"]  # integers and bools are never trainable
    merged = trees.merge(PARAMS, {n: x + 1 for n, x in leaves.items()})
    assert float(merged["a"]["w"][0, 0]) == 2 and merged["b"][1] is PARAMS["b"][1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A module as equinox has them: a pytree that can be called."""

    w: Any
    b: Any

    def __call__(self, x: Any) -> Any:
        return self.w * x + self.b


def test_a_mask_may_be_a_tree_that_can_be_called():
    params = Layer(jnp.ones(2), jnp.ones(3))
    assert list(trees.select(params, Layer(False, True))) == ["b"]
    assert list(trees.select(params, lambda params: Layer(True, False))) == ["w"]


@pytest.mark.parametrize("mask", [
    {"a": True, "b": False, "flag": False},
    {"a": {"w": True}, "b": [False, False], "flag": False},
    lambda params: {"a": True, "b": False, "flag": False},
])  # fmt: skip
def test_masks(mask: object):
    assert list(trees.select(PARAMS, mask)) == ["a/w"]


def test_hash_is_fixed_for_ever():
    # A ledger written today must be replayed in ten years.
    assert trees.leaf_hash("a/w") == 0x07F0D8D4


@pytest.mark.parametrize("params, mask, error, text", [
    ({"n": jnp.arange(3)}, None, ValueError, "no trainable leaf"),
    ({"z": jnp.ones(2, jnp.complex64)}, None, TypeError, "'z' is complex"),
    ({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, None, ValueError, "same name"),
    ({"a/b": jnp.ones(2), "a": {"b": 1}}, {"a/b": True, "a": False}, ValueError, "same name 'a/b'"),
    ({"\0a": jnp.ones(2)}, None, ValueError, "has a NUL in it"),
    ({"w": jnp.ones(2)}, {"v": True}, ValueError, "trainable: expected"),
    ({"w": jnp.ones(2)}, {"w": "yes"}, TypeError, "trainable: expected bools"),
])  # fmt: skip
def test_refused(params: object, mask: object, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        trees.select(params, mask)
