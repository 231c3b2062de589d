"""A pytree seen as named leaves: what is trainable, and what its stable name is.

Everything below the user's pytree (noise, directions, curvature) is a flat dict from
leaf name to array that holds the trainable leaves only. A name depends on the path of
its leaf and on nothing else, so adding, removing or freezing a leaf never renames
another, and a subtree can be worked on alone.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
"""Any pytree of arrays."""
Leaves = dict[str, jax.Array]
"""Flat dict: leaf name -> array, trainable leaves only."""
Trainable = Any
"""None (every float leaf), a pytree (or prefix) of bools, or a function params -> that."""


def leaf_name(path: tuple[Any, ...]) -> str:
    """Name of a leaf: its tree path joined by slashes, ``"encoder/layer/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_hash(name: str) -> int:
    """Stable 32-bit hash of a leaf name, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def named(params: Params) -> dict[str, Any]:
    """Every leaf of a pytree by name, trainable or not, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {leaf_name(path): leaf for path, leaf in flat}


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _mask(params: Params, trainable: Trainable) -> list[bool]:
    """One bool per leaf of `params`, in tree order."""
    if trainable is None:
        return [True] * len(jax.tree.leaves(params))
    tree = trainable(params) if isinstance(trainable, Callable) else trainable
    try:
        mask = jax.tree.leaves(
            jax.tree.map(lambda keep, sub: jax.tree.map(lambda _: keep, sub), tree, params)
        )
    except ValueError as error:
        raise ValueError(
            "trainable: expected a pytree of bools with the structure of params or a "
            f"prefix of it; {error}"
        ) from None
    for keep in mask:
        if np.asarray(keep).dtype != bool:
            raise TypeError(f"trainable: expected bools as leaves, got {keep!r}")
    return [bool(keep) for keep in mask]


def select(params: Params, trainable: Trainable = None) -> Leaves:
    """Return the trainable leaves of a pytree by name.

    Integer, bool and key leaves are never trainable; they stay where they are.

    Args:
      params: any pytree of arrays.
      trainable: None for every float leaf, a pytree of bools with the structure of
        `params` or a prefix of it, or a function from `params` to such a pytree
        (as in ``optax.masked``).

    Raises:
      TypeError: a trainable leaf is complex, or the mask holds something else than bools.
      ValueError: the mask does not fit, nothing is trainable, or two leaves share a name.

    Example:
      >>> import jax.numpy as jnp
      >>> list(select({"a": {"w": jnp.ones(2)}, "step": jnp.int32(0)}))
      ['a/w']
    """
    leaves: Leaves = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    hashes: dict[int, str] = {}
    for (path, leaf), keep in zip(flat, _mask(params, trainable), strict=True):
        name = leaf_name(path)
        if not keep:
            continue
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(f"params: leaf {name!r} is complex; only real leaves can be trained")
        if not _is_float(leaf):
            continue
        if leaf_hash(name) in hashes:
            raise ValueError(
                f"params: leaves {name!r} and {hashes[leaf_hash(name)]!r} have the same name or "
                "name hash and would get the same noise; rename one"
            )
        hashes[leaf_hash(name)] = name
        leaves[name] = jnp.asarray(leaf)
    if not leaves:
        raise ValueError("params: no trainable leaf (only float leaves can be trained)")
    return leaves


def merge(params: Params, leaves: Mapping[str, Any]) -> Params:
    """Return `params` with the named leaves replaced; the inverse of `select`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(leaf_name(path), leaf), params
    )


def nodes(tree: Any, names: Collection[str]) -> tuple[list[Any], Any]:
    """Flatten a tree, but for the dicts of leaves in it: those with exactly these keys.

    Example:
      >>> nodes({"curvature": {"a": 1, "b": 2}, "count": 3}, ["a", "b"])[0]
      [3, {'a': 1, 'b': 2}]
    """
    every = set(names)
    return jax.tree.flatten(tree, lambda x: isinstance(x, dict) and x.keys() == every)
