"""Shared keys in, noise out: which directions a round has, and what the noise of a leaf is.

The noise of a leaf is a function of (root key, round, local step, perturbation, leaf
name) and of nothing else. Every party holds the root key, so a direction is never sent.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from hiso_jax._engine import checks, exact, lazy, packing, trees
from hiso_jax._engine import still as stills
from hiso_jax._engine.prng import (  # noqa: F401  # all that is drawn with, under one name
    DEFAULT,
    Distribution,
    check_distribution,
    draw,
    fold_in,
    from_words,
    round_to,
    threefry,
    words,
    words_of,
)
from hiso_jax._engine.shapes import Array, Float, Index, Key, Number, Shape, Start, UInt32
from hiso_jax._engine.still import Still

Noise = Callable[[str, Index, Index, Shape, Start], Float[Array, "..."]]
"""(leaf or pack, local step, direction, shape, number of the first element) -> u."""

# Step number of the stream that rounds narrow floats; no run has this many local steps.
_ROUNDING = 2**32 - 1
_POOL = 2**32 - 2


def as_key(key: Any) -> Key[Array, ""]:
    """Return a typed threefry key from a typed key or an old-style uint32 key of shape [2].

    Raises:
      TypeError: `key` is neither.
      ValueError: another PRNG implementation; its draws change under vmap and sharding, so
        parties would disagree.
    """
    if not isinstance(key, jax.Array) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    ):
        raise TypeError(f"key: expected jax.random.key(seed), got {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape != (2,):
            raise TypeError(f"key: an old-style key has shape (2,), got {key.shape}")
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    if key.shape != ():
        raise TypeError(f"key: expected a single key, got an array of shape {key.shape}")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(
            f"key: expected impl 'threefry2x32', got {str(jax.random.key_impl(key))!r}, whose "
            "draws change under vmap and sharding; use jax.random.key(seed, impl='threefry2x32')"
        )
    return key


def direction_key(
    key: Key[Array, ""], round: Index, step: Index, perturbation: Index, pool: int | None = None
) -> Key[Array, ""]:
    """Key of one direction: the root key with round, local step and perturbation folded in.

    With a pool it is the pool's key of the number that `pool_pick` gives.
    """
    if pool is not None:
        return pool_key(key, pool_pick(key, round, step, perturbation, pool))
    for counter in (round, step, perturbation):
        key = fold_in(key, counter)
    return key


def pool_pick(
    key: Key[Array, ""], round: Index, step: Index, perturbation: Index, pool: int
) -> UInt32[Array, ""]:
    """Which of a pool's `pool` directions one is, uint32, uniform but for 1 in 2^32 / pool."""
    return words(direction_key(key, round, step, perturbation), 1, 0)[0] % jnp.uint32(pool)


def pool_key(key: Key[Array, ""], number: Index) -> Key[Array, ""]:
    """Key of direction `number` of the pool."""
    return fold_in(fold_in(key, _POOL), number)


def _leaf_keys(key: Key[Array, ""], names: Sequence[str]) -> Key[Array, "leaves"]:
    hashes = jnp.asarray([trees.leaf_hash(name) for name in names], jnp.uint32)
    return fold_in(key, hashes)


def noise(
    key: Key[Array, ""], leaves: Mapping[str, Any], distribution: Distribution = DEFAULT
) -> trees.Leaves:
    """Draw the noise u of every named leaf.

    Args:
      key: the key of one direction, from `direction_key`.
      leaves: name -> anything with a shape; from `trees.select`.
      distribution: one of `Distribution`.

    Returns:
      name -> float32 array of the leaf's shape, whatever the leaf's dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> both = noise(jax.random.key(0), {"a": jnp.ones(3), "b": jnp.ones((2, 2))})
      >>> alone = noise(jax.random.key(0), {"b": jnp.ones((2, 2))})
      >>> bool((both["b"] == alone["b"]).all())  # a leaf's noise depends on its name only
      True
    """
    names = sorted(leaves)
    keys = _leaf_keys(key, names)
    return {n: draw(keys[i], jnp.shape(leaves[n]), distribution) for i, n in enumerate(names)}


# As `prng.draw`: one program by itself, and inlined where it is traced.
@functools.partial(jax.jit, static_argnames=("shape", "names", "pool"), inline=True)
def round_keys(
    key: Key[Array, ""],
    round: Index,
    shape: tuple[int, int],
    names: tuple[str, ...],
    pool: int | None = None,
) -> Key[Array, "K P leaves"]:
    """Keys of all noise of a round, given its shape [K, P] and the leaves' names."""
    step, perturbation = jnp.unravel_index(jnp.arange(math.prod(shape)), shape)
    keys = jax.vmap(lambda k, p: direction_key(key, round, k, p, pool))(step, perturbation)
    return jax.vmap(lambda key: _leaf_keys(key, names))(keys).reshape(*shape, -1)


def perturb(params: trees.Params, direction: Mapping[str, Any], scale: Number) -> trees.Params:
    """Return ``params + scale * direction``, each leaf in its own dtype.

    Leaves are lazy (`hiso_jax.lazy`) where the direction is.
    """

    def moved(path: Any, leaf: Any) -> Any:
        z = direction.get(trees.leaf_name(path))
        if isinstance(z, lazy.Lazy):
            return z.plus(leaf, scale)
        return leaf if z is None else exact.axpy(leaf, scale, z)

    return jax.tree_util.tree_map_with_path(moved, params)


def rounding_key(key: Key[Array, ""], round: Index) -> Key[Array, ""]:
    """Key of the stream that rounds narrow floats at the end of a round."""
    return fold_in(fold_in(key, round), _ROUNDING)


def rounding_keys(key: Key[Array, ""], round: Index, names: Sequence[str]) -> Key[Array, "leaves"]:
    """Keys of that stream, given the leaves' names."""
    return _leaf_keys(rounding_key(key, round), names)


class Directions(NamedTuple):
    """Which directions a round has: address in, noise out.

    Attributes:
      per_client: P, directions that a client evaluates in a local step.
      distribution: law of the noise, see `hiso_jax._engine.prng.draw`.
      clients: C, if each client of a round evaluates directions of its own: client c the numbers
        c P to c P + P - 1. None: all evaluate the same.
      pool: every direction is one of so many, picked by the shared key. None: no two are the same.
      still: what some of a client's directions leave as it is.
    """

    per_client: int
    distribution: Distribution = DEFAULT
    clients: int | None = None
    pool: int | None = None
    still: Still | None = None

    @property
    def total(self) -> int:
        """Directions of a local step, of all clients together."""
        return self.per_client * (self.clients or 1)

    def first(self, slot: Index) -> Index:
        """Number of the first direction of the client in a slot."""
        return 0 if self.clients is None else self.per_client * slot

    def noise(self, laid: Any, key: Key[Array, ""], round: Index, steps: int) -> Noise:
        """The noise of the leaves and packs of a `hiso_jax.layout.Laid`.

        Args:
          laid: gives names, shapes and packs.
          key: root key.
          round: number of the round.
          steps: K.
        """
        keys = round_keys(key, round, (steps, self.total), tuple(laid.names), self.pool)
        drawn = packing.noise(keys, laid.names, laid.packs, self.distribution)
        if self.still is None:
            return drawn
        return stills.masked(drawn, self.still, self.per_client, laid.shapes, laid.packs)

    def check(self, leaves: trees.Leaves) -> None:
        """Raise ValueError unless what moves is among the trainable leaves."""
        if self.still is not None:
            self.still.check(leaves)

    def check_slots(self, slot: Index, count: int) -> None:
        """Raise ValueError unless `count` clients have directions from a known slot on."""
        if self.clients is None or not checks.is_concrete(slot):
            return
        if not 0 <= slot <= self.clients - count:
            raise ValueError(f"batches: {count} clients from place {slot} on, but "
                             f"per_client_directions={self.clients}")  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        """As data, without what is not used; ledgers say ``own_directions`` for per-client ones."""
        options = {"seed_pool": self.pool, "own_directions": self.clients}
        options |= {"upper": None if self.still is None else self.still.config}
        always = {"num_perturbations": self.per_client, "distribution": self.distribution}
        return always | {name: value for name, value in options.items() if value is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of `config`, which may hold more."""
        upper = config.get("upper")
        return cls(
            int(config["num_perturbations"]),
            check_distribution(config["distribution"]),
            config.get("own_directions"),
            config.get("seed_pool"),
            None if upper is None else Still.from_config(upper),
        )
