"""The field's algorithms by name: each a rule, an estimator and a kind of noise."""

from typing import Any, Unpack

import optax

from hiso_jax import rules
from hiso_jax.federated import scalar_algorithm
from hiso_jax.protocol import Algorithm, LossFn, Options


def federated_hiso(
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.95,
    epsilon: float = 1e-8,
    update_steps: str = "last",
    **options: Unpack[Options],
) -> Algorithm:
    """HiSo (arXiv 2506.02370): noise whitened by a curvature estimate made of the scalars.

    Args:
      loss_fn, learning_rate: as in `scalar_algorithm`.
      decay, epsilon, update_steps: as in `hiso_jax.rules.hiso`.
      **options: `local_steps`, `num_perturbations`, `smoothing`, `estimator`, `aggregator`,
        `distribution`, `trainable`, `nonfinite`, as in `scalar_algorithm`.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> loss_fn = lambda params, batch: ((params["w"] - batch) ** 2).mean()
      >>> alg = hj.federated_hiso(loss_fn, 0.1, local_steps=2, num_perturbations=3)
      >>> state = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> scalars = alg.probe(state, jnp.ones((4, 2, 3)))  # four clients, two local steps
      >>> state = alg.advance(state, alg.aggregate(scalars))
      >>> scalars.shape, state.rule.curvature["w"].shape
      ((4, 2, 3), (3,))
    """
    rule = rules.hiso(decay, epsilon, update_steps)
    return scalar_algorithm(loss_fn, learning_rate, rule=rule, **options)


def decomfl(
    loss_fn: LossFn, learning_rate: optax.ScalarOrSchedule, **options: Unpack[Options]
) -> Algorithm:
    """DeComFL (arXiv 2405.15861): no preconditioner; HiSo with H = 1.

    Args: as `hiso_jax.scalar_algorithm`, without `rule`.
    """
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.identity(), **options)


def mezo(
    loss_fn: LossFn, learning_rate: optax.ScalarOrSchedule, **options: Unpack[Options]
) -> Algorithm:
    """MeZO (arXiv 2305.17333): one direction a step and the central difference.

    Args: as `hiso_jax.scalar_algorithm`, without `rule`, `estimator`, `num_perturbations` and
      `local_steps`.
    """
    given: Any = options | {"estimator": "central", "num_perturbations": 1, "local_steps": 1}
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.identity(), **given)


def meazo(
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.99,
    **options: Unpack[Options],
) -> Algorithm:
    """MEAZO (arXiv 2605.03869): the step over the running size of the mean scalar.

    Args: as `hiso_jax.scalar_algorithm`, without `rule`; `decay` as in `hiso_jax.rules.meazo`.
    """
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.meazo(decay), **options)


def fzoo(
    loss_fn: LossFn, learning_rate: optax.ScalarOrSchedule, **options: Unpack[Options]
) -> Algorithm:
    """FZOO (arXiv 2506.09034): signs, and the step over the losses' standard deviation.

    Args: as `hiso_jax.scalar_algorithm`, without `rule`, `distribution` and `estimator`.
    """
    given: Any = options | {"distribution": "rademacher", "estimator": "forward"}
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.fzoo(), **given)


def hizoo(
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 1 - 1e-6,
    **options: Unpack[Options],
) -> Algorithm:
    """HiZOO (arXiv 2402.15173): noise whitened by second differences; two scalars a direction.

    Args: as `hiso_jax.scalar_algorithm`, without `rule` and `estimator`; `decay` as in
      `hiso_jax.rules.hizoo`.
    """
    given: Any = options | {"estimator": "three_point"}
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.hizoo(decay), **given)


def fedkseed(
    loss_fn: LossFn, learning_rate: optax.ScalarOrSchedule, **options: Unpack[Options]
) -> Algorithm:
    """FedKSeed (arXiv 2312.06353): all directions from a finite pool.

    The whole run is then one number per direction of the pool, see `hiso_jax.pool`. The
    paper's clients pick from the pool each for itself; here all take the same picks.

    Args: as `hiso_jax.scalar_algorithm`, without `rule`; `seed_pool` is 4,096 by default.
    """
    given: Any = {"seed_pool": 4096} | options
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.identity(), **given)
