"""Which parameters are trained: masks by name, the last layers, low-rank adapters."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax._engine import checks, exact, trees

MASKS = {"all": "", "norms": r"norm", "biases": r"(^|/)bias$"}
"""Patterns of leaf names in lower case, by the name of a subset."""


def mask(params: trees.Params, subset: str) -> trees.Params:
    """A pytree of bools for ``trainable=``: ``"all"``, ``"norms"`` or ``"biases"``.

    Raises:
      ValueError: another name, or nothing in `params` belongs to it.

    Example:
      >>> mask({"norm": {"scale": 1.0, "bias": 0.0}, "fc1": {"kernel": 1.0}}, "norms")
      {'fc1': {'kernel': False}, 'norm': {'bias': True, 'scale': True}}
    """
    pattern = MASKS[checks.choice("subset", subset, tuple(MASKS))]
    tree = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(re.search(pattern, trees.leaf_name(path).lower())), params
    )
    if not any(jax.tree.leaves(tree)):
        raise ValueError(f"subset: the parameters have no {subset}")
    return tree


def stacked(name: str) -> bool:
    """Whether a leaf of that name has the layers of a model as its first axis.

    Example:
      >>> stacked("decoder/layers/fc1/kernel"), stacked("decoder/embed_tokens/embedding")
      (True, False)
    """
    return bool(re.search("/layers?/", name))


ABOVE = r"final_layer_norm|project_out|^model/norm|lm_head|^cls|^classifier|^vit/layernorm"
"""Pattern of the names of leaves that lie above a model's layers."""


def upper_rows(params: trees.Params, count: int) -> dict[str, int]:
    """The last `count` layers and all above them: name -> first row, as of `hiso_jax.Split`.

    A table of embeddings that is also the head counts as what it is first: the lowest layer.

    Args:
      params: of a `hiso_jax.models.Model`.
      count: of layers, fewer than there are.

    Raises:
      ValueError: there are not more layers.
    """
    found = trees.named(params)
    stacks = {n: len(x) for n, x in found.items() if stacked(n)}
    layers = min(stacks.values(), default=0)
    if not 1 <= count < layers:
        raise ValueError(f"count: expected 1 to {layers - 1} of {layers} layers, got {count}")
    rows = {n: 0 for n in found if re.search(ABOVE, n) and n not in stacks}
    return rows | {n: size - count for n, size in stacks.items()}


def last_zeros(params: trees.Params, count: int) -> trees.Leaves:
    """Zeros for the last `count` layers of every stacked leaf, by name: differences to train.

    Raises:
      ValueError: there are not so many layers.
    """
    found = {n: x for n, x in trees.named(params).items() if stacked(n)}
    layers = min((len(x) for x in found.values()), default=0)
    if not 1 <= count <= layers:
        raise ValueError(f"count: expected 1 to {layers} layers, got {count}")
    return {n: jnp.zeros((count, *x.shape[1:]), x.dtype) for n, x in found.items()}


def merge_last(params: trees.Params, changes: trees.Leaves) -> trees.Params:
    """Return params with the changes added to the last layers."""
    leaves: Any = trees.named(params)
    added = {n: jnp.asarray(leaves[n]).at[-len(x) :].add(x) for n, x in changes.items()}
    return trees.merge(params, added)


def lora_zeros(params: trees.Params, rank: int, targets: Sequence[str]) -> trees.Leaves:
    """Zeros of LoRA (arXiv 2106.09685): what is trained, by name, for every targeted kernel.

    ``name/a`` [..., in, rank] and ``name/b`` [..., rank, out]; both are differences to the
    start of `merge_lora`, so that a run begins at the published weights and zeros.

    Args:
      params: of a `hiso_jax.models.Model`.
      rank: r >= 1.
      targets: modules whose kernels are adapted, ``["q_proj", "v_proj"]``.

    Raises:
      ValueError: a target that no kernel belongs to.
    """
    checks.count("rank", rank)
    adapters: trees.Leaves = {}
    for target in targets:
        found = {n: x for n, x in trees.named(params).items() if n.endswith(f"/{target}/kernel")}
        if not found:
            inner = (n.split("/") for n in trees.named(params) if n.endswith("/kernel"))
            kernels = [parts[-2] for parts in inner if len(parts) > 2]  # the head is never adapted
            raise ValueError(f"targets: expected some of {sorted(set(kernels))}, got {target!r}")
        for name, kernel in found.items():
            *stack, width, out = kernel.shape
            module = name.removesuffix("/kernel")
            adapters[f"{module}/a"] = jnp.zeros((*stack, width, rank), kernel.dtype)
            adapters[f"{module}/b"] = jnp.zeros((*stack, rank, out), kernel.dtype)
    return adapters


def merge_lora(params: trees.Params, adapters: trees.Leaves, alpha: float) -> trees.Params:
    """Return params with ``kernel + alpha / rank * (a_0 + a) @ b`` in place of adapted kernels.

    ``a_0`` is N(0, 1 / rank), drawn anew from the kernel's name wherever it is needed. No digest
    covers it, so it must not depend on JAX's flags either: on how threefry counts, on 64-bit
    types, on the precision of products.
    """
    leaves = trees.named(params)
    merged = {}
    for name in (n.removesuffix("/a") for n in adapters if n.endswith("/a")):
        kernel: Any = leaves[f"{name}/kernel"]
        a, b = (exact.wide(jnp.asarray(adapters[f"{name}/{part}"])) for part in "ab")
        rank = a.shape[-1]
        seed = jnp.asarray(np.array([0, trees.leaf_hash(name)], np.uint32))
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        # Drawn flat: the same numbers, for a quarter of the compile time.
        with jax.threefry_partitionable(True):
            start = jax.random.normal(key, (a.size,), jnp.float32).reshape(a.shape) / rank**0.5
        product = jnp.matmul(start.astype(a.dtype) + a, b, precision=jax.lax.Precision.HIGHEST)
        wide = exact.wide(jnp.asarray(kernel))
        change = (jnp.asarray(alpha / rank, product.dtype) * product).astype(wide.dtype)
        merged[f"{name}/kernel"] = (wide + change).astype(kernel.dtype)
    return trees.merge(params, merged)
