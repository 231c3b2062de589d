"""One job: its options, the folder a run leaves behind, and how a stopped run goes on."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hiso_jax as hj
from experiments import baselines, folders, methods, report
from experiments.problem import Problem
from experiments.report import console
from hiso_jax import directions, files, fingerprint, meshes, server, simulation, snapshots

COMPARED = ("hiso", "decomfl")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every job."""

    method: str = "hiso"
    """The algorithm to run: hiso, decomfl, rms, mezo, meazo, fzoo, hizoo, momentum, adam, fedkseed;
    fedavg, fedadam, fedyogi, fedadagrad, fedzo, which send models; or module:function of yours."""
    compare: bool = False
    """Run HiSo and DeComFL on the same seeds and draw both curves."""
    rounds: int = 200
    """Communication rounds."""
    out: Path = Path("runs/job")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    resume: Path | None = None
    """Go on with the run in this folder, with the options it was started with."""
    seed: int = 0
    """Of the noise, of who takes part and of the batches."""
    learning_rate: float | None = None
    """Peak learning rate, falling linearly to 0; by default the tuned one of the method."""
    clients_per_round: int = 8
    """Clients sampled a round (C)."""
    sampling: Literal["uniform", "size"] = "uniform"
    """Which clients take part: all alike, or in proportion to their examples."""
    dropout: float = 0.0
    """Chance that a sampled client does not answer."""
    batch_size: int = 4
    """Examples of a client in a local step."""
    local_steps: int = 1
    """Local steps of a client (K)."""
    num_perturbations: int = 5
    """Scalars a local step (P); an update costs P + 1 forward passes."""
    own_directions: bool = False
    """Every client has directions of its own: more for the server to average, no more to do."""
    upper_directions: int = 0
    """Of the scalars of a local step, so many along directions that move the upper layers only,
    whose passes start from the activations below them."""
    upper_layers: int = 1
    """How many layers those are."""
    smoothing: float = 1e-3
    """Finite-difference step (mu)."""
    estimator: Literal["forward", "central"] = "forward"
    """Differences: forward costs P + 1 forward passes, central 2 P."""
    decay: float = 0.95
    """Weight of the old curvature (HiSo only)."""
    distribution: directions.Distribution = "rademacher"
    """Noise: normal is the paper's, near_normal and rademacher are cheaper."""
    eval_every: int = 25
    """Rounds between evaluations on the dev split."""
    snapshot_every: int = 50
    """Rounds between snapshots; a resumed run replays at most as many."""
    mesh: tuple[int, int] | None = None
    """Devices for clients, and for parts of the model: 8 1 has eight with the whole model."""
    distributed: str | None = None
    """Processes that train together: auto (TPU pods, clusters), or host:port,processes,number."""


OWN = ("out", "resume", "distributed")  # of a process, not of the run
SomeOptions = TypeVar("SomeOptions", bound=Options)


def settle(options: SomeOptions) -> SomeOptions:
    """Return the options of the run to resume, if one is; else those given.

    Raises:
      SystemExit: there is no run to resume, it is of another job, or other options are given.
    """
    options = _join(options)
    if options.resume is None:
        return options
    path = options.resume / "options.json"
    kind = type(options)
    extra = dataclasses.asdict(options) | {"resume": None, "distributed": None}
    extra["out"] = kind().out if jax.process_index() else options.out
    if others := [k for k, v in extra.items() if v != getattr(kind(), k)]:
        given = ", ".join(f"--{k.replace('_', '-')}" for k in others)
        sys.exit(f"--resume takes all options from the run; {given} cannot be given with it")
    if not path.is_file():
        sys.exit(f"{path} is not there: no run to resume; start it without --resume")
    saved = json.loads(path.read_text())
    if saved["job"] != _job(options):
        sys.exit(f"{options.resume} is a run of experiments.{saved['job']}")
    kept = {name: _typed(hint, saved["options"].get(name))
            for name, hint in get_type_hints(kind).items() if name in saved["options"]}  # fmt: skip
    return kind(**kept, out=options.resume, resume=options.resume)


def _join(options: SomeOptions) -> SomeOptions:
    """Join the other processes, if there are any."""
    if options.distributed is None:
        return options
    host, *numbers = options.distributed.split(",")
    if host != "auto" and not (len(numbers) == 2 and "".join(numbers).isdecimal()):
        sys.exit("--distributed: expected auto or host:port,processes,number, got "
                 f"{options.distributed}")  # fmt: skip
    jax.distributed.initialize(*([] if host == "auto" else [host, *map(int, numbers)]))
    if number := jax.process_index():
        console.quiet = True  # the first speaks for all
        own = lambda path: path and path.with_name(f"{path.name}.process{number}")  # noqa: E731
        options = dataclasses.replace(options, out=own(options.out), resume=own(options.resume))
    return options


def _typed(hint: Any, value: Any) -> Any:
    """An option as JSON has it, back in the type that it had."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value


def _job(options: Options) -> str:
    return Path(sys.modules[type(options).__module__].__file__ or "").stem


def algorithm(
    options: Options, problem: Problem, learning_rate: float
) -> hj.Algorithm | baselines.Baseline:
    """Build the method that the options ask for; its rate falls linearly to 0."""
    schedule = optax.linear_schedule(learning_rate, 0.0, options.rounds)
    return methods.build(options, problem, schedule)


def rounds(
    options: Options, problem: Problem, alg: hj.Algorithm | baselines.Baseline, state: hj.State
) -> Iterator[simulation.Report]:
    """Simulate the rounds that the options ask for, from `state` on."""
    return simulation.run(
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
    )


def _evaluate(
    problem: Problem, score: Any, params: Any, data: simulation.Arrays
) -> tuple[float, float]:
    """Loss and metric on a split."""
    sums = simulation.evaluate(score, params, data, batch_size=64, prepare=problem.prepare)
    return problem.figure(sums)


def _open(
    options: Options, problem: Problem, alg: hj.Algorithm | baselines.Baseline, bar: Any
) -> tuple[hj.Ledger | baselines.Unrecorded, hj.State, list[dict[str, Any]]]:
    """Begin the ledger of a run, or bring one that was stopped to where it had come."""
    folder = options.out
    path = folder / "ledger.sqlite"
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(options.seed))
    if isinstance(alg, baselines.Baseline):
        state = baselines.restore(folder / "snapshots", alg, state)
        done = range(int(state.round))
        return (
            baselines.Unrecorded([_answered(options, problem, round) for round in done]),
            state,
            folders.rows(folder, len(done)),
        )
    about = {"task": problem.name, "data": _data_digest(problem)}
    if not path.exists():
        return hj.Ledger.create(path, alg, state, about), state, []
    ledger = hj.Ledger.open(path, alg, state)
    if ledger.header["about"] != about:
        raise hj.LedgerMismatch(f"{path}: about is {ledger.header['about']} there, {about} here: "
                                "the clients' data are not those of the run")  # fmt: skip
    state = snapshots.restore(folder / "snapshots", alg, state, ledger)
    task = bar.add_task("replaying", total=ledger.rounds, status="", completed=int(state.round))
    state = server.catch_up(
        alg, state, ledger.records(int(state.round)), lambda state: bar.advance(task)
    )
    bar.remove_task(task)
    return ledger, state, folders.rows(folder, ledger.rounds)


def _answered(options: Options, problem: Problem, round: int) -> dict[str, float]:
    """Who answered in a round of a run without a ledger."""
    names = _asked(options, problem, round)
    weights = simulation.answers(len(names), round, options.seed, options.dropout)
    return {name: float(w) for name, w in zip(names, weights, strict=True) if w > 0}


def _asked(options: Options, problem: Problem, round: int) -> list[str]:
    return problem.clients.sample(options.clients_per_round, round, options.seed, options.sampling)


def _data_digest(problem: Problem) -> str:
    total = hashlib.sha256()
    for name in problem.clients.names:
        total.update(name.encode())
        for column, values in sorted(problem.clients[name].items()):
            total.update(column.encode() + np.ascontiguousarray(values).tobytes())
    return total.hexdigest()[:16]


def _traffic(
    options: Options, problem: Problem, ledger: hj.Ledger | baselines.Unrecorded, size: int
) -> simulation.Traffic:
    """Account for the rounds that are done, of a method with `size` trained parameters."""
    if isinstance(ledger, hj.Ledger):
        places = ledger.header["algorithm"].get("own_directions", 1)
        traffic = simulation.Traffic(ledger.shape, True, places)
    else:
        traffic = baselines.Traffic(size)
    for round, reported in enumerate(ledger.records().reported):
        traffic.ask(_asked(options, problem, round), round, reported)
    return traffic


def train(options: Options, problem: Problem, learning_rate: float) -> dict[str, Any]:
    """Run one method, or go on with it, and write its folder; return the summary."""
    folder, clients, metric = options.out, problem.clients, problem.metric
    folder.mkdir(parents=True, exist_ok=True)
    alg = algorithm(options, problem, learning_rate)
    size = sum(x.size for x in alg.trainable(problem.params).values())
    score = jax.jit(problem.score)
    before = _evaluate(problem, score, problem.params, problem.test)
    seconds: list[float] = []
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(report.progress())
        ledger, state, rows = _open(options, problem, alg, bar)
        stack.enter_context(ledger)
        traffic = _traffic(options, problem, ledger, size)
        if not rows:
            dev = _evaluate(problem, score, problem.params, problem.dev)
            rows.append({"round": 0, "dev_loss": dev[0], f"dev_{metric}": dev[1]})
        with files.whole(folder / "metrics.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        log = stack.enter_context(open(folder / "metrics.jsonl", "a"))
        done, last_dev = ledger.rounds, [r[f"dev_{metric}"] for r in rows if "dev_loss" in r][-1]
        task = bar.add_task(
            methods.title(options.method), total=options.rounds, completed=done, status="compiling"
        )
        start = time.perf_counter()
        with folders.stop_on_ctrl_c() as stop:
            for step in rounds(options, problem, alg, state):
                seconds.append(time.perf_counter() - start)
                state = step.state
                if step.bad:
                    continue  # it moved nothing, and is not part of the run
                done = step.round
                traffic.ask(step.names, done - 1, step.reported)
                up, down = sum(traffic.up.values()), sum(traffic.down.values())
                loss = float(step.metrics.loss)
                row: dict[str, Any] = dict(
                    round=done,
                    loss=loss if np.isfinite(loss) else None,  # nobody answered
                    clients=step.names,
                    uplink_bytes=up,
                    downlink_bytes=down,
                    seconds=round(seconds[-1], 4),
                )
                if done % options.eval_every == 0 or done == options.rounds:
                    dev = _evaluate(problem, score, state.params, problem.dev)
                    row.update({"dev_loss": dev[0], f"dev_{metric}": dev[1]})
                    last_dev = dev[1]
                # The row comes first: a record without its row could not be given one later.
                log.write(json.dumps(row) + "\n")
                log.flush()
                rows.append(row)
                ledger.append(
                    step.metrics.record, hj.digest(state), step.metrics.learning_rate, step.reported
                )
                if done % options.snapshot_every == 0 or done == options.rounds:
                    snapshots.save(folder / "snapshots", alg, state)
                bar.update(
                    task,
                    completed=done,
                    status=f"loss {loss:.3f}  dev {report.figure(metric, last_dev)}  "
                    f"{1 / np.median(seconds[-20:]):.1f} rounds/s  "
                    f"up {report.size(up)}  down {report.size(down)}",
                )
                start = time.perf_counter()
                if stop.is_set():
                    break
        payload = ledger.records().nbytes
        shipped = ledger.export(folder / "ledger.safetensors")
    traffic.catch_up(clients.names, done)  # everybody ends with the model
    after = _evaluate(problem, score, state.params, problem.test)
    each = [row["seconds"] for row in rows if "seconds" in row]
    steady = float(np.median(each[1:] or each or [0.0]))
    summary = dict(
        method=options.method,
        task=problem.name,
        rounds=done,
        digest=fingerprint.text(hj.digest(state)),
        learning_rate=learning_rate,
        seed=options.seed,
        clients=len(clients),
        parameters=sum(x.size for x in jax.tree.leaves(problem.params)),
        trained_parameters=size,
        metric=metric,
        **{f"{metric}_before": before[1], metric: after[1]},
        loss_before=before[0],
        loss=after[0],
        **{f"{name}_before": value for name, value in problem.measure(problem.params).items()},
        **problem.measure(state.params),
        uplink_bytes_per_client=sum(traffic.up.values()) / len(clients),
        downlink_bytes_per_client=sum(traffic.down.values()) / len(clients),
        fedavg_bytes_per_client=2 * 4 * size * done * options.clients_per_round / len(clients),
        shipped_bytes=shipped,
        payload_bytes=payload,
        seconds_per_round=steady,
        compile_seconds=max(seconds[0] - steady, 0.0) if seconds else 0.0,
    )
    problem.save(folder, state.params)
    report.write_json(folder / "summary.json", summary)
    report.draw({methods.title(options.method): rows}, metric, problem.name, folder / "curve.png")
    return summary | {"rows": rows}


def _write_options(options: Options, rates: dict[str, float]) -> None:
    """Write down what `settle` needs, before anything is computed."""
    saved = {k: v for k, v in dataclasses.asdict(options).items() if k not in OWN}
    content = {"job": _job(options), "options": saved, "learning_rates": rates}
    report.write_json(options.out / "options.json", content)


def _picture_split(options: Options, problem: Problem) -> None:
    """Draw who has what: examples of every label, client by client. It does not change."""
    clients, path = problem.clients, options.out / "split.png"
    if not path.exists():
        labels = {n: clients[n]["label"] for n in clients.names if "label" in clients[n]}
        report.draw_split(labels, clients.sizes, path)


def run(options: Options, problem: Problem, learning_rates: dict[str, float]) -> None:
    """Run what the options ask for, print the table, and say where the files are."""
    chosen = list(COMPARED) if options.compare else [options.method]
    given = options.learning_rate
    try:
        for method in chosen:
            methods.check(method)
    except ValueError as error:
        sys.exit(str(error))
    if given is None and (untuned := [m for m in chosen if m not in learning_rates]):
        sys.exit(f"--learning-rate: none was tuned for {untuned[0]} here; give one")
    rates = {method: learning_rates[method] if given is None else given for method in chosen}
    summaries = []
    try:
        if options.resume is None:
            folders.make_room(options.out)
        with folders.alone(options.out):
            if options.resume is None:
                _write_options(options, rates)
            else:
                saved = json.loads((options.out / "options.json").read_text())
                rates = saved["learning_rates"]
            _picture_split(options, problem)
            for method in chosen:
                out = options.out / method if options.compare else options.out
                own = dataclasses.replace(options, method=method, out=out)
                summaries.append(train(own, problem, rates[method]))
            if options.compare:
                curves = {methods.title(s["method"]): s["rows"] for s in summaries}
                report.draw(curves, problem.metric, problem.name, options.out / "curve.png")
                bare = [{k: v for k, v in s.items() if k != "rows"} for s in summaries]
                report.write_json(options.out / "summary.json", bare)
    except (OSError, hj.LedgerError) as error:
        console.print(error, style="red", markup=False)
        console.print(f"What was recorded is safe. To go on: --resume {options.out}")
        sys.exit(1)
    console.print(report.table(summaries))
    console.print(
        f"Written to [bold]{options.out}/[/bold]: curve.png, split.png, metrics.jsonl, "
        "summary.json, ledger.sqlite, ledger.safetensors, weights"
    )
    if any(s["rounds"] < options.rounds for s in summaries):
        console.print(f"To go on with it: --resume {options.out}")
