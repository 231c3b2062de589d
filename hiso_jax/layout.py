"""How leaves are cut for the machine: packs, blocks, laziness. No number depends on it.

Small leaves are laid end to end (`hiso_jax._engine.packing`), large ones worked on in blocks:
parameters and the rule's state are read once, written once, in place, and nothing of their size
is held beside them. Where the loss takes them, large leaves are perturbed as they are used
(`hiso_jax.lazy`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax import directions, estimators, rules, steps
from hiso_jax._engine import exact, meshes, packing, trees
from hiso_jax._engine.lazy import Lazy
from hiso_jax._engine.shapes import Array, Bool, Float, Index, Key, Shape
from hiso_jax._engine.trees import Leaves
from hiso_jax.directions import Noise
from hiso_jax.steps import Moved

Cast = Callable[[str, Array, Index], Array]
"""(leaf or pack, wide block, number of its first element) -> block in the leaf's dtype."""
Nodes = list[Any]
"""Nodes of a rule's state: dicts of leaves, or one array of each, and other arrays."""


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

    def lay(self, params: trees.Params, rule: rules.RuleState) -> "Laid":
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

    def blocks(self, shape: Shape) -> Shape:
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

    def is_lazy(self, shape: Shape) -> bool:
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
    shapes: dict[str, Shape]
    packs: packing.Packs
    leaves: Leaves
    rule: rules.RuleState

    def wide(self) -> Leaves:
        """The leaves as a client moves them: see `hiso_jax.exact.wide`."""
        return {name: exact.wide(x) for name, x in self.leaves.items()}

    def tree(self, leaves: Leaves) -> trees.Params:
        """Parameters with these leaves in their place, each in its own dtype."""
        like = self.layout.select(self.params)
        flat = packing.unpack(leaves, self.packs)
        return trees.merge(self.params, {n: x.astype(like[n].dtype) for n, x in flat.items()})

    def direction(self, rule: rules.Rule, noise: Noise, k: Index) -> estimators.Direction:
        """Perturbation -> direction of the unpacked leaves; large ones lazy where they may be.

        Args:
          rule: see `hiso_jax.rules`.
          noise: of leaves and packs.
          k: number of the local step.
        """
        if not rule.elementwise:
            state, draw = self._unpacked_state(self.rule), self._noise_of_all(noise)
            return lambda p: rule.direction(state, draw(k)(p))
        nodes, tree = trees.nodes(self.rule, self.leaves)
        each, by_element = _each(nodes), [node for node in nodes if isinstance(node, dict)]

        def leaf(name: str, shape: Shape, p: Index) -> Any:
            def compute(starts: Array, size: Shape, parts: tuple[Array, ...]) -> Array:
                part = iter(parts)
                state = tree.unflatten(each(lambda _: {name: next(part)}, nodes))
                return rule.direction(state, {name: noise(name, k, p, size, starts)})[name]

            stored = tuple(node[name] for node in by_element)
            lazy = Lazy(compute, shape, jnp.dtype(jnp.float32), stored)
            return lazy if self.layout.is_lazy(shape) else lazy[...]

        return lambda p: packing.unpack(
            {name: leaf(name, x.shape, p) for name, x in self.leaves.items()}, self.packs
        )

    def step(
        self, rule: rules.Rule, noise: Noise, before: Moved, k: Index, scalars: Float[Array, "P"],
        rate: Float[Array, ""], wanted: Bool[Array, ""],
    ) -> Moved:  # fmt: skip
        """Take local step `k` of a client, which nobody keeps, from `before` it.

        Where it is not `wanted`, nothing is computed. Directions come from the state that entered
        the round; what the step makes of it is kept only if the rule needs that.
        """
        of_step = lambda name, _, *where: noise(name, k, *where)  # noqa: E731
        round = steps.Round(rule, scalars[None], jnp.bool_(True), rate, jnp.zeros(1, bool))
        return self.over_blocks(round, of_step, before, wanted=wanted)

    def advance(
        self, rule: rules.Rule, noise: Noise, record: Float[Array, "K P"], rate: Float[Array, ""],
        key: Key[Array, ""], round: Index,
    ) -> tuple[trees.Params, rules.RuleState]:  # fmt: skip
        """Return parameters and rule state after a record; key and round as of a state."""
        keys = directions.rounding_keys(key, round, self.names)
        leaves, state = self.over_blocks(
            steps.admit(rule, record, rate), noise, (self.leaves, self.rule),
            packing.rounding(keys, self.names, self.packs, self.leaves),
        )  # fmt: skip
        params = trees.merge(self.params, packing.unpack(leaves, self.packs))
        return params, packing.unpack_state(state, leaves, self.packs)

    def over_blocks(
        self,
        round: steps.Round,
        noise: Noise,
        before: Moved,
        cast: Cast = lambda name, x, start: x,
        wanted: Bool[Array, ""] | None = None,
    ) -> Moved:
        """`hiso_jax.steps.advance` on all leaves, block by block, in place.

        Args:
          round: what moves them.
          noise: of the leaves and packs.
          before: leaves, and the rule's state with them.
          cast: see `Cast`.
          wanted: None for everybody's step, from the state that entered the round. Else the step
            is a client's own: if False, nothing is even computed, and if the rule does not need
            the state afterwards, it is returned as it was and no copy is made.
        """
        (leaves, state), rule = before, round.rule
        if not rule.elementwise:
            return self._over_all(round, noise, before, cast, wanted)
        nodes, tree = trees.nodes(state, leaves)
        entered = nodes if wanted is None else trees.nodes(self.rule, leaves)[0]
        discard = wanted is not None and not rule.carried
        each, moved, after = _each(nodes), {}, nodes

        def at(stacked: Nodes, nodes: Nodes, name: str, i: Index) -> rules.RuleState:
            """The state of block `i`; what is not by element is as it was before any block."""
            block = lambda _, x: {name: lax.dynamic_index_in_dim(x, i, 0, False)}  # noqa: E731
            return tree.unflatten(each(block, nodes, stacked))

        def all_blocks(name: str, leaf: Array) -> tuple[Array, Nodes]:
            shape = self.layout.blocks(leaf.shape)
            cut = lambda node: node[name].reshape(shape)  # noqa: E731
            begin, at_start = each(cut, nodes), each(cut, entered)

            def block(i: Array, carry: tuple[Array, Nodes]) -> tuple[Array, Nodes]:
                x, stacked = carry
                start = jnp.asarray(i, jnp.uint32) * jnp.uint32(math.prod(shape[1:]))
                draw = lambda k: lambda p: {name: noise(name, k, p, shape[1:], start)}  # noqa: E731
                here = at(begin if discard else stacked, nodes, name, i)
                start_of_round = here if wanted is None else at(at_start, entered, name, i)
                old = {name: lax.dynamic_index_in_dim(x, i, 0, False)}
                cast_back = lambda wide: {name: cast(name, wide[name], start)}  # noqa: E731
                new, later = steps.advance(round, draw, start_of_round, old, here, cast_back)
                put = lambda y, x: lax.dynamic_update_index_in_dim(x, y[name], i, 0)  # noqa: E731
                x = put(new, x)
                return x, stacked if discard else each(put, tree.flatten_up_to(later), stacked)

            count = shape[0] if wanted is None else jnp.where(wanted, shape[0], 0)
            carry = (leaf.reshape(shape), [] if discard else begin)
            x, stacked = lax.fori_loop(0, count, block, carry)
            return x.reshape(leaf.shape), stacked

        for name, leaf in leaves.items():
            moved[name], stacked = all_blocks(name, leaf)
            put = lambda x, node, n=name, leaf=leaf: node | {n: x.reshape(leaf.shape)}  # noqa: E731
            after = after if discard else each(put, stacked, after)
        return moved, tree.unflatten(after)

    def _over_all(
        self, round: steps.Round, noise: Noise, before: Moved, cast: Cast,
        wanted: Bool[Array, ""] | None,
    ) -> Moved:  # fmt: skip
        """As `over_blocks`, for a rule that is given all leaves at once, whole."""

        def cast_back(wide: Leaves) -> Leaves:
            packed = packing.pack(wide, self.packs)
            return self._unpacked({n: cast(n, x, 0) for n, x in packed.items()})

        def move(before: Moved) -> Moved:
            leaves, state = self._unpacked(before[0]), self._unpacked_state(before[1])
            entered = state if wanted is None else self._unpacked_state(self.rule)
            draw = self._noise_of_all(noise)
            new, later = steps.advance(round, draw, entered, leaves, state, cast_back)
            later = packing.pack_state(later, new, self.packs) if keep else before[1]
            return packing.pack(new, self.packs), later

        keep = wanted is None or round.rule.carried
        return move(before) if wanted is None else lax.cond(wanted, move, lambda x: x, before)

    def _unpacked(self, leaves: Leaves) -> Leaves:
        found = packing.unpack(leaves, self.packs)
        return {name: found[name] for name in self.names}

    def _unpacked_state(self, state: rules.RuleState) -> rules.RuleState:
        return packing.unpack_state(state, self.leaves, self.packs)

    def _noise_of_all(self, noise: Noise) -> steps.Noise:
        """The noise of all leaves at once."""

        def all_of(k: Index, p: Index) -> Leaves:
            drawn = {name: noise(name, k, p, x.shape, 0) for name, x in self.leaves.items()}
            return self._unpacked(drawn)

        return lambda k: partial(all_of, k)


def _each(nodes: Nodes) -> Callable[..., Nodes]:
    """Return a map over lists like the nodes of a rule's state (see `hiso_jax.trees.nodes`).

    It applies a function to those that hold numbers by element; for others it takes the first
    list's as they are.
    """
    by_element = [isinstance(node, dict) for node in nodes]

    def each(function: Callable[..., Any], *lists: Nodes) -> Nodes:
        rows = zip(by_element, *lists, strict=True)
        return [function(*row) if by else row[0] for by, *row in rows]

    return each
