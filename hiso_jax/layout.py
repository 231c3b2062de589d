"""How leaves are cut for the machine: packs, blocks, laziness. No number depends on it.

Small leaves are laid end to end (`hiso_jax._engine.packing`), large ones worked on in blocks:
parameters and the rule's state are read once, written once, in place, and nothing of their size
is held beside them. Where the loss takes them, large leaves are perturbed as they are used
(`hiso_jax.lazy`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax import directions, estimators, rules, steps
from hiso_jax._engine import exact, meshes, packing, trees
from hiso_jax._engine.lazy import Lazy
from hiso_jax._engine.trees import Leaves
from hiso_jax.directions import Noise


class Layout(NamedTuple):
    """How leaves are cut; any two layouts reach the same bits.

    Attributes:
      trainable: mask as in `hiso_jax.trees.select`.
      lazy: the loss takes large leaves as `hiso_jax.lazy.Lazy`.
      flat: whether leaves may be cut anywhere; by default on a CPU, which has a cache to fit.
        Others want axes as they are, maybe sharded: a stacked leaf is then cut into its layers.
      block: most numbers in a block where leaves are cut flat.
      small: leaves of fewer numbers are packed.
      room: most numbers in a pack.
      large: fewest numbers of a leaf that is lazy.
    """

    trainable: trees.Trainable = None
    lazy: bool = False
    flat: bool | None = None
    block: int = 2**18
    small: int = 2**16
    room: int = 2**18
    large: int = 2**16

    def select(self, params: trees.Params) -> Leaves:
        """The trainable leaves by name."""
        return trees.select(params, self.trainable)

    def lay(self, params: trees.Params, rule: Any) -> "Laid":
        """Cut parameters and the state of a rule."""
        flat = self.flat
        if flat is None:
            flat = jax.default_backend() == "cpu" and meshes.size(meshes.MODEL) == 1
        leaves = self.select(params)
        packs = packing.plan(leaves, self.small, self.room)
        return Laid(
            layout=self._replace(flat=flat),
            params=params,
            names=list(leaves),
            shapes={name: x.shape for name, x in leaves.items()},
            packs=packs,
            leaves=packing.pack(leaves, packs),
            rule=packing.pack_state(rule, leaves, packs),
        )

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the blocks [count, ...] that a leaf is worked on in.

        Flat, the largest equal parts that fit; else the layers of a stacked leaf.

        Example:
          >>> Layout(flat=True).blocks((12, 768, 768)), Layout(flat=False).blocks((12, 768, 768))
          ((27, 262144), (12, 768, 768))
        """
        size, run = math.prod(shape), math.prod(shape[1:])
        # Noise can be drawn from multiples of 32 on.
        if not self.flat:
            return shape if len(shape) > 2 and run % 32 == 0 else (1, *shape)
        most = self.block
        fitting = (b for b in range(most, most // 4, -32) if size > most and size % b == 0)
        block = next(fitting, None)
        return (1, *shape) if block is None else (size // block, block)

    def is_lazy(self, shape: tuple[int, ...]) -> bool:
        """Whether a leaf is large, and has rows that its noise can be drawn from anywhere in."""
        run = math.prod(shape[1:])
        fits = len(shape) > 1 and shape[0] * run >= self.large and run % 32 == 0
        return self.lazy and fits


class Laid(NamedTuple):
    """Parameters and a rule's state as a `Layout` cuts them; small leaves are packed.

    Attributes:
      layout: with `flat` decided.
      params: as they are.
      names: of the trainable leaves.
      shapes: of the trainable leaves.
      packs: see `hiso_jax._engine.packing`.
      leaves: name of a leaf or of a pack -> array.
      rule: the rule's state, with the same leaves packed.
    """

    layout: Layout
    params: trees.Params
    names: list[str]
    shapes: dict[str, tuple[int, ...]]
    packs: packing.Packs
    leaves: Leaves
    rule: Any

    def wide(self) -> Leaves:
        """The leaves as a client moves them: see `hiso_jax.exact.wide`."""
        return {name: exact.wide(x) for name, x in self.leaves.items()}

    def tree(self, leaves: Leaves) -> trees.Params:
        """Parameters with these leaves in their place, each in its own dtype."""
        like = self.layout.select(self.params)
        flat = packing.unpack(leaves, self.packs)
        return trees.merge(self.params, {n: x.astype(like[n].dtype) for n, x in flat.items()})

    def direction(self, rule: rules.Rule, noise: Noise, k: Any) -> estimators.Direction:
        """Perturbation -> direction of the unpacked leaves; large ones lazy where they may be.

        Args:
          rule: see `hiso_jax.rules`.
          noise: of leaves and packs.
          k: number of the local step.
        """
        nodes, tree = trees.nodes(self.rule, self.leaves)
        by_element = [isinstance(node, dict) for node in nodes]

        def leaf(name: str, shape: tuple[int, ...], p: Any) -> Any:
            def compute(starts: jax.Array, size: tuple[int, ...], parts: Any) -> jax.Array:
                cut = iter(parts)
                pairs = zip(nodes, by_element, strict=True)
                part = tree.unflatten([{name: next(cut)} if per else n for n, per in pairs])
                return rule.direction(part, {name: noise(name, k, p, size, starts)})[name]

            pairs = zip(nodes, by_element, strict=True)
            stored = tuple(node[name] for node, per in pairs if per)
            lazy = Lazy(compute, shape, jnp.dtype(jnp.float32), stored)
            return lazy if self.layout.is_lazy(shape) else lazy[...]

        return lambda p: packing.unpack(
            {name: leaf(name, x.shape, p) for name, x in self.leaves.items()}, self.packs
        )

    def step(
        self, rule: rules.Rule, noise: Noise, here: Any, k: Any, scalars: jax.Array, rate: Any,
        wanted: Any,
    ) -> tuple[Leaves, Any]:  # fmt: skip
        """Take local step `k` of a client, which nobody keeps, on leaves and rule state `here`.

        Where it is not `wanted`, nothing is computed. Directions come from the state that entered
        the round; what the step makes of it is kept only if the rule needs that.
        """
        this = lambda name, _, *where: noise(name, k, *where)  # noqa: E731
        leaves, state = here
        record = (scalars[None], jnp.bool_(True))
        return over_blocks(
            self.layout, rule, this, leaves, state, record, rate,
            entered=self.rule, is_last=jnp.zeros(1, bool), wanted=wanted, discard=not rule.carried,
        )  # fmt: skip

    def advance(
        self, rule: rules.Rule, noise: Noise, record: jax.Array, rate: Any, key: jax.Array,
        round: Any,
    ) -> tuple[trees.Params, Any]:  # fmt: skip
        """Return parameters and rule state after a record [K, P]; key and round as of a state."""
        keys = directions.rounding_keys(key, round, self.names)
        leaves, state = over_blocks(
            self.layout, rule, noise, self.leaves, self.rule, steps.admit(record), rate,
            cast=packing.rounding(keys, self.names, self.packs, self.leaves),
        )  # fmt: skip
        params = trees.merge(self.params, packing.unpack(leaves, self.packs))
        return params, packing.unpack_state(state, leaves, self.packs)


def over_blocks(
    layout: Layout,
    rule: rules.Rule,
    noise: Noise,
    leaves: Leaves,
    state: Any,
    record: tuple[jax.Array, Any],
    rate: jax.Array,
    *,
    entered: Any = None,
    is_last: Any = None,
    wanted: Any = None,
    discard: bool = False,
    cast: Callable[[str, jax.Array, Any], jax.Array] = lambda name, x, start: x,
) -> tuple[Leaves, Any]:
    """`hiso_jax.steps.advance` on all leaves, block by block, in place.

    Args:
      layout: with `flat` decided.
      rule, leaves, state, record, rate, is_last: as of `steps.advance`.
      noise: of the leaves.
      entered: the rule's state that entered the round, if that is another.
      wanted: bool; if False, nothing is even computed.
      discard: the state is not needed afterwards: it is returned as it was, and no copy is made.
      cast: (leaf, wide block, number of its first element) -> block in the leaf's dtype.
    """
    nodes, tree = trees.nodes(state, leaves)
    first = nodes if entered is None else trees.nodes(entered, leaves)[0]
    per_element = [isinstance(node, dict) for node in nodes]
    moved: Leaves = {}
    after = [dict(node) if per else node for node, per in zip(nodes, per_element, strict=True)]

    def part(name: str, values: Any) -> Any:
        """A rule's state of one block of one leaf."""
        pairs = zip(values, per_element, strict=True)
        return tree.unflatten([{name: x} if per else x for x, per in pairs])

    def cut(values: Any, name: str, shape: tuple[int, ...]) -> list[Any]:
        pairs = zip(values, per_element, strict=True)
        return [node[name].reshape(shape) if per else node for node, per in pairs]

    def at(values: list[Any], whole: list[Any], i: Any) -> list[Any]:
        """Block `i`; what is not per element is as it was before any block."""
        triples = zip(values, whole, per_element, strict=True)
        return [lax.dynamic_index_in_dim(x, i, 0, False) if per else y for x, y, per in triples]

    def all_blocks(name: str, leaf: jax.Array) -> tuple[jax.Array, list[Any]]:
        shape = layout.blocks(leaf.shape)
        before, start_of_round = cut(nodes, name, shape), cut(first, name, shape)

        def block(i: Any, carry: Any) -> Any:
            x, state = carry
            start = jnp.asarray(i, jnp.uint32) * jnp.uint32(math.prod(shape[1:]))

            def draw(k: Any) -> estimators.Direction:
                return lambda p: {name: noise(name, k, p, shape[1:], start)}

            own = part(name, at(before if discard else state, nodes, i))
            then = own if entered is None else part(name, at(start_of_round, first, i))
            old = {name: lax.dynamic_index_in_dim(x, i, 0, False)}
            cast_back = lambda wide: {name: cast(name, wide[name], start)}  # noqa: E731
            new, later = steps.advance(rule, draw, then, old, own, record, rate, cast_back, is_last)
            put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)  # noqa: E731
            x = put(x, new[name])
            if discard:
                return x, state
            values = zip(state, tree.flatten_up_to(later), per_element, strict=True)
            return x, [put(old, new[name]) if per else new for old, new, per in values]

        count = shape[0] if wanted is None else jnp.where(wanted, shape[0], 0)
        start = (leaf.reshape(shape), [] if discard else before)
        x, state = lax.fori_loop(0, count, block, start)
        return x.reshape(leaf.shape), state

    for name, leaf in leaves.items():
        moved[name], state = all_blocks(name, leaf)
        for number, value in enumerate(state):
            if per_element[number]:
                after[number][name] = value.reshape(leaf.shape)
            else:
                after[number] = value
    return moved, tree.unflatten(after)
