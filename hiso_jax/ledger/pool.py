"""FedKSeed's finite pool of directions: a whole run as one number per direction.

Who was away for long need not fetch every record it missed, only the pool's numbers: at
most `seed_pool` floats, however long the run (arXiv 2312.06353, Eq. 5). They add up in
another order than `replay` does, so the model agrees to rounding error, not to the bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hiso_jax import directions, rules
from hiso_jax._engine import checks, exact, trees
from hiso_jax._engine.shapes import Array, Key
from hiso_jax.algorithm import Spec
from hiso_jax.ledger.store import Ledger


def accumulate(ledger: Ledger) -> np.ndarray:
    """Add up a run's ``learning_rate scalar / P`` by direction: float32 [seed_pool].

    Raises:
      ValueError: the run has no pool, or its rule is not the identity.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp, numpy as np
      >>> alg = hj.fedkseed(lambda p, b: ((p["w"] - b) ** 2).mean(), 0.1, seed_pool=8)
      >>> start = alg.init({"w": jnp.zeros(5)}, jax.random.key(0))
      >>> with hj.Ledger.create(":memory:", alg, start) as ledger:
      ...     state = alg.advance(start, jnp.ones((1, 5)))
      ...     _ = ledger.append(np.ones((1, 5)), hj.digest(state))
      ...     weights = accumulate(ledger)
      >>> weights.shape, bool(np.isclose(weights.sum(), 0.1))
      ((8,), True)
      >>> moved = apply(start.params, start.key, weights)
      >>> bool(np.allclose(moved["w"], state.params["w"], atol=1e-6))
      True
    """
    config, key = ledger.header["algorithm"]["rule"], ledger.header["key"]
    if config != rules.identity().config:
        raise ValueError(f"ledger: a pool adds up under the identity rule only, not {config}")
    spec = Spec.from_header(ledger.header)
    if (pool := spec.directions.pool) is None:
        raise ValueError(f"ledger: {ledger.path} is of a run without a seed pool")
    records = ledger.records()
    rates = records.learning_rates
    rates = np.float32(spec.rate.value) if rates is None else rates[:, None, None]
    root = jax.random.wrap_key_data(jnp.array(key["data"], jnp.uint32), impl=key["implementation"])
    address = [x.ravel() for x in np.indices(records.scalars.shape)]
    pick = lambda r, k, p: directions.pool_pick(root, r, k, p, pool)  # noqa: E731
    picks = jax.vmap(pick)(*map(jnp.asarray, address))
    shares = np.nan_to_num(rates * records.scalars / records.scalars.shape[2])
    return np.bincount(np.asarray(picks), shares.ravel(), pool).astype(np.float32)


def apply(
    params: trees.Params,
    key: Key[Array, ""],
    weights: np.ndarray | Array,
    *,
    distribution: str = directions.DEFAULT,
    trainable: trees.Trainable = None,
) -> trees.Params:
    """Return ``params - sum_j weights[j] u_j``, with u_j the pool's directions.

    Args:
      params: the model at the start of the run.
      key: the run's root key.
      weights: float32 [seed_pool], from `accumulate`.
      distribution, trainable: as the run's.
    """
    weights = jnp.asarray(weights, jnp.float32)
    if weights.ndim != 1:
        raise ValueError(f"weights: expected shape [seed_pool], got {weights.shape}")
    law = directions.check_distribution(distribution)
    leaves = trees.select(params, trainable)
    checks.count("seed_pool", len(weights))

    def add(j: Array, total: trees.Leaves) -> trees.Leaves:
        u = directions.noise(directions.pool_key(key, j), leaves, law)
        return {n: exact.axpy(total[n], -weights[j], u[n]) for n in total}

    wide = {n: x.astype(jnp.float32) for n, x in leaves.items()}
    moved = lax.fori_loop(0, len(weights), add, wide)
    return trees.merge(params, {n: moved[n].astype(x.dtype) for n, x in leaves.items()})
