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
from hiso_jax._engine import exact, still, trees
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
    shape: tuple[int, ...]
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
      ValueError: the ledger's rule is none of those and no other is given, or a leaf has a 64-bit
        type and JAX's are switched off.

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
        firsts = () if self._still is None else self._still.firsts(spec.directions.per_client)
        self._program = jax.jit(
            functools.partial(_replay, spec.rule, spec.directions, firsts),
            compiler_options=exact.compiler_options(),
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
            own = x[offset : offset + large()]
            block = np.zeros(SMALL if own.size <= SMALL else large(), leaf.dtype)
            block[: own.size] = own
            sums = np.asarray(_digests(block, salts, np.uint32(start + offset), own.size))
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
            own = x[max(offset, 0) : offset + room]
            before = max(-offset, 0)
            block = np.zeros(room, leaf.dtype)
            block[before : before + own.size] = own
            moved = self._block(leaf, start + offset, block, before, own.size)
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
        place = (np.uint32(start), np.uint32(skip), np.uint32(size))
        bounds = np.zeros(0, np.uint32)
        if self._still is not None:
            bounds = self._still.bounds(leaf.name, leaf.shape)
        moved, digest, shared = self._program(x, *place, bounds, salts, keys, *self._records)
        with self._lock:
            self._moved += np.asarray(digest)
            self._shared = np.asarray(shared)
        return np.asarray(moved)[skip : skip + size]


@jax.jit
def _digests(x: jax.Array, salts: jax.Array, start: jax.Array, size: jax.Array) -> jax.Array:
    return jnp.stack([digests.part(x, own, start, size) for own in salts])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keys(
    root: jax.Array, shape: tuple[int, ...], pool: int | None, leaf: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys of a leaf's noise [R, K, P], and of its rounding [R]."""
    place = jnp.unravel_index(jnp.arange(math.prod(shape)), shape)
    noise = jax.vmap(lambda r, k, p: directions.direction_key(root, r, k, p, pool))(*place)
    rounding = jax.vmap(lambda r: directions.rounding_key(root, r))(jnp.arange(shape[0]))
    return directions.fold_in(noise, leaf).reshape(shape), directions.fold_in(rounding, leaf)


def _replay(
    rule: rules.Rule,
    own: directions.Directions,
    firsts: tuple[int, ...],
    x: jax.Array,
    start: jax.Array,
    skip: jax.Array,
    size: jax.Array,
    bounds: jax.Array,
    salts: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    records: jax.Array,
    rates: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All rounds on one block; returns it, its digest, and that of state without elements."""

    def round(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, state = carry
        (noise_keys, rounding_key), record, rate = inputs

        def noise(k: Any) -> Any:
            def draw(p: Any) -> Any:
                drawn = directions.draw(noise_keys[k, p], x.shape, own.distribution, start)
                if not firsts:
                    return {"x": drawn}
                bound = still.bound_of(p % own.per_client, firsts, bounds)
                return {"x": still.only(drawn, start, x.shape, bound)}

            return draw

        cast = lambda wide: {"x": directions.round_to(rounding_key, wide["x"], x.dtype, start)}  # noqa: E731
        record = steps.admit(record)
        leaves, state = steps.advance(rule, noise, state, {"x": x}, state, record, rate, cast)
        return (leaves["x"], state), None

    begin = (x, rule.init({"x": x}))
    x, state = lax.scan(round, begin, (keys, records, rates))[0]
    digest, shared = jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.uint32)
    for salt, leaf in zip(salts, jax.tree.leaves({"params": x, "rule": state}), strict=True):
        if leaf.shape == x.shape:
            digest += digests.part(leaf, salt, start, size, skip)
        else:
            shared += digests.part(leaf, salt)
    return x, digest, shared
