"""Replay in blocks: a fine-tuned model from its base and its ledger, in little memory.

All rounds are applied to one block of one leaf before the next block is looked at. That
is possible because rules work element by element and number i of a leaf's noise can be
drawn alone; `hiso_jax.steps` is the arithmetic of both.
"""

import functools
import math
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hiso_jax import directions, rules, steps
from hiso_jax._engine import exact, trees
from hiso_jax._engine import still as stills
from hiso_jax._engine.shapes import Array, Float, Index, Key, Real, Shape, UInt32
from hiso_jax.algorithm import Spec
from hiso_jax.ledger import digests
from hiso_jax.ledger.store import Ledger, LedgerMismatch

SMALL = 2**13
"""Numbers in a block of a small leaf."""


@functools.cache
def large() -> int:
    """Numbers in a block of a large leaf; on a CPU it stays in its cache."""
    # Asked when it is needed, not when it is imported: that would start the backend.
    return 2**18 if jax.default_backend() == "cpu" else 2**24


class Leaf(NamedTuple):
    """A leaf as the ledger's header describes it."""

    name: str
    dtype: np.dtype
    shape: Shape
    trainable: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


class Replay:
    """Applies a ledger to the parts of a model's leaves, in any order, by any threads.

    First give every part of every leaf to `read`, then call `check_base`; then give every
    part of every trainable leaf to `advance`, and compare `digest` with that of the ledger.

    Args:
      ledger: open; all its records are used.
      rule: of yours, if the ledger's is none of `hiso_jax.rules.RULES`.

    Raises:
      ValueError: the ledger's rule is none of those and no other is given, or it needs whole
        leaves; or a leaf has a 64-bit type and JAX's are switched off.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp, numpy as np
      >>> alg = hj.federated_hiso(lambda p, batch: ((p["w"] - batch) ** 2).mean(), 0.1)
      >>> start = alg.init({"w": jnp.zeros(1000)}, jax.random.key(0))
      >>> with hj.Ledger.create(":memory:", alg, start) as ledger:
      ...     end = alg.advance(start, jnp.ones((1, 5)))
      ...     _ = ledger.append(np.ones((1, 5)), hj.digest(end))
      ...     replay = Replay(ledger)
      >>> base = np.zeros(1000, np.float32)
      >>> replay.read("w", 0, base)
      >>> replay.check_base()
      >>> parts = [replay.advance("w", i, base[i : i + 300]) for i in range(0, 1000, 300)]
      >>> bool((np.concatenate(parts) == end.params["w"]).all()), replay.digest == replay.wanted
      (True, True)
    """

    def __init__(self, ledger: Ledger, rule: rules.Rule | None = None):
        header, records = ledger.header, ledger.records()
        spec, key = Spec.from_header(header, rule=rule), header["key"]
        if not rules.check(spec.rule).elementwise:
            raise ValueError(
                f"{ledger.path}: the rule {spec.rule.config} looks at more than one element at a "
                "time, and cannot be replayed in blocks; replay its records with Algorithm.replay"
            )
        self.leaves = {
            name: Leaf(name, jnp.dtype(dtype), tuple(shape), trainable)
            for name, dtype, shape, trainable, *_ in header["leaves"]
        }
        for leaf in self.leaves.values():
            if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
                raise ValueError(
                    f"ledger: leaf {leaf.name!r} is {leaf.dtype}, which JAX makes 32 bits wide "
                    "unless it is told otherwise; set jax_enable_x64 (JAX_ENABLE_X64=1)"
                )
        self.base = header["base"]
        self.wanted = records.digests[-1] if ledger.rounds else None
        rates = records.learning_rates
        if rates is None:
            rates = np.full(ledger.rounds, spec.rate.value, np.float32)
        data = jnp.array(key["data"], jnp.uint32)
        self._path, self._records = ledger.path, (records.scalars, rates)
        self._rule, self._still = spec.rule, spec.directions.still
        self._program = jax.jit(
            functools.partial(_replay, spec), compiler_options=exact.compiler_options()
        )
        root = jax.random.wrap_key_data(data, impl=key["implementation"])
        shape = (ledger.rounds, spec.steps, spec.directions.total)
        keys = functools.partial(_keys, root, shape, spec.directions.pool)
        self._keys = functools.lru_cache(4)(keys)
        self._lock = threading.Lock()
        self._read, self._moved = np.zeros(2, np.uint32), np.zeros(2, np.uint32)
        self._shared: np.ndarray | None = None

    def read(self, name: str, start: int, x: np.ndarray) -> None:
        """Take note of a part of the base model: elements `start` and on of a flattened leaf."""
        leaf = self._leaf(name, x)
        names = [name] if leaf.trainable else [name, f"params/{name}"]
        salts = np.stack([digests.salts(n, leaf) for n in names])
        for offset in range(0, x.size, large()):
            part = x[offset : offset + large()]
            block = np.zeros(SMALL if part.size <= SMALL else large(), leaf.dtype)
            block[: part.size] = part
            sums = np.asarray(_digests(block, salts, np.uint32(start + offset), part.size))
            with self._lock:
                self._read += sums[0]
                self._moved += sums[1:].sum(0, dtype=np.uint32)

    def check_base(self) -> None:
        """Raise LedgerMismatch unless what was read is the ledger's base model."""
        if (found := digests.text(self._read)) != self.base:
            raise LedgerMismatch(
                f"{self._path}: it belongs to another base model: digest {self.base} there, "
                f"{found} here"
            )

    def advance(self, name: str, start: int, x: np.ndarray) -> np.ndarray:
        """Return a part of a trainable leaf as it is after all rounds, in the leaf's dtype.

        Args:
          name: of the leaf.
          start: number of the part's first element in the flattened leaf.
          x: 1-dimensional, any size; large ones are cut into blocks.
        """
        leaf = self._leaf(name, x)
        out = np.empty(x.shape, leaf.dtype)
        skip = start % 32  # noise can be drawn from multiples of 32 on
        room = SMALL if x.size + skip <= SMALL else large()
        for offset in range(-skip, x.size, room):
            part = x[max(offset, 0) : offset + room]
            before = max(-offset, 0)
            block = np.zeros(room, leaf.dtype)
            block[before : before + part.size] = part
            moved = self._block(leaf, start + offset, block, before, part.size)
            out[max(offset, 0) : offset + room] = moved
        return out

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the state after all rounds, once all parts are done."""
        shared = 0 if self._shared is None else self._shared
        return digests.text(self._moved + shared)

    def _leaf(self, name: str, x: np.ndarray) -> Leaf:
        if name not in self.leaves:
            raise ValueError(f"name: expected one of {list(self.leaves)}, got {name!r}")
        leaf = self.leaves[name]
        if x.ndim != 1 or x.dtype != leaf.dtype:
            raise ValueError(f"x: expected a flat part of {name!r} in {leaf.dtype}, got {x.dtype} "
                             f"{list(x.shape)}")  # fmt: skip
        return leaf

    def _block(self, leaf: Leaf, start: int, x: np.ndarray, skip: int, size: int) -> np.ndarray:
        like = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
        state = {"params": like, "rule": jax.eval_shape(self._rule.init, like)}
        salts = np.stack([digests.salts(n, x) for n, x in trees.named(state).items()])
        keys = self._keys(np.uint32(trees.leaf_hash(leaf.name)))
        bounds = np.zeros(0, np.uint32)
        if self._still is not None:
            bounds = self._still.bounds(leaf.name, leaf.shape)
        block = Block(x, np.uint32(start), np.uint32(skip), np.uint32(size), bounds)
        moved, digest, shared = self._program(block, salts, keys, self._records)
        with self._lock:
            self._moved += np.asarray(digest)
            self._shared = np.asarray(shared)
        return np.asarray(moved)[skip : skip + size]


class Block(NamedTuple):
    """A run of a leaf's elements that goes through all rounds at once.

    Attributes:
      x: the run, padded in front and at the end.
      start: number of its first element in the flattened leaf.
      skip: elements of padding in front.
      size: elements that count.
      bounds: see `hiso_jax._engine.still.Still.bounds`.
    """

    x: Real[Array | np.ndarray, "N"]
    start: Index
    skip: Index
    size: Index
    bounds: UInt32[Array | np.ndarray, "parts"]


@jax.jit
def _digests(x: Array, salts: Array, start: Array, size: Array) -> UInt32[Array, "salts 2"]:
    return jnp.stack([digests.part(x, salt, start, size) for salt in salts])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keys(
    root: Key[Array, ""], shape: tuple[int, int, int], pool: int | None, leaf: Array
) -> tuple[Key[Array, "R K P"], Key[Array, "R"]]:
    """Keys of a leaf's noise, and of its rounding."""
    address = jnp.unravel_index(jnp.arange(math.prod(shape)), shape)
    noise = jax.vmap(lambda r, k, p: directions.direction_key(root, r, k, p, pool))(*address)
    rounding = jax.vmap(lambda r: directions.rounding_key(root, r))(jnp.arange(shape[0]))
    return directions.fold_in(noise, leaf).reshape(shape), directions.fold_in(rounding, leaf)


def _replay(
    spec: Spec,
    block: Block,
    salts: UInt32[Array, "leaves 2"],
    keys: tuple[Key[Array, "R K P"], Key[Array, "R"]],
    records: tuple[Float[Array, "R K S"], Float[Array, "R"]],
) -> tuple[Real[Array, "N"], UInt32[Array, "2"], UInt32[Array, "2"]]:
    """All rounds on one block; returns it, its digest, and that of state without elements.

    Args:
      spec: whose rule and directions are used.
      block: where the leaf is cut.
      salts: of the leaf and of the rule's state.
      keys: of the noise and of the rounding.
      records: of the ledger, and its learning rates.
    """
    rule, (per_client, distribution, *_), still = spec.rule, spec.directions, spec.directions.still
    x, start, skip, size, bounds = block
    firsts = () if still is None else still.firsts(per_client)

    def round(carry: steps.Moved, inputs: Any) -> tuple[steps.Moved, None]:
        leaves, state = carry
        (noise_keys, rounding_key), (record, rate) = inputs

        def noise(k: Index, p: Index) -> trees.Leaves:
            drawn = directions.draw(noise_keys[k, p], x.shape, distribution, start)
            if not firsts:
                return {"x": drawn}
            bound = stills.bound_of(p % per_client, firsts, bounds)
            return {"x": stills.only(drawn, start, x.shape, bound)}

        cast = lambda wide: {"x": directions.round_to(rounding_key, wide["x"], x.dtype, start)}  # noqa: E731
        admitted = steps.admit(rule, record, rate)
        draw = lambda k: functools.partial(noise, k)  # noqa: E731
        return steps.advance(admitted, draw, state, leaves, state, cast), None

    leaves = {"x": jnp.asarray(x)}
    (leaves, state), _ = lax.scan(round, (leaves, rule.init(leaves)), (keys, records))
    x = leaves["x"]
    digest, shared = jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.uint32)
    for salt, leaf in zip(salts, jax.tree.leaves({"params": x, "rule": state}), strict=True):
        if leaf.shape == x.shape:
            digest += digests.part(leaf, salt, start, size, skip)
        else:
            shared += digests.part(leaf, salt)
    return x, digest, shared
