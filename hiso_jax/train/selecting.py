"""`--select`: which of a client's examples are learned from; what that costs, and its way back."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import hiso_jax as hj
from hiso_jax.federation import Chosen, Select, selecting, server
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import methods, report


def check(options: Any) -> None:
    """Raise unless --select, --budget and --renew are in their ranges and go together."""
    if options.select is None:
        default = type(options)()
        for name in ("budget", "renew"):
            if getattr(options, name) != getattr(default, name) and default.select is None:
                raise ValueError(f"--{name}: of --select, which is not given")
        return
    try:
        name, own = methods.parse(options.select)
        selecting.check(name, options.budget, options.renew, own)
    except (TypeError, ValueError) as error:
        option, colon, rest = str(error).partition(":")
        option = {"budget": "--budget", "renew": "--renew"}.get(option, "--select")
        raise ValueError(f"{option}:{rest if colon else ' ' + str(error)}") from None
    if options.distributed is not None:
        raise ValueError("--select: clients look at their examples in one process; expected none "
                         f"with --distributed, got {options.select}")  # fmt: skip


def settle(options: Any, problem: Problem) -> Problem:
    """The problem with clients that choose as the options ask for.

    Raises:
      ValueError: the problem gives nothing to choose by.
    """
    if options.select is None:
        return problem
    name, own = methods.parse(options.select)
    needs = name not in ("uniform", "balanced")
    if needs and problem.examples is None:
        raise ValueError(f"--select: {problem.name} tells nothing of its examples; expected "
                         f"uniform or balanced, got {options.select}")  # fmt: skip
    columns = problem.clients.columns
    if name == "balanced" and "label" not in columns:
        raise ValueError(f"--select: balanced goes by classes, and {problem.name} has none")
    select = Select(
        name, problem.examples, options.budget, options.renew, prepare=problem.prepare,
        trainable=problem.trainable, **own,
    )  # fmt: skip
    if needs:  # whether the task gives what the method needs, without computing it
        few = {k: v[:1] for k, v in columns.items()}
        select.check(problem.params, few)
    return problem._replace(clients=problem.clients.selecting(select))


def passes(options: Any, problem: Problem) -> float:
    """Forward passes of a batch, a client and round, that looking at examples takes on average."""
    looked = problem.clients.look_passes(
        options.rounds, options.clients_per_round, options.seed, options.sampling
    )
    return looked / (options.rounds * options.clients_per_round * options.batch_size)


def say(options: Any, problem: Problem, training: float) -> None:
    """Print how much is kept, when it is renewed, and what that costs."""
    if (select := problem.clients.select) is None:
        return
    kept = sum(map(select.size, problem.clients.sizes.values()))
    size = sum(problem.clients.sizes.values())
    report.say(
        f"Clients learn from {kept:,} of {size:,} examples, by {options.select}, anew every "
        f"{select.renew} rounds: {passes(options, problem):.1f} forward passes of a client a round "
        f"beside the method's {training:.1f}"
    )


def recipe(problem: Problem) -> dict[str, Any]:
    """What a ledger's header is told, under ``select``: never which examples."""
    select = problem.clients.select
    return {} if select is None else {"select": select.recipe}


def _path(folder: Path, round: int) -> Path:
    return folder / "chosen" / f"round-{round:08d}.npz"


def keep(options: Any, problem: Problem, done: int) -> None:
    """Write down what clients chose, after its first round; delete what no run goes back to."""
    chosen = problem.clients.chosen
    if chosen is None or chosen.round != done - 1:
        return
    chosen.save(path := _path(options.out, chosen.round))
    oldest = done - 3 * options.snapshot_every - 2 * options.renew
    for old in path.parent.glob("round-*.npz"):
        if int(old.stem.partition("-")[2]) < oldest:
            old.unlink()


def restore(options: Any, problem: Problem, alg: Any, state: hj.State, ledger: Any) -> None:
    """Give the clients of a run that goes on what they chose before.

    From the run's folder; where it is not there, from the ledger: the records lead to the model
    that they chose with, and so to the same choice.

    Raises:
      ValueError: it is not there, and the method has no ledger to find it with.
    """
    clients, done = problem.clients, int(state.round)
    if clients.select is None or done >= options.rounds or clients.due(done):
        return
    start = done - done % options.renew
    found = Chosen.load(_path(options.out, start), clients)
    if found is not None and found.round == start:
        clients.chosen = found
        return
    if not isinstance(ledger, hj.Ledger):
        raise ValueError(
            f"{_path(options.out, start)}: needed to go on, and not what clients chose"
        )
    begin = alg.init(jax.tree.map(jnp.copy, problem.params), state.key)
    records = ledger.records()
    until = records._replace(
        scalars=records.scalars[:start], digests=records.digests[:start],
        learning_rates=None if records.learning_rates is None else records.learning_rates[:start],
    )  # fmt: skip
    begin = server.catch_up(alg, begin, until)
    period = range(start, min(start + options.renew, options.rounds))
    asked = clients.asked(period, options.clients_per_round, options.seed, options.sampling)
    clients.choose(begin.params, asked, start, options.seed)
