"""Small leaves laid end to end, so that a program draws and moves all of them in one piece.

Every leaf that is drawn for and moved by itself is code of its own to compile, and biases and
norms are most of a model's leaves. A leaf's noise is still that of its own name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax._engine import exact, prng, trees
from hiso_jax._engine.shapes import Array, Float, Index, Key, Shape, Start, UInt32
from hiso_jax._engine.trees import Leaves

Packs = dict[str, dict[str, Shape]]
"""Name of a pack -> leaf -> shape, in the order in which they lie."""


def plan(leaves: Mapping[str, Any], small: int = 2**16, room: int = 2**18) -> Packs:
    """Which leaves of one dtype to pack together; a pack of one is none.

    Args:
      leaves: name -> array.
      small: leaves of fewer numbers are packed.
      room: most numbers in a pack.

    Raises:
      ValueError: a leaf has more than 2^32 numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> list(plan({"a": jnp.ones(3), "b": jnp.ones(2**20), "c": jnp.ones(())}).values())
      [{'a': (3,), 'c': ()}]
    """
    if huge := [name for name, x in leaves.items() if x.size > 2**32]:
        raise ValueError(f"params: leaves {huge} have more numbers than a stream's 2^32 words")
    packs: list[dict[str, Shape]] = []
    last: dict[Any, dict[str, Shape]] = {}  # dtype -> the pack with room
    for name, x in leaves.items():
        if x.size >= small:
            continue
        shapes = last.get(x.dtype)
        if shapes is None or sum(map(math.prod, shapes.values())) + x.size > room:
            shapes = last[x.dtype] = {}
            packs.append(shapes)
        shapes[name] = x.shape
    # No name of a leaf has a NUL in it: `hiso_jax.trees.named` sees to that.
    return {f"\0{i}": shapes for i, shapes in enumerate(packs) if len(shapes) > 1}


def pack(leaves: Leaves, packs: Packs) -> Leaves:
    """Leaves with the packed ones end to end, under the names of the packs."""
    gone = {name for shapes in packs.values() for name in shapes}
    packed = {n: x for n, x in leaves.items() if n not in gone}
    for pack, shapes in packs.items():
        packed[pack] = jnp.concatenate([leaves[n].reshape(-1) for n in shapes])
    return packed


def unpack(leaves: Mapping[str, Any], packs: Packs) -> dict[str, Any]:
    """The inverse of `pack`."""
    out = {n: x for n, x in leaves.items() if n not in packs}
    for pack, shapes in packs.items():
        start = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            out[name] = leaves[pack][start : start + size].reshape(shape)
            start += size
    return out


def pack_state(state: Any, leaves: Leaves, packs: Packs) -> Any:
    """A rule's state with the same leaves packed in its dicts of all `leaves`."""
    nodes, tree = trees.nodes(state, leaves)
    return tree.unflatten([pack(n, packs) if isinstance(n, dict) else n for n in nodes])


def unpack_state(state: Any, packed: Leaves, packs: Packs) -> Any:
    """The inverse of `pack_state`; `packed` are the packed leaves."""
    nodes, tree = trees.nodes(state, packed)
    return tree.unflatten([unpack(n, packs) if isinstance(n, dict) else n for n in nodes])


def _laid(parts: Sequence[Array]) -> Array:
    """Flat parts end to end.

    What is computed for more than eight at once is, on a CPU, code of its own for every part.
    """
    while len(parts) > 8:
        groups = [parts[i : i + 8] for i in range(0, len(parts), 8)]
        # Else the compiler makes one of all of them again.
        parts = [lax.optimization_barrier(jnp.concatenate(group)) for group in groups]
    return jnp.concatenate(parts)


def _pairs(
    keys: Key[Array, "leaves"], counts: Sequence[int]
) -> tuple[UInt32[Array, "N"], UInt32[Array, "N"]]:
    """The words of the first counters of several streams, end to end, and their second words."""
    data = jax.random.key_data(keys)
    lanes = [_laid([jnp.full(n, data[i, lane]) for i, n in enumerate(counts)]) for lane in (0, 1)]
    low = _laid([lax.iota(jnp.uint32, n) for n in counts])
    # Else the choice of the leaf would be made anew for every number.
    lanes, low = lax.optimization_barrier((lanes, low))
    return prng.threefry((lanes[0], lanes[1]), (jnp.zeros_like(low), low))


def draw(
    keys: Key[Array, "leaves"],
    shapes: Sequence[Shape],
    distribution: prng.Distribution,
) -> Float[Array, "N"]:
    """The noise of several leaves end to end, of the keys and shapes given, as `prng.draw`.

    Example:
      >>> import jax
      >>> keys = jax.random.split(jax.random.key(0))
      >>> both = draw(keys, [(3,), (40,)], "rademacher")
      >>> bool((both[3:] == prng.draw(keys[1], (40,), "rademacher")).all())
      True
    """
    sizes = [math.prod(shape) for shape in shapes]
    counts = prng.words_of(sizes, distribution)
    drawn = prng.from_words(_pairs(keys, counts), distribution)
    if drawn.size == sum(sizes):
        return drawn
    starts = [32 * sum(counts[:i]) for i in range(len(counts))]
    return jnp.concatenate([drawn[at : at + n] for at, n in zip(starts, sizes, strict=True)])


def noise(
    keys: Key[Array, "K P leaves"],
    names: Sequence[str],
    packs: Packs,
    distribution: prng.Distribution,
) -> Callable[..., Float[Array, "..."]]:
    """The `hiso_jax.directions.Noise` of leaves and packs; the keys are of `names`."""
    number = {name: i for i, name in enumerate(names)}

    def draw_one(name: str, k: Index, p: Index, shape: Shape, start: Start) -> Float[Array, "..."]:
        if name not in packs:
            return prng.draw(keys[k, p, number[name]], shape, distribution, start)
        shapes = packs[name]
        members = jnp.array([number[n] for n in shapes])
        return draw(keys[k, p][members], list(shapes.values()), distribution)

    return draw_one


def rounding(
    keys: Key[Array, "leaves"], names: Sequence[str], packs: Packs, leaves: Mapping[str, Array]
) -> Callable[[str, Array, Index], Array]:
    """The `cast` of `hiso_jax.layout.Laid.over_blocks` for packed `leaves`.

    Stochastic, with the keys of `names`: see `hiso_jax._engine.prng.round_to`.
    """
    number = {name: i for i, name in enumerate(names)}

    def round_one(name: str, x: Array, start: Index) -> Array:
        dtype = leaves[name].dtype
        if dtype == x.dtype:
            return x
        if name not in packs:
            return prng.round_to(keys[number[name]], x, dtype, start)
        shapes = packs[name]
        sizes = [math.prod(shape) for shape in shapes.values()]
        words, _ = _pairs(keys[jnp.array([number[n] for n in shapes])], sizes)
        return exact.stochastic_round(words, x, dtype)

    return round_one
