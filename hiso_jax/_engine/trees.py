"""A pytree seen as named leaves: what is trainable, and what its stable name is.

Everything below the user's pytree (noise, directions, curvature) is a flat dict from
leaf name to array that holds the trainable leaves only. A name depends on the path of
its leaf and on nothing else, so adding, removing or freezing a leaf never renames
another, and a subtree can be worked on alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax._engine.shapes import Array, Float

Params = Any
"""Any pytree of arrays."""
Batch = Any
"""A client's data, any pytree of arrays; those of a round are [C, K, ...]."""
Leaves = dict[str, Float[Array, "..."]]
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
    """Every leaf of a pytree by name, trainable or not, in tree order.

    Raises:
      ValueError: two leaves have one name, as ``{"a": {"b": x}, "a/b": y}`` has, or a name has
        the character NUL in it, with which the names of packed leaves begin.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    paths: dict[str, tuple[Any, ...]] = {}
    for path, _ in flat:
        name = leaf_name(path)
        if "\0" in name:
            raise ValueError(f"params: the name of leaf {name!r} has a NUL in it; rename it")
        if name in paths:
            first, second = (jax.tree_util.keystr(p) for p in (paths[name], path))
            raise ValueError(
                f"params: leaves {first} and {second} have the same name {name!r}; rename one"
            )
        paths[name] = path
    return {name: leaf for name, (_, leaf) in zip(paths, flat, strict=True)}


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _mask(params: Params, trainable: Trainable) -> list[bool]:
    """One bool per leaf of `params`, in tree order."""
    if trainable is None:
        return [True] * len(jax.tree.leaves(params))
    # A module of some libraries can be called, and is a pytree: of bools, then.
    called = callable(trainable) and jax.tree_util.all_leaves([trainable])
    tree = trainable(params) if called else trainable
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
    hashes: dict[int, str] = {}
    # Frozen leaves are named too: one with the name of a trainable one would move with it.
    for (name, leaf), keep in zip(named(params).items(), _mask(params, trainable), strict=True):
        if not keep:
            continue
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(f"params: leaf {name!r} is complex; only real leaves can be trained")
        if not _is_float(leaf):
            continue
        if leaf_hash(name) in hashes:
            raise ValueError(
                f"params: leaves {name!r} and {hashes[leaf_hash(name)]!r} have the same hash of "
                "their names and would get the same noise; rename one"
            )
        hashes[leaf_hash(name)] = name
        leaves[name] = jnp.asarray(leaf)
    if not leaves:
        raise ValueError("params: no trainable leaf (only float leaves can be trained)")
    return leaves


def mask_of(entries: Sequence[Sequence[Any]]) -> Trainable:
    """The mask of leaves that a ledger's header lists as [name, dtype, shape, trainable]."""
    trained = {entry[0] for entry in entries if entry[3]}
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: leaf_name(path) in trained, params
    )


def merge(params: Params, leaves: Mapping[str, Any]) -> Params:
    """Return `params` with the named leaves replaced; the inverse of `select`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(leaf_name(path), leaf), params
    )


def nodes(tree: Any, leaves: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Flatten a rule's state, but for the dicts of leaves in it: an array of its shape for each.

    Keys alone do not tell: a state may be a dict whose keys are the names of leaves as well.

    Args:
      tree: the state.
      leaves: name -> anything with a shape.

    Example:
      >>> import jax.numpy as jnp
      >>> leaves = {"curvature": jnp.ones(2), "count": jnp.ones(3)}
      >>> state = {"curvature": leaves, "count": jnp.ones(())}
      >>> [sorted(x) if isinstance(x, dict) else x.shape for x in nodes(state, leaves)[0]]
      [(), ['count', 'curvature']]
    """

    def is_leaves(x: Any) -> bool:
        return (
            isinstance(x, dict)
            and x.keys() == leaves.keys()
            and all(jax.tree_util.all_leaves([y]) for y in x.values())
            and all(jnp.shape(y) == jnp.shape(leaves[n]) for n, y in x.items())
        )

    return jax.tree.flatten(tree, is_leaves)
