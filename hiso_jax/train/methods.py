"""The methods that --method names, and one of yours."""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import hiso_jax as hj
from hiso_jax import estimators, rules
from hiso_jax.federation import baselines
from hiso_jax.federation.baselines import Baseline
from hiso_jax.tasks.problem import Problem
from hiso_jax.train.work import multiplications

SCALAR: dict[str, Callable[..., hj.Algorithm]] = {
    "hiso": hj.federated_hiso,
    "decomfl": hj.decomfl,
    "rms": functools.partial(hj.scalar_algorithm, rule=rules.rms()),
    "mezo": hj.mezo,
    "meazo": hj.meazo,
    "fzoo": hj.fzoo,
    "hizoo": hj.hizoo,
    "momentum": functools.partial(hj.scalar_algorithm, rule=rules.momentum()),
    "adam": functools.partial(hj.scalar_algorithm, rule=rules.adam()),
    "fedkseed": hj.fedkseed,
}
"""Clients send scalars only."""

FIRST_ORDER = ("fedavg", *baselines.SERVERS)
NAMES = (*SCALAR, *FIRST_ORDER, "fedzo")

TITLES = {
    "hiso": "HiSo", "decomfl": "DeComFL", "rms": "DeComFL / rms", "mezo": "MeZO",
    "meazo": "MEAZO", "fzoo": "FZOO", "hizoo": "HiZOO", "momentum": "ZO momentum",
    "adam": "ZO-Adam", "fedkseed": "FedKSeed", "fedavg": "FedAvg", "fedadam": "FedAdam",
    "fedyogi": "FedYogi", "fedadagrad": "FedAdagrad", "fedzo": "FedZO",
}  # fmt: skip
OWN = ", per-client directions"
"""Behind the name of a method that is run with them."""


def title(method: str) -> str:
    """A method as people write it."""
    name, comma, how = method.partition(", ")
    return TITLES.get(name, name.rpartition(":")[2]) + comma + how


def check(method: str) -> str:
    """Return the method, if there is one of that name.

    Raises:
      ValueError: there is none; or ``module:function`` cannot be imported.
    """
    if method not in NAMES:
        _yours(method)
    return method


def _yours(method: str) -> Callable[..., hj.Algorithm]:
    module, colon, name = method.partition(":")
    wanted = f"--method: expected one of {', '.join(NAMES)}, or module:function of yours"
    if not colon:
        raise ValueError(f"{wanted}, got {method!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{wanted}, got {method!r}: {error}") from None


def build(
    options: Any, problem: Problem, learning_rate: optax.ScalarOrSchedule
) -> hj.Algorithm | Baseline:
    """Build the method that an `experiments.job.Options` asks for.

    A method of yours is ``function(loss_fn, learning_rate, **options) -> Algorithm``, with the
    keywords of `hiso_jax.scalar_algorithm` but for the rule.
    """
    method, loss_fn = options.method, problem.loss_fn
    common: dict[str, Any] = dict(local_steps=options.local_steps, trainable=problem.trainable)
    if method in FIRST_ORDER:
        return baselines.first_order(method, loss_fn, learning_rate, **common)
    common |= dict(
        num_perturbations=options.num_perturbations,
        smoothing=options.smoothing,
        distribution=options.distribution,
    )
    if method == "fedzo":
        return baselines.fedzo(loss_fn, learning_rate, **common)
    common |= dict(estimator=options.estimator, lazy=problem.lazy)
    if options.per_client_directions:
        common |= dict(per_client_directions=options.clients_per_round)
    if options.upper_directions:
        common |= dict(upper=_upper(options, problem))
    if method == "hiso":
        common |= dict(decay=options.decay)
    return (SCALAR.get(method) or _yours(method))(loss_fn, learning_rate, **common)


def _upper(options: Any, problem: Problem) -> list[hj.Split]:
    if problem.upper is None:
        raise ValueError(f"--upper-directions: {problem.name} has no upper part of its own")
    splits, before = [], None
    for count, layers in zip(options.upper_directions, options.upper_layers, strict=True):
        cut = problem.upper(layers, before)
        splits.append(hj.Split(cut.trunk, cut.head, cut.leaves, count, cut.between))
        before = layers
    return splits


def hiso_all(loss_fn: Any, learning_rate: Any, **options: Any) -> hj.Algorithm:
    """HiSo whose H is moved by every local step; ``--method experiments.methods:hiso_all``."""
    return hj.federated_hiso(loss_fn, learning_rate, update_steps="all", **options)


def forward_passes(algorithm: hj.Algorithm | Baseline, shares: Sequence[float] = ()) -> float:
    """Forward passes of a client a round; a gradient counts as three.

    One that starts at an upper part counts as that part's share of a pass; so does the way from
    one cut to the next.
    """
    if isinstance(algorithm, Baseline):
        return algorithm.config["local_steps"] * algorithm.config["forward_passes"]
    spec = algorithm.spec
    own = spec.directions
    each = estimators.forward_passes(spec.estimator.config["estimator"], own.per_client)
    if own.still is not None:
        counts = [part.directions for part in own.still.parts]
        each -= sum(n * (1 - share) for n, share in zip(counts, shares, strict=True))
        each += shares[0] - shares[-1]
    return spec.steps * each


def shares(options: Any, problem: Problem) -> list[float]:
    """How much of a forward pass each upper part of the options takes."""
    if not options.upper_directions:
        return []
    return [share(problem, layers) for layers in options.upper_layers]


def share(problem: Problem, layers: int) -> float:
    """How much of a forward pass lies in the last `layers` and above, by multiplications."""
    if problem.upper is None:
        return 1.0
    own = problem.clients[problem.clients.names[0]]
    few = {k: v[:1] for k, v in own.items()} | {"weight": np.ones(1, np.float32)}
    batch, params = problem.prepare(few), problem.params
    cut = problem.upper(layers)
    kept = jax.eval_shape(cut.trunk, params, batch)
    whole = multiplications(problem.loss_fn, params, batch)
    return multiplications(cut.head, params, kept) / whole


def floats(algorithm: hj.Algorithm | Baseline, problem: Problem) -> int:
    """Floats that a client sends up a round."""
    if isinstance(algorithm, Baseline):
        return sum(x.size for x in algorithm.trainable(problem.params).values())
    return math.prod(algorithm.spec.sent)
