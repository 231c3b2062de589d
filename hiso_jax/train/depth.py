"""`--upper-directions auto`: which layers most directions move, from one look before the run.

The look takes scalars along directions of the last 1, 2, 4, ... layers and of everything, on the
batches of one round. Per direction, the decrease of the loss at the best rate goes with the mean
square of a scalar over the trace of the curvature. That ratio was found to change little with the
number of layers (docs/lab/results.md), so the fewest layers are the best buy, for they cost the
smallest share of a pass, as long as enough is to be learned there: at least `ENOUGH` of the squared
derivative along directions of everything.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import methods, report, settings

ENOUGH = 0.15
"""Share of the squared derivative that the layers hold at least: of four tasks, one had 4 % in the
last layer and went better with two; the others had 24 % and more, and went best with one."""
DEAREST = 1 / 3
"""Share of a forward pass above which nothing is gained: on four tasks layers for 0.28 and less
were worth it, on one those for 0.44 were not."""
WHOLE = 0.2
"""Share of a round's work for directions of everything, which go on when the layers' part is used
up."""
MOST = 4
"""Upper directions at most, in multiples of P: noise has a price too."""
COUNT = 16
"""Directions that the look takes of each kind."""


class Depth(NamedTuple):
    """What directions of the last layers showed."""

    layers: int
    share: float  # of a forward pass
    square: float  # of a scalar, in the mean
    held: float  # of the square along directions of everything


def look(options: settings.Options, problem: Problem) -> list[Depth]:
    """Measure the last 1, 2, 4, ... layers, up to the first that hold enough or cost too much.

    Args:
      options: of the job; give the batches, the noise and the smoothing.
      problem: which has an upper part.

    Returns:
      What was looked at; the last may be of use.
    """
    assert problem.upper is not None
    seed, clients = options.seed, problem.clients
    names = clients.sample(options.clients_per_round, 0, seed, options.sampling)
    batches = problem.prepare(clients.batches(names, 0, options.batch_size, 1, seed))

    def square(**upper: Any) -> float:
        """Mean square of a scalar; the same noise in the leaves that move, whichever they are."""
        alg = hj.decomfl(
            problem.loss_fn,
            0.0,
            num_perturbations=COUNT,
            smoothing=options.smoothing,
            distribution=options.distribution,
            trainable=problem.trainable,
            lazy=problem.lazy,
            **upper,
        )
        # Beside the run's own noise, which follows from its seed.
        state = alg.init(problem.params, jax.random.fold_in(jax.random.key(seed), 1))
        return float(jnp.square(jax.jit(alg.probe)(state, batches)).mean())

    every, found = square(), []
    for layers in (2**i for i in itertools.count()):
        try:
            cut = problem.upper(layers)
        except ValueError:  # there are not so many
            break
        share = methods.share(problem, layers)
        if share > DEAREST:
            break
        upper = hj.Split(cut.trunk, cut.head, cut.leaves, COUNT)
        own = square(upper=upper)
        found.append(Depth(layers, share, own, own / every))
        if own >= ENOUGH * every:
            break
    return found


def passes(depths: list[Depth]) -> float:
    """Forward passes that a client took for the look."""
    return 2 + COUNT + sum(1 + COUNT * depth.share for depth in depths)


def divide(work: int, share: float) -> tuple[int, int]:
    """Directions of everything and of the upper layers that cost `work` passes at most.

    Example:
      >>> divide(5, 1 / 6), divide(20, 0.28), divide(10, 0.05)
      ((1, 20), (4, 57), (8, 40))
    """
    wholes = max(1, round(WHOLE * work))
    upper = min(int((work - wholes) / share), MOST * work)
    return max(wholes, int(work - upper * share)), upper


def settle(options: Any, problem: Problem) -> Any:
    """Options with numbers in the place of ``auto``; looks, and says what was found.

    Raises:
      ValueError: the problem has no upper part.
    """
    if options.upper_directions != "auto":
        return options
    plain = dict(upper_directions=(), upper_layers=(1,))
    if all(map(methods.sends_models, options.methods)):  # which take none
        return dataclasses.replace(options, **plain)
    if problem.upper is None:
        raise ValueError(f"--upper-directions: {problem.name} has no upper part of its own")
    with report.progress() as bar:
        bar.add_task("looking for a depth", total=None, status="")
        depths = look(options, problem)
    for depth in depths:
        report.say(
            f"The last {depth.layers} layer{'s' * (depth.layers > 1)}: {depth.share:.1%} of a "
            f"pass, {depth.held:.0%} of the squared derivative"
        )
    if not depths or not np.isfinite(depths[-1].held) or depths[-1].held < ENOUGH:
        report.say("No upper directions: they would hold too little, or cost too much")
        return dataclasses.replace(options, **plain)
    wholes, upper = divide(options.num_perturbations, depths[-1].share)
    report.say(
        f"{wholes} direction{'s' * (wholes > 1)} of everything and {upper} of the last "
        f"{depths[-1].layers}, for the passes of {options.num_perturbations}; the look took "
        f"{passes(depths):.0f} passes"
    )
    return dataclasses.replace(
        options,
        num_perturbations=wholes + upper,
        upper_directions=(upper,),
        upper_layers=(depths[-1].layers,),
    )
