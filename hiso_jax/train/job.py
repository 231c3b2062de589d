"""One job: it trains, and leaves a folder with the model, the ledger and what was measured."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax._engine import meshes
from hiso_jax.federation import baselines
from hiso_jax.ledger import digests, snapshots
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import (
    depth,
    ending,
    folders,
    logs,
    measure,
    methods,
    notes,
    page,
    report,
    resume,
    selecting,
    settings,
)  # fmt: skip
from hiso_jax.train.progress import duration
from hiso_jax.train.report import console
from hiso_jax.train.settings import COMPARED, Options, settle

__all__ = [
    "COMPARED", "Options", "algorithm", "main", "rates_of", "rounds", "run", "settle", "train",
]  # fmt: skip


def algorithm(
    options: Options, problem: Problem, learning_rate: float
) -> hj.Algorithm | baselines.Baseline:
    """Build the method that the options ask for; its rate falls linearly to 0."""
    schedule = optax.linear_schedule(learning_rate, 0.0, options.rounds)
    return methods.build(options, problem, schedule)


def rounds(
    options: Options, problem: Problem, alg: Any, state: hj.State, ledger: Any = None
) -> Iterator[federation.Report]:
    """Simulate the rounds that the options ask for, from `state` on.

    Args:
      options: of the job.
      problem: whose clients take part.
      alg: the method.
      state: to begin at.
      ledger: of the run, whose header says how masked rounds are made.
    """
    return federation.run(
        alg,
        state,
        problem.clients,
        rounds=options.rounds,
        clients_per_round=options.clients_per_round,
        batch_size=options.batch_size,
        local_steps=options.local_steps,
        seed=options.seed,
        sampling=options.sampling,
        dropout=options.dropout,
        prepare=problem.prepare,
        mesh=meshes.make(*options.mesh) if options.mesh else None,
        summed=_summed(options, ledger),
    )


def _summed(options: Options, ledger: Any) -> Any:
    """What makes the records of masked rounds, or of such with noise; None: nothing does.

    Its secret is kept beside the ledger: a run that goes on has the same.
    """
    if not options.secure and options.epsilon is None:
        return None
    if ledger is None:
        raise ValueError("--secure, --epsilon: for jobs, which have a ledger")
    from hiso_jax.federation import private

    terms, name = private.terms_of(ledger), private.run_name(ledger)
    secret = hj.privacy.of_run(hj.privacy.secret(options.out / "secret"), name)
    return private.Simulated(terms, secret, name, private.accountant_of(ledger))


class Trained(NamedTuple):
    """What the rounds left."""

    state: hj.State
    done: int
    rows: list[dict[str, Any]]  # of metrics.jsonl
    traffic: federation.Traffic
    seconds: list[float]  # of the rounds of this process
    sizes: tuple[int, int]  # bytes of the records, and of the compact ledger
    broken: str  # why the rounds ended early, if a NaN or a budget was the reason
    stopped: bool  # by Ctrl-C
    epsilon: float | None  # given away, under --epsilon


def _rounds(options: Options, problem: Problem, alg: Any, size: int, base: measure.Base) -> Trained:
    """Take all rounds that are to do; each is recorded before the next begins."""
    folder, metric = options.out, problem.metric
    seconds: list[float] = []
    broken = ""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(report.progress())
        ledger, state, rows = resume.open_run(options, problem, alg, bar)
        stack.enter_context(ledger)
        selecting.restore(options, problem, alg, state, ledger)
        traffic = resume.account(options, problem, alg, ledger, size)
        if not rows:
            rows.append({"round": 0, "dev_loss": base.dev[0], f"dev_{metric}": base.dev[1]})
        about = {"task": problem.name} | dataclasses.asdict(options)
        note = stack.enter_context(logs.opened(folder, rows, options.log, about))
        done, last_dev = ledger.rounds, [r[f"dev_{metric}"] for r in rows if "dev_loss" in r][-1]
        task = bar.add_task(
            methods.title(options.method), total=options.rounds, completed=done, status="compiling"
        )
        start = time.perf_counter()
        stop = stack.enter_context(folders.stop_on_ctrl_c())
        try:
            for step in rounds(options, problem, alg, state, ledger):
                seconds.append(time.perf_counter() - start)
                state = step.state
                if step.bad:
                    continue  # it moved nothing, and is not part of the run
                selecting.keep(options, problem, step.round)
                done = step.round
                traffic.ask(step.names, done - 1, step.reported)
                up, down = sum(traffic.up.values()), sum(traffic.down.values())
                loss = float(step.metrics.loss)  # NaN if nobody answered
                row: dict[str, Any] = dict(
                    round=done,
                    loss=loss,
                    clients=step.names,
                    uplink_bytes=up,
                    downlink_bytes=down,
                    seconds=round(seconds[-1], 4),
                )
                looked = done % options.eval_every == 0 or done == options.rounds
                if looked:
                    dev, _ = measure.evaluate(problem, base.score, state.params, "dev", bar)
                    row.update({"dev_loss": dev[0], f"dev_{metric}": dev[1]})
                    last_dev = dev[1]
                start = time.perf_counter()  # what the commit takes is in the next round's time
                # The row comes first: a record without its row could not be given one later.
                note(row)
                rows.append(row)
                ledger.append(
                    step.metrics.record,
                    hj.digest(state),
                    step.metrics.learning_rate,
                    step.reported,
                    step.event,
                )
                if done % options.snapshot_every == 0 or done == options.rounds:
                    snapshots.save(folder / "snapshots", alg, state)
                status = (
                    f"{report.loss_of(loss)}  dev {report.figure(metric, last_dev)}  "
                    f"{_pace(np.median(seconds[-20:]))}  "
                    f"up {report.size(up)}  down {report.size(down)}"
                )
                bar.update(task, completed=done, status=status)
                if looked and not console.is_terminal:
                    report.say(f"round {done}/{options.rounds}  {status}")
                if stop.is_set():
                    break
        except (FloatingPointError, hj.privacy.BudgetSpent) as error:
            report.fail(error)
            broken = str(error)
        sizes = ledger.records().nbytes, ledger.export(folder / "ledger.safetensors")
        epsilon = _epsilon(options, ledger)
    return Trained(state, done, rows, traffic, seconds, sizes, broken, stop.is_set(), epsilon)


def _epsilon(options: Options, ledger: Any) -> float | None:
    """What the recorded rounds have given away of the client that was asked most."""
    if options.epsilon is None:
        return None
    from hiso_jax.federation import private

    return private.accountant_of(ledger).epsilon()


def _pace(seconds: Any) -> str:
    """How fast rounds are, as people say it."""
    return f"{1 / seconds:.1f} rounds/s" if seconds < 1 else f"{duration(seconds)} per round"


def train(
    options: Options, problem: Problem, learning_rate: float, base: measure.Base | None = None
) -> dict[str, Any]:
    """Run one method, or go on with it, and write its folder; return the summary.

    The weights are written before anything is measured: what fails then costs a number, not
    the run. Its reason is in the summary, under ``failed``. What is returned has ``rows`` as well,
    and whether it was ``interrupted`` by Ctrl-C.
    """
    folder, clients, metric = options.out, problem.clients, problem.metric
    base = measure.base_of(problem) if base is None else base
    folder.mkdir(parents=True, exist_ok=True)
    alg = algorithm(options, problem, learning_rate)
    size = sum(x.size for x in alg.trainable(problem.params).values())
    passes = methods.forward_passes(alg, methods.shares(options, problem))
    looks = selecting.passes(options, problem)
    selecting.say(options, problem, passes)
    measure.say_how_long(options, problem, passes + looks, base)
    found = _rounds(options, problem, alg, size, base)
    params, traffic, seconds = found.state.params, found.traffic, found.seconds
    problem.save(folder, params)
    traffic.catch_up(clients.names, found.done)  # everybody ends with the model
    after, measured, failed = (np.nan, np.nan), {}, []
    with _failing(failed):
        with report.progress() as bar:
            after, _ = measure.evaluate(problem, base.score, params, "test", bar)
    with _failing(failed):
        pairs = zip(problem.answers(problem.params), problem.answers(params), strict=True)
        answers = [before._asdict() | {"before": before.written, "written": after.written}
                   for before, after in pairs]  # fmt: skip
        if answers:
            report.write_json(folder / "answers.json", answers)
            console.print(report.answers(methods.title(options.method), answers))
    with _failing(failed):
        whole = problem.measure(params)
        measured = {f"{name}_before": x for name, x in problem.measure(problem.params).items()}
        measured |= whole
    each = [row["seconds"] for row in found.rows if "seconds" in row]
    steady = float(np.median(each[1:] or each or [0.0]))
    summary: dict[str, Any] = dict(
        method=options.method,
        task=problem.name,
        rounds=found.done,
        digest=digests.text(hj.digest(found.state)),
        learning_rate=learning_rate,
        seed=options.seed,
        clients=len(clients),
        parameters=sum(x.size for x in jax.tree.leaves(problem.params)),
        trained_parameters=size,
        metric=metric,
        **{f"{metric}_before": base.test[1], metric: after[1]},
        loss_before=base.test[0],
        loss=after[0],
        **measured,
        uplink_bytes_per_client=sum(traffic.up.values()) / len(clients),
        downlink_bytes_per_client=sum(traffic.down.values()) / len(clients),
        fedavg_bytes_per_client=8 * size * found.done * options.clients_per_round / len(clients),
        passes_per_round=passes + looks,
        shipped_bytes=found.sizes[1],
        payload_bytes=found.sizes[0],
        seconds_per_round=steady,
        compile_seconds=max(seconds[0] - steady, 0.0) if seconds else 0.0,
    )
    if found.epsilon is not None:
        summary |= {"epsilon_spent": found.epsilon, "delta": options.delta}
    summary |= {"secure": True} if options.secure else {}
    summary |= {"stopped": found.broken} if found.broken else {}
    summary |= {"failed": failed} if failed else {}
    if options.select is not None:
        summary |= selecting.recipe(problem) | {"look_passes_per_round": looks}
    report.write_json(folder / "summary.json", summary)
    report.draw(
        {methods.title(options.method): found.rows}, metric, problem.name, folder / "curve.png"
    )
    page.write(folder)
    return summary | {"rows": found.rows, "interrupted": found.stopped}


@contextlib.contextmanager
def _failing(failed: list[str]) -> Iterator[None]:
    """Note what goes wrong in a measurement, and go on."""
    try:
        yield
    except Exception as error:
        failed.append(f"{type(error).__name__}: {error}")


def _picture_split(options: Options, problem: Problem) -> None:
    """Draw who has what: examples of every label, client by client. It does not change."""
    clients, path = problem.clients, options.out / "split.png"
    if problem.classes:
        report.write_json(options.out / "labels.json", report.counts(problem))
    if not path.exists():
        labels = {n: clients[n]["label"] for n in clients.names if "label" in clients[n]}
        try:
            report.draw_split(labels, clients.sizes, path, problem.classes)
        except (TypeError, ValueError) as error:  # names that no picture can have
            report.fail(f"Not drawn: split.png: {error}")


def rates_of(options: Options, learning_rates: dict[str, float]) -> dict[str, float]:
    """Methods to run, each with its peak learning rate."""
    given = {}
    if options.learning_rate is not None:
        given = dict.fromkeys(COMPARED if options.compare else [options.method],
                              options.learning_rate)  # fmt: skip
    rates = learning_rates | given
    for method in options.methods:
        methods.check(method)
        if method not in rates:
            raise ValueError(f"--learning-rate: none was tuned for {method} here; give one")
    return {method: rates[method] for method in options.methods}


def run(options: Options, problem: Problem, learning_rates: dict[str, float]) -> None:
    """Run what the options ask for, print the table, and say where the files are."""
    saved: dict[str, Any] | None = None
    with report.door(options.resume):  # nothing is written or moved before all of it holds
        if options.resume is None:
            rates = rates_of(options, learning_rates)
        else:
            saved = settings.read(options.out)
            rates = saved["learning_rates"]
        settings.check(options)
        if unmasked := [*filter(methods.sends_models, options.methods)]:
            for name, given in (("secure", options.secure), ("epsilon", options.epsilon)):
                if given:
                    raise ValueError(f"--{name}: {unmasked[0]} sends models, and it is for scalars")
        settings.check_out(options)
        settings.check_clients(options, len(problem.clients))
        unused = notes.not_used(options) if saved is None else []
        options = depth.settle(options, problem)
        problem = selecting.settle(options, problem)
        for method, rate in rates.items():
            alg = algorithm(dataclasses.replace(options, method=method), problem, rate)
            jax.eval_shape(alg.init, problem.params, resume.root_key(options))
            if saved is None and (terms := resume.terms_of(options, problem)) is not None:
                terms.check(alg.spec)  # pyright: ignore[reportAttributeAccessIssue]
        if options.mesh:
            meshes.make(*options.mesh)
        report.show_data(problem)
        for name in methods.not_used(options):
            title, option = methods.title(options.method), name.replace("_", "-")
            report.say(f"Note: {title} does not use --{option}", style="yellow")
        for note in (*unused, *notes.untuned(options)):
            report.say(f"Note: {note}", style="yellow")
        made_of = resume.made_of(problem)
        if saved and (other := [k for k, v in made_of.items() if saved.get(k, v) != v]):
            what = resume.MADE_OF[other[0]]
            raise ValueError(f"--resume {options.out}: {what} not what the run began with")
        base = measure.base_of(problem)
    summaries = []
    with ending.safe(options.out):
        if saved is None:
            folders.make_room(options.out)
        with folders.alone(options.out):
            settings.write(options, rates, made_of, saved)
            _picture_split(options, problem)
            for method, rate in rates.items():
                out = options.out / method if len(rates) > 1 else options.out
                own = dataclasses.replace(options, method=method, out=out)
                summaries.append(train(own, problem, rate, base))
                if summaries[-1]["interrupted"]:
                    break  # it was asked to stop, not to begin with the next one
            if len(rates) > 1:
                curves = {methods.title(s["method"]): s["rows"] for s in summaries}
                report.draw(curves, problem.metric, problem.name, options.out / "curve.png")
                own = ("rows", "interrupted")
                bare = [{k: v for k, v in s.items() if k not in own} for s in summaries]
                report.write_json(options.out / "summary.json", bare)
    ending.say(options, summaries)


def main(
    kind: type[Options], build: Callable[[Any], Problem], learning_rates: dict[str, float]
) -> None:
    """Parse the command line, build the problem and run."""
    import tyro

    arguments = settings.modern(sys.argv[1:])
    options = settle(tyro.cli(kind, args=arguments), settings.given(arguments))
    with report.door(options.resume):
        settings.check(options)
        settings.check_out(options)
        settings.check_clients(options)  # data and model may take minutes
        if options.resume is None:
            rates_of(options, learning_rates)
        report.say("Reading data and model ...")
        problem = build(options).at_most(options.eval_examples)
    run(options, problem, learning_rates)
