"""What a round costs as clients, perturbations, local steps and the model grow: one figure.

python -m benchmarks.scaling --out docs/scaling.png
"""

import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import round as one
from benchmarks import timing
from hiso_jax import federation, models
from hiso_jax.federation import Clients

console = Console()
BASE = one.Options(shape="opt-10m", clients=4, batch=1, repeats=2)
SHAPES = ("opt-1m", "opt-10m", "opt-30m", "opt-125m", "opt-350m")
PANELS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "clients": ("clients, C", [dict(clients=n) for n in (1, 4, 16, 64, 256)]),
    "num_perturbations": (
        "perturbations, P",
        [dict(num_perturbations=n) for n in (1, 2, 4, 8, 16, 32)],
    ),
    "local_steps": (
        "local steps, K",
        [dict(local_steps=n, num_perturbations=2) for n in (1, 2, 5, 10)],
    ),
    "parameters": ("parameters, d", [dict(shape=s, num_perturbations=2) for s in SHAPES]),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time of a round against C, P, K and d, and the host's work for a million clients."""

    out: Path = Path("runs/scaling.png")
    """The figure; the numbers go beside it, as .jsonl."""


def million(clients: int = 10**6, sampled: int = 1000, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of the host's work a round, and the memory of holding the clients."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = np.random.default_rng(0).integers(1, 5, clients)
    column = np.arange(sizes.sum(), dtype=np.int32)
    names = [str(i) for i in range(clients)]
    everyone = Clients.joined(names, sizes.tolist(), {"x": column})
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for round in range(rounds):
        start = time.perf_counter()
        own = everyone.sample(sampled, round)
        everyone.batches(own, round, batch_size=4)
        seconds.append(time.perf_counter() - start)
    return {
        "milliseconds": 1e3 * float(np.median(seconds)),
        "megabytes": (after - before) / 1024,
    }


def idle_share(rounds: int = 20) -> float:
    """Share of a simulation's time in which the device waits for the host's work."""
    options = dataclasses.replace(BASE, clients=8, batch=8)
    model, data = (
        models.from_config(one.config(BASE.shape), jax.random.key(0)),
        one.batches(options),
    )
    own = {k: np.concatenate([v[c, 0] for c in range(8)] * 40) for k, v in data.items()}
    clients = Clients.joined([str(i) for i in range(64)], [40] * 64, own)
    step, states = one.program(model, options), [one.start(model, options)]
    reports = federation.run(
        one.algorithm(model, options), one.start(model, options), clients,
        rounds=rounds + 2, clients_per_round=8, batch_size=8,
    )  # fmt: skip

    def alone() -> jax.Array:
        states[0], metrics = step(states[0], data)
        return metrics.record

    seconds = timing.interleaved({"alone": alone, "run": lambda: next(reports).metrics}, rounds)
    return 1 - seconds["alone"] / seconds["run"]


def slope(x: list[float], y: list[float]) -> float:
    """Exponent of the growth between the last two points."""
    return float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2]))


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> dict[str, tuple[float, float]]:
    """Draw the panels; return the slopes of round and bare passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    slopes = {}
    for axis, (name, (label, _)) in zip(axes, PANELS.items(), strict=True):
        x = [float(row[name]) for row in rows[name]]
        lines = {"a round": "round_seconds", "its bare forward passes": "bare_seconds"}
        ends = []
        for title, key in lines.items():
            y = [row[key] for row in rows[name]]
            axis.loglog(x, y, "o-", label=title, color="C0" if key[0] == "r" else "0.6")
            ends.append(slope(x, y))
        slopes[name] = (ends[0], ends[1])
        axis.set(xlabel=label)
        axis.set_title(f"slope {ends[0]:.2f} (bare {ends[1]:.2f})", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return slopes


def main(options: Options) -> None:
    """Measure, print and draw."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, (_, points) in PANELS.items():
        for point in points:
            found = one.measure(dataclasses.replace(BASE, **point))
            rows.setdefault(name, []).append(found)
            console.print(name, point, f"{found['round_seconds']:.3f} s, {found['overhead']:.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for own in rows.values() for row in own]
    options.out.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    slopes = draw(rows, options.out)
    table = Table("against", "slope of the round", "of the bare passes", title="from the last step")
    for name, (ours, bare) in slopes.items():
        table.add_row(PANELS[name][0], f"{ours:.2f}", f"{bare:.2f}")
    console.print(timing.machine())
    console.print(table)
    host = million()
    console.print(
        f"1,000,000 clients, 1,000 a round: {host['milliseconds']:.0f} ms of the host's work, "
        f"{host['megabytes']:.0f} MB to hold them"
    )
    console.print(f"The device waits for the host {idle_share():.1%} of a simulation's time")
    console.print(f"Written: {options.out}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
