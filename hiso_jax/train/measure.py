"""What a model is worth on dev and test, how long that took, and what a run will take."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from hiso_jax import federation
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import methods, report
from hiso_jax.train.progress import duration
from hiso_jax.train.settings import Options
from hiso_jax.train.work import multiplications


class Base(NamedTuple):
    """What was measured before the first round."""

    score: Any  # jitted
    dev: tuple[float, float]  # loss and metric
    test: tuple[float, float]
    seconds: float  # for an example of an evaluation, compiling not counted; NaN: not known


EVALUATED = 64
"""Examples that are evaluated at a time."""
WORTH_SAYING = 20.0
"""Seconds of a run of which it is said before how long it will take."""


def evaluate(
    problem: Problem, score: Any, params: Any, split: str, bar: Any
) -> tuple[tuple[float, float], float]:
    """Loss and metric on the dev or test split, and the median seconds for an example."""
    data = problem.dev if split == "dev" else problem.test
    task = bar.add_task(f"measuring on {split}", total=len(next(iter(data.values()))), status="")
    times = [time.perf_counter()]

    def on_batch(done: int, size: int) -> None:
        times.append(time.perf_counter())
        bar.update(task, completed=done, total=size)

    sums = federation.evaluate(score, params, data, EVALUATED, problem.prepare, on_batch)
    times.append(time.perf_counter())
    bar.remove_task(task)
    # A batch is done when the next has been prepared; the first is compiled.
    seconds = np.median(np.diff(times[2:])) if len(times) > 4 else np.nan
    return problem.metric_value(sums), float(seconds) / EVALUATED


def base_of(problem: Problem) -> Base:
    """Measure the model as it comes.

    Raises:
      ValueError: its own loss is NaN or infinite: no difference of losses says anything then.
    """
    score = jax.jit(problem.score)
    with report.progress() as bar:
        dev, first = evaluate(problem, score, problem.params, "dev", bar)
        test, second = evaluate(problem, score, problem.params, "test", bar)
    for split, (loss, _) in (("dev", dev), ("test", test)):
        if not np.isfinite(loss):
            what = "NaN" if np.isnan(loss) else "infinite"
            raise ValueError(
                f"the model's own loss on the {split} split is {what} before any step; look for "
                "weights that overflow (--dtype float32 has more room than float16) or are NaN"
            )
    known = [x for x in (first, second) if np.isfinite(x)]
    return Base(score, dev, test, min(known, default=np.nan))


def say_how_long(options: Options, problem: Problem, passes: float, base: Base) -> None:
    """Estimate what the run will take, from what an evaluation took.

    Args:
      options: of the job.
      problem: what is trained.
      passes: forward passes of a client a round.
      base: what was measured before.
    """
    if not np.isfinite(base.seconds):
        return
    few = {k: v[:EVALUATED] for k, v in problem.dev.items()}
    few = problem.prepare(few | {"weight": np.ones(len(next(iter(few.values()))), np.float32)})
    work = multiplications(problem.score, problem.params, few) / len(few["weight"])
    everyone = problem.clients.selecting(None)
    batch = everyone.batches(everyone.names[:1], 0, options.batch_size)
    one = jax.tree.map(lambda x: x[0, 0], problem.prepare(batch))
    passes *= options.clients_per_round
    a_round = passes * multiplications(problem.loss_fn, problem.params, one) / work * base.seconds
    looks = options.rounds // options.eval_every
    measured = base.seconds * len(next(iter(problem.dev.values())))
    whole = options.rounds * a_round + looks * measured
    if whole > WORTH_SAYING:
        report.say(
            f"{methods.title(options.method)}: the passes of a round take about "
            f"{duration(a_round)} here, those of {options.rounds} rounds "
            f"{duration(options.rounds * a_round)}, and noise up to as much; an evaluation of dev "
            f"{duration(measured)}, {looks} of them {duration(looks * measured)}"
        )
