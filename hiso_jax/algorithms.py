"""The front door: any scalar-only algorithm from its options, and the field's by name."""

from collections.abc import Sequence
from typing import Any, Unpack

import optax

from hiso_jax import aggregators, directions, estimators, rules, split
from hiso_jax._engine import checks, renamed, trees
from hiso_jax.algorithm import Spec, algorithm
from hiso_jax.layout import Layout
from hiso_jax.protocol import Algorithm, LossFn, Options, Rate
from hiso_jax.split import Split


@renamed.arguments(own_directions="per_client_directions")
def scalar_algorithm(
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rule: rules.Rule,
    estimator: str | estimators.Difference = "forward",
    aggregator: aggregators.Aggregator | aggregators.Function | None = None,
    local_steps: int = 1,
    num_perturbations: int = 5,
    smoothing: float = 1e-3,
    distribution: str = directions.DEFAULT,
    trainable: trees.Trainable = None,
    nonfinite: str = "raise",
    seed_pool: int | None = None,
    per_client_directions: int | None = None,
    upper: Split | Sequence[Split] | None = None,
    lazy: bool = False,
) -> Algorithm:
    """Build a scalar-only federated algorithm from a rule (HiSo's Algorithm 1).

    Each client takes K local steps from the global parameters, all with the round's
    shared noise, sends K x P scalars and forgets the steps. Everybody then takes the same
    steps with the aggregated scalars: ``x <- x - learning_rate * step_k`` for k < K.

    With K = 1 all clients evaluate the same perturbed parameters, so their batches go
    through one forward pass. With K > 1 clients run one after another: memory does not
    grow with C.

    Args:
      loss_fn: pure function of (params, one client's batch) returning a float32 scalar.
      learning_rate: float, or optax schedule of the round.
      rule: how scalars become steps, see `hiso_jax.rules`.
      estimator: ``"forward"`` (P + 1 forward passes), ``"central"`` (2 P), ``"three_point"``
        (2 P + 1, and 2 P scalars; for rules that take second differences) or a function.
      aggregator: see `hiso_jax.aggregators`; the weighted mean by default.
      local_steps: K >= 1.
      num_perturbations: P >= 1.
      smoothing: finite-difference step mu > 0.
      distribution: noise, ``"normal"``, ``"near_normal"`` or ``"rademacher"``; see
        `hiso_jax.directions.draw`.
      trainable: mask as in `hiso_jax.trees.select`; other leaves are never perturbed,
        drawn for or changed.
      nonfinite: what a client with a NaN or infinite scalar does. ``"raise"``: `aggregate`
        raises ValueError naming it; inside jit, where nothing can be raised, the whole
        round moves nothing, its record is NaN, and ``metrics.finite`` names the client.
        ``"exclude"``: it gets weight 0.
      seed_pool: every direction is one of so many (below 2^32), picked by the shared key, as in
        FedKSeed; by default no two are the same. See `hiso_jax.pool`.
      per_client_directions: C, the clients asked in a round, of whom each then evaluates P
        directions of its own: client c of the round the directions c P to c P + P - 1. By default
        all evaluate the same. A client does and sends no more, the record is [K, C P], and the
        step an average over C P directions instead of P. What has no common quantity to
        compare cannot be aggregated but by the weighted mean.
      upper: some of the P directions move the upper part of the model only and start from the
        activations below it; see `hiso_jax.Split`, of which there may be several, at other
        depths. Forward differences only.
      lazy: the loss takes large leaves as `hiso_jax.lazy.Lazy`, as one that computes with
        ``model.apply``, ``hidden`` and ``head`` of `hiso_jax.models` does: only one layer's
        perturbed copy lives at a time, instead of one of all parameters. Records and states
        do not depend on it.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: an argument out of range, by name, before anything is computed.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> loss_fn = lambda params, batch: ((params["w"] - batch) ** 2).mean()
      >>> alg = hj.scalar_algorithm(loss_fn, 0.1, rule=hj.rules.identity())
      >>> state = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> batches = jnp.ones((4, 1, 3))  # 4 clients, 1 local step
      >>> state, metrics = jax.jit(alg.round)(state, batches)
      >>> metrics.record.shape, int(state.round)
      ((1, 5), 1)
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function (params, batch) -> loss, got {loss_fn!r}")
    if not callable(learning_rate):
        learning_rate = checks.number("learning_rate", learning_rate, 0)
    steps = checks.count("local_steps", local_steps)
    perturbations = checks.count("num_perturbations", num_perturbations)
    checks.number("smoothing", smoothing, 0, above=True)
    law = directions.check_distribution(distribution)
    checks.choice("nonfinite", nonfinite, ("raise", "exclude"))
    measure = estimators.make(estimator, perturbations, smoothing, rules.check(rule).second)
    if seed_pool is not None:
        checks.number("seed_pool", checks.count("seed_pool", seed_pool), 1, 2**32 - 1)
    combine = aggregators.mean() if aggregator is None else aggregators.named(aggregator)
    if per_client_directions is not None:
        checks.count("per_client_directions", per_client_directions)
        if aggregator is not None:
            raise ValueError(
                "aggregator: clients with per_client_directions have nothing in common to "
                "aggregate; leave one of the two out"
            )
        combine = aggregators.concatenate(per_client_directions, measure.per_direction)
    still = None
    if upper is not None:
        if measure.config["estimator"] != "forward" or seed_pool is not None:
            raise ValueError('upper: goes with estimator="forward" and without seed_pool, got '
                             f"{estimator!r} and {seed_pool!r}")  # fmt: skip
        splits = split.of(upper, perturbations)
        still, measure = split.what_moves(splits), split.estimator(splits, perturbations, smoothing)
    return algorithm(Spec(
        loss_fn,
        Rate(learning_rate),
        rule,
        measure,
        directions.Directions(perturbations, law, per_client_directions, seed_pool, still),
        aggregators.Combine(combine, nonfinite),
        Layout(trainable, lazy),
        steps,
    ))  # fmt: skip


def _with(name: str, options: Any, **fixed: Any) -> Any:
    """Options with those that make a method what it is.

    Raises:
      ValueError: one of them is given as something else.
    """
    for option, value in fixed.items():
        given = options.get(option, value)
        if option == "estimator":
            given = estimators.name_of(given)
        if given != value:
            raise ValueError(f"{option}: {name} has {value!r}, got {given!r}; for another there is "
                             "hiso_jax.scalar_algorithm")  # fmt: skip
    return options | fixed


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
      **options: the others of `scalar_algorithm`, without `rule`.

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

    Args: as `hiso_jax.scalar_algorithm`, without `rule`; `estimator` is central,
      `num_perturbations` and `local_steps` are 1, and nothing else.
    """
    given = _with("MeZO", options, estimator="central", num_perturbations=1, local_steps=1)
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

    Args: as `hiso_jax.scalar_algorithm`, without `rule`; `distribution` is rademacher and
      `estimator` forward, and nothing else.
    """
    given = _with("FZOO", options, distribution="rademacher", estimator="forward")
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.fzoo(), **given)


def hizoo(
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 1 - 1e-6,
    **options: Unpack[Options],
) -> Algorithm:
    """HiZOO (arXiv 2402.15173): noise whitened by second differences; two scalars a direction.

    Args: as `hiso_jax.scalar_algorithm`, without `rule`; `estimator` is three_point, and nothing
      else; `decay` as in `hiso_jax.rules.hizoo`.
    """
    given = _with("HiZOO", options, estimator="three_point")
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
    checks.count("seed_pool", given["seed_pool"])  # None would be DeComFL
    return scalar_algorithm(loss_fn, learning_rate, rule=rules.identity(), **given)
