"""What a record does to named leaves: the arithmetic behind `advance`, clients and replay.

Rules work element by element, so all local steps are taken on one block of a leaf before
the next is looked at: parameters and the rule's state are read once, written once, in
place, and nothing of their size is held beside them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax import estimators, exact, meshes, rules, trees
from hiso_jax.lazy import Lazy, worthwhile

Noise = Callable[[str, Any, Any, tuple[int, ...], Any], jax.Array]
"""(leaf, local step, perturbation, shape, number of the first element) -> u."""

BLOCK = 2**18
"""Most numbers in a block where leaves may be cut flat."""


def _flat() -> bool:
    """Whether they may: a CPU has a cache to fit; others want axes as they are, maybe sharded."""
    return jax.default_backend() == "cpu" and meshes.size(meshes.MODEL) == 1


def block_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the blocks [count, ...] that a leaf is worked on in.

    Flat, the largest equal parts that fit; else the layers of a stacked leaf.

    Example:
      >>> import jax
      >>> block_shape((12, 768, 768)) if jax.default_backend() == "cpu" else (27, 2**18)
      (27, 262144)
    """
    size, run = math.prod(shape), math.prod(shape[1:])
    # Noise can be drawn from multiples of 32 on.
    if not _flat():
        return shape if len(shape) > 2 and run % 32 == 0 else (1, *shape)
    fitting = (b for b in range(BLOCK, BLOCK // 4, -32) if size > BLOCK and size % b == 0)
    block = next(fitting, None)
    return (1, *shape) if block is None else (size // block, block)


def ascent(
    rule: rules.Rule,
    state: Any,
    scalars: jax.Array,
    noise: estimators.Direction,
    like: Mapping[str, jax.Array],
) -> Any:
    """Return the `delta` that a rule's update takes, made of a local step's scalars.

    Args:
      rule: see `hiso_jax.rules`.
      state: the rule's, that entered the round.
      scalars: float32 [P], or [2 P] if the rule takes second differences.
      noise: perturbation -> u.
      like: name -> array; gives names and shapes.
    """
    # Apart, so that roots are not computed once for x and once more for the rule.
    whiten = lambda total: exact.apart(rule.direction, state, total)  # noqa: E731
    if not rule.second:
        return whiten(estimators.reconstruct(scalars, noise, like))
    firsts, seconds = jnp.split(scalars, 2)
    total, squares = estimators.reconstruct(firsts, noise, like, seconds)
    return whiten(total), squares


def local_steps(
    rule: rules.Rule,
    noise: Callable[[Any], estimators.Direction],
    entering: Any,
    leaves: trees.Leaves,
    state: Any,
    record: jax.Array,
    rate: jax.Array,
    lasts: Any = None,
) -> tuple[trees.Leaves, Any]:
    """Move float32 or float64 leaves, or parts of them, by a record [K, P].

    Args:
      rule: see `hiso_jax.rules`.
      noise: local step -> perturbation -> u of the leaves.
      entering: the rule's state that entered the round; directions come from it.
      leaves: name -> float32 array; or float64, which keeps its digits and takes the same float32
        shift.
      state: the rule's state so far.
      record: float32 [K, P], finite; [K, 2 P] if the rule takes second differences.
      rate: learning rate, float32.
      lasts: bool [K]: which is the round's last local step; by default the last of the record.

    Returns:
      The moved leaves and the rule's new state.
    """
    lasts = jnp.arange(len(record)) == len(record) - 1 if lasts is None else lasts

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        (leaves, state), (k, scalars, last) = carry, inputs
        delta = ascent(rule, entering, scalars, noise(k), leaves)
        move, state = rule.update(state, delta, scalars, last)
        shift = {n: exact.mul(rate, move[n]).astype(x.dtype) for n, x in leaves.items()}
        return ({n: exact.flush(exact.flush(x) - shift[n]) for n, x in leaves.items()}, state), None

    return lax.scan(step, (leaves, state), (jnp.arange(len(record)), record, lasts))[0]


def apply_record(
    rule: rules.Rule,
    noise: Noise,
    leaves: trees.Leaves,
    state: Any,
    record: jax.Array,
    rate: jax.Array,
    *,
    entering: Any = None,
    lasts: Any = None,
    usable: Any = True,
    wanted: Any = None,
    frozen: bool = False,
    narrow: Callable[[str, jax.Array, Any], jax.Array] = lambda name, x, start: x,
) -> tuple[trees.Leaves, Any]:
    """Take the local steps of a finite record [K, P] on all leaves, block by block.

    Args:
      rule, record, rate: as of `local_steps`.
      noise: see `Noise`.
      leaves: name -> array, any float dtype.
      state: the rule's state so far.
      entering: the rule's state that entered the round, if that is another.
      lasts: as of `local_steps`.
      usable: bool; if False, nothing changes.
      wanted: bool; if False, nothing is even computed.
      frozen: the state is not needed afterwards: it is returned as it was, and no copy is made.
      narrow: (leaf, block as of `exact.wide`, number of its first element) -> block in the leaf's
        dtype.

    Returns:
      The moved leaves and the rule's new state.
    """
    kept = lambda new, old: jnp.where(usable, new, old)  # noqa: E731
    at = lambda x, i: lax.dynamic_index_in_dim(x, i, 0, False)  # noqa: E731
    before, tree = trees.nodes(state, leaves)
    first = before if entering is None else trees.nodes(entering, leaves)[0]
    moved, after = {}, [dict(x) if isinstance(x, dict) else x for x in before]
    for name, leaf in leaves.items():
        shape = block_shape(leaf.shape)

        whole = [n[name].reshape(shape) if isinstance(n, dict) else n for n in before]

        def block(
            i: Any, carry: Any, name: str = name, shape: Any = shape, whole: Any = whole
        ) -> Any:
            x, own = carry
            start = jnp.asarray(i, jnp.uint32) * jnp.uint32(math.prod(shape[1:]))

            def draw(k: Any) -> estimators.Direction:
                return lambda p: {name: noise(name, k, p, shape[1:], start)}

            def part(nodes: list[Any], cut: Callable[[int], jax.Array]) -> Any:
                each = enumerate(nodes)
                return tree.unflatten(
                    [{name: cut(j)} if isinstance(n, dict) else n for j, n in each]
                )

            now = part(before, lambda j: at((whole if frozen else own)[j], i))
            then = now
            if entering is not None:
                then = part(first, lambda j: at(first[j][name].reshape(shape), i))
            wide = {name: exact.wide(at(x, i))}
            end, new = local_steps(rule, draw, then, wide, now, record, rate, lasts)
            put = lambda x, n: lax.dynamic_update_index_in_dim(x, kept(n, at(x, i)), i, 0)  # noqa: E731
            if frozen:
                return put(x, narrow(name, end[name], start)), own
            new = [n[name] if isinstance(n, dict) else n for n in tree.flatten_up_to(new)]
            own = [
                put(own[j], n) if isinstance(before[j], dict) else kept(n, before[j])
                for j, n in enumerate(new)
            ]
            return put(x, narrow(name, end[name], start)), own

        count = shape[0] if wanted is None else jnp.where(wanted, shape[0], 0)
        x, own = lax.fori_loop(0, count, block, (leaf.reshape(shape), [] if frozen else whole))
        moved[name] = x.reshape(leaf.shape)
        for j, n in enumerate(own):
            if isinstance(after[j], dict):
                after[j][name] = n.reshape(leaf.shape)
            else:
                after[j] = n
    return moved, tree.unflatten(after)


def directions_of(
    rule: rules.Rule, noise: Noise, leaves: trees.Leaves, state: Any, step: Any, lazy: bool
) -> estimators.Direction:
    """Perturbation -> direction, of large leaves no more than a promise of it if `lazy`.

    Args:
      rule, noise: as of `apply_record`.
      leaves: name -> array; gives the shapes.
      state: the rule's state that entered the round.
      step: number of the local step.
      lazy: whether large leaves are `hiso_jax.lazy.Lazy`.
    """
    nodes, tree = trees.nodes(state, leaves)
    element = [isinstance(x, dict) for x in nodes]

    def leaf(name: str, shape: tuple[int, ...], p: Any) -> Any:
        def compute(starts: jax.Array, size: tuple[int, ...], parts: Any) -> jax.Array:
            own = iter(parts)
            each = zip(nodes, element, strict=True)
            part = tree.unflatten([{name: next(own)} if mine else n for n, mine in each])
            return rule.direction(part, {name: noise(name, step, p, size, starts)})[name]

        parts = tuple(n[name] for n, mine in zip(nodes, element, strict=True) if mine)
        promise = Lazy(compute, shape, jnp.dtype(jnp.float32), parts)
        return promise if lazy and worthwhile(shape) else promise[...]

    return lambda p: {name: leaf(name, x.shape, p) for name, x in leaves.items()}
