"""`--upper-directions auto`: which layers most directions move, from one look before the run.

The look takes scalars along directions of the last 1, 2, 4, ... layers and of everything, on the
batches of one round. Per direction, the decrease of the loss at the best rate goes with the mean
square of a scalar over the trace of the curvature. That ratio was found to change little with the
number of layers (docs/lab/results.md), so directions of the fewest layers are the best buy, for
they cost the smallest share of a pass, until what is to be learned there is used up: about the
layers' share of the squared derivative. `worth` weighs the one against the other.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hiso_jax as hj
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import methods, report, settings

GAINED = 0.1
"""Of what is to be gained, the part that a run with directions of everything takes. At a tenth, the
choices on the digits, MNIST and MiniLM are those that went best there (docs/lab/results.md)."""
CLEARLY = 1.2
"""How many times the worth of directions of everything is worth while: a look is a few scalars."""
DEAREST = 0.5
"""Share of a forward pass that is not worth while any more."""
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
    held: float  # of the square along directions of everything; 0 where that is not finite


def look(options: settings.Options, problem: Problem) -> list[Depth]:
    """Measure the last 1, 2, 4, ... layers, until more are worth less whatever they hold.

    Args:
      options: of the job; give the batches, the noise and the smoothing.
      problem: which has an upper part.

    Returns:
      What was looked at, the fewest layers first.
    """
    assert problem.upper is not None
    seed, clients, work = options.seed, problem.clients, options.num_perturbations
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
        share = max(methods.share(problem, layers), 1e-6)  # without a product it costs nothing
        most = max((worth(work, depth.share, depth.held) for depth in found), default=0.0)
        if share > DEAREST or worth(work, share, 1.0) < most:
            break
        upper = hj.Split(cut.trunk, cut.head, cut.leaves, COUNT)
        own = square(upper=upper)
        held = own / every if every else math.nan
        found.append(Depth(layers, share, own, held if math.isfinite(held) else 0.0))
    return found


def passes(depths: list[Depth]) -> float:
    """Forward passes that a client took for the look."""
    return 2 + COUNT + sum(1 + COUNT * depth.share for depth in depths)


def divide(work: int, share: float, held: float) -> tuple[int, int]:
    """Directions of everything and of the upper layers that cost `work` passes at most.

    Upper ones, until the next is worth no more per pass than one of everything.

    Args:
      work: P, at least 1.
      share: of a forward pass that an upper direction costs, above 0.
      held: share of the squared derivative that the layers hold.

    Example:
      >>> divide(5, 1 / 6, 0.39), divide(20, 0.28, 0.95), divide(10, 0.05, 0.44)
      ((1, 20), (4, 57), (8, 40))
      >>> divide(5, 1 / 30, 0.065)  # most of a cheap layer's part is taken by a few
      (4, 20)
    """
    least = max(1, round(WHOLE * work))
    wanted = min(held, 1) * work / GAINED * -math.log(share)
    upper = min(wanted, MOST * work, (work - least) / share)
    wholes = max(least, int(work - upper * share))
    return wholes, min(int((work - wholes) / share), MOST * work)


def worth(work: int, share: float, held: float) -> float:
    """What a run takes of all that is to be gained, if it divides its passes like that.

    Directions of everything, `work` per round, take `GAINED`. One of the layers takes as much as
    one of everything at first, and all of them no more than the layers' share in the end.

    Example:
      >>> round(worth(5, 1 / 6, 0.39), 2), round(worth(5, 1 / 30, 0.015), 2)
      (0.27, 0.09)
    """
    wholes, upper = divide(work, share, held)
    each, held = GAINED / work, min(held, 1)
    return wholes * each - (held and held * math.expm1(-upper * each / held))


def choose(work: int, depths: list[Depth]) -> Depth | None:
    """The one that is worth most; None if directions of everything are worth about as much.

    Example:
      >>> choose(20, [Depth(1, 0.004, 5.0, 0.05), Depth(2, 0.28, 95.0, 0.95)]).layers
      2
    """
    worths = [worth(work, depth.share, depth.held) for depth in depths]
    most = max(worths, default=0.0)
    return depths[worths.index(most)] if most > CLEARLY * GAINED else None


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
    work = options.num_perturbations
    best = choose(work, depths)
    if best is None:
        report.say("No upper directions: the layers hold too little, or cost too much")
        return dataclasses.replace(options, **plain)
    wholes, upper = divide(work, best.share, best.held)
    report.say(
        f"{wholes} direction{'s' * (wholes > 1)} of everything and {upper} of the last "
        f"{best.layers}, for the passes of {work}; the look took {passes(depths):.0f} passes"
    )
    return dataclasses.replace(
        options,
        num_perturbations=wholes + upper,
        upper_directions=(upper,),
        upper_layers=(best.layers,),
    )
