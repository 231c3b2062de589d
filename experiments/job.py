"""One job: options, the progress a person watches, and the folder a run leaves behind."""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

import hiso_jax as hj
from experiments.problem import Problem
from hiso_jax import files, simulation

console = Console()
METHODS = {"hiso": hj.federated_hiso, "decomfl": hj.decomfl}
TITLES = {"hiso": "HiSo", "decomfl": "DeComFL"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every job."""

    method: Literal["hiso", "decomfl"] = "hiso"
    """The algorithm to run."""
    compare: bool = False
    """Run every method on the same seeds and draw all curves."""
    rounds: int = 200
    """Communication rounds."""
    out: Path = Path("runs/job")
    """Folder for metrics.jsonl, curve.png, summary.json and the weights."""
    seed: int = 0
    """Of the noise, of who takes part and of the batches."""
    learning_rate: float | None = None
    """Peak learning rate, falling linearly to 0; by default the tuned one of the method."""
    clients_per_round: int = 8
    """Clients sampled a round (C)."""
    sampling: Literal["uniform", "size"] = "uniform"
    """Which clients take part: all alike, or in proportion to their examples."""
    batch_size: int = 4
    """Examples of a client in a local step."""
    local_steps: int = 1
    """Local steps of a client (K)."""
    num_perturbations: int = 5
    """Scalars a local step (P); an update costs P + 1 forward passes."""
    smoothing: float = 1e-3
    """Finite-difference step (mu)."""
    decay: float = 0.95
    """Weight of the old curvature (HiSo only)."""
    distribution: Literal["normal", "rademacher"] = "rademacher"
    """Noise: normal is the paper's, rademacher cheaper."""
    eval_every: int = 25
    """Rounds between evaluations on the dev split."""


def algorithm(options: Options, problem: Problem, learning_rate: float) -> hj.Algorithm:
    """Build the method an `Options` asks for."""
    extra: dict[str, Any] = {"decay": options.decay} if options.method == "hiso" else {}
    return METHODS[options.method](
        problem.loss_fn,
        optax.linear_schedule(learning_rate, 0.0, options.rounds),
        local_steps=options.local_steps,
        num_perturbations=options.num_perturbations,
        smoothing=options.smoothing,
        distribution=options.distribution,
        **extra,
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        # On a narrow terminal the figures go on on the next line.
        TextColumn("{task.fields[status]}", table_column=Column(overflow="fold")),
        TimeRemainingColumn(),
        console=console,
    )


def _accuracy(score: Any, params: Any, data: simulation.Arrays) -> tuple[float, float]:
    sums = simulation.evaluate(score, params, data, batch_size=64)
    return float(sums["loss"] / sums["count"]), float(sums["correct"] / sums["count"])


@contextlib.contextmanager
def _stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets: the round under way is finished, not lost."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt  # the second time, at once
        stop.set()
        console.print("[yellow]Stopping after this round; keeping what was done.")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    except FloatingPointError as error:
        console.print(f"[red]{error}")
    finally:
        signal.signal(signal.SIGINT, before)


def train(options: Options, problem: Problem, learning_rate: float) -> dict[str, Any]:
    """Run one method and write its folder; return the summary."""
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    alg = algorithm(options, problem, learning_rate)
    score = jax.jit(problem.score)
    before = _accuracy(score, problem.params, problem.test)
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(options.seed))
    traffic = simulation.Traffic((options.local_steps, options.num_perturbations))
    clients = problem.clients
    dev = _accuracy(score, problem.params, problem.dev)
    rows: list[dict[str, Any]] = [dict(round=0, dev_loss=dev[0], dev_accuracy=dev[1])]
    seconds, compile_seconds, done = [], 0.0, 0

    def totals() -> tuple[int, int]:
        return sum(traffic.up.values()), sum(traffic.down.values())

    with _progress() as bar, open(folder / "metrics.jsonl", "w") as log, _stop_on_ctrl_c() as stop:
        log.write(json.dumps(rows[0]) + "\n")
        task = bar.add_task(TITLES[options.method], total=options.rounds, status="compiling")
        start = time.perf_counter()
        for report in simulation.run(
            alg,
            state,
            clients,
            rounds=options.rounds,
            clients_per_round=options.clients_per_round,
            batch_size=options.batch_size,
            local_steps=options.local_steps,
            seed=options.seed,
            sampling=options.sampling,
        ):
            seconds.append(time.perf_counter() - start)
            state, done = report.state, report.round
            traffic.ask(report.names, report.round - 1)
            up, down = totals()
            row: dict[str, Any] = dict(
                round=done,
                loss=float(report.metrics.loss),
                clients=report.names,
                uplink_bytes=up,
                downlink_bytes=down,
                seconds=round(seconds[-1], 4),
            )
            if done % options.eval_every == 0 or done == options.rounds:
                dev = _accuracy(score, state.params, problem.dev)
                row.update(dev_loss=dev[0], dev_accuracy=dev[1])
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.update(
                task,
                completed=done,
                status=f"loss {row['loss']:.3f}  dev {dev[1]:.1%}  "
                f"{1 / np.median(seconds[-20:]):.1f} rounds/s  "
                f"up {_bytes(up)}  down {_bytes(down)}",
            )
            start = time.perf_counter()
            if stop.is_set():
                break
    if seconds:
        steady = float(np.median(seconds[1:] or seconds))
        compile_seconds = max(seconds[0] - steady, 0.0)
    traffic.catch_up(clients.names, done)  # everybody ends with the model
    after = _accuracy(score, state.params, problem.test)
    up, down = totals()
    size = sum(x.size for x in jax.tree.leaves(problem.params))
    summary = dict(
        method=options.method,
        task=problem.name,
        rounds=done,
        learning_rate=learning_rate,
        seed=options.seed,
        clients=len(clients),
        parameters=size,
        accuracy_before=before[1],
        accuracy=after[1],
        loss_before=before[0],
        loss=after[0],
        uplink_bytes_per_client=up / len(clients),
        downlink_bytes_per_client=down / len(clients),
        fedavg_bytes_per_client=2 * 4 * size * done * options.clients_per_round / len(clients),
        seconds_per_round=float(np.median(seconds[1:] or seconds or [0.0])),
        compile_seconds=compile_seconds,
    )
    problem.save(folder, state.params)
    _write_json(folder / "summary.json", summary)
    draw({TITLES[options.method]: rows}, problem.name, folder / "curve.png")
    return summary | {"rows": rows}


def _write_json(path: Path, content: Any) -> None:
    with files.whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def _without_rows(summary: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k != "rows"}


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def draw(curves: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Draw dev accuracy and loss against rounds, one curve a method."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")  # no pyplot: no display, no state
    axes = figure.subplots(1, 2)
    for name, rows in curves.items():
        points = [r for r in rows if "dev_accuracy" in r]
        rounds = [r["round"] for r in points]
        axes[0].plot(rounds, [100 * r["dev_accuracy"] for r in points], marker=".", label=name)
        axes[1].plot(rounds, [r["dev_loss"] for r in points], marker=".", label=name)
    for axis, label in zip(axes, ("dev accuracy, %", "dev loss"), strict=True):
        axis.set(xlabel="round", ylabel=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    with files.whole(path) as part:
        figure.savefig(part, dpi=150)


def table(summaries: list[dict[str, Any]]) -> Table:
    """The table at the end of a run."""
    first = summaries[0]
    out = Table(title=f"{first['task']}: {first['rounds']} rounds, {first['clients']} clients")
    out.add_column("", justify="left")
    for summary in summaries:
        out.add_column(TITLES[summary["method"]], justify="right")
    lines = {
        "test accuracy before": lambda s: f"{s['accuracy_before']:.1%}",
        "test accuracy after": lambda s: f"[bold]{s['accuracy']:.1%}",
        "sent by a client": lambda s: _bytes(s["uplink_bytes_per_client"]),
        "received by a client": lambda s: _bytes(s["downlink_bytes_per_client"]),
        "FedAvg would have moved": lambda s: _bytes(s["fedavg_bytes_per_client"]),
        "seconds a round": lambda s: f"{s['seconds_per_round']:.3g}",
        "compile seconds": lambda s: f"{s['compile_seconds']:.1f}",
    }
    for name, cell in lines.items():
        out.add_row(name, *(cell(s) for s in summaries))
    return out


def run(options: Options, problem: Problem, learning_rates: dict[str, float]) -> None:
    """Run what the options ask for, print the table, and say where the files are."""
    methods = list(METHODS) if options.compare else [options.method]
    summaries = []
    for method in methods:
        out = options.out / method if options.compare else options.out
        own = dataclasses.replace(options, method=method, out=out)
        rate = options.learning_rate or learning_rates[method]
        summaries.append(train(own, problem, rate))
    if options.compare:
        curves = {TITLES[s["method"]]: s["rows"] for s in summaries}
        draw(curves, problem.name, options.out / "curve.png")
        _write_json(options.out / "summary.json", [_without_rows(s) for s in summaries])
    console.print(table(summaries))
    console.print(
        f"Written to [bold]{options.out}/[/bold]: curve.png, metrics.jsonl, summary.json, weights"
    )
