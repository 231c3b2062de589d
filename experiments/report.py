"""What a person sees of a run: bars, tables, curves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from experiments.methods import title
from hiso_jax import files

console = Console()


def progress(count: str = "{task.completed}/{task.total}") -> Progress:
    """A bar that keeps a line of figures beside it."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        TextColumn(count),
        # On a narrow terminal the figures go on on the next line.
        TextColumn("{task.fields[status]}", table_column=Column(overflow="fold")),
        TimeRemainingColumn(),
        console=console,
    )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with files.whole(path) as part:
        part.write_text(json.dumps(content, indent=2, default=str) + "\n")


def size(count: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(metric: str) -> int:
    """What people multiply a metric by: 100, but a perplexity is no share of anything."""
    return 1 if metric == "perplexity" else 100


def figure(metric: str, value: float) -> str:
    """A metric as people write it."""
    return f"{value:.2f}" if percent(metric) == 1 else f"{value:.1%}"


def blank(width: float, height: float) -> Any:
    """An empty picture."""
    # Imported here, for it takes as long as jax; and no pyplot: no display, no state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw(curves: dict[str, list[dict[str, Any]]], metric: str, title: str, path: Path) -> None:
    """Draw metric and loss on the dev split against rounds, one curve a method."""
    picture = blank(9, 3.4)
    axes, scale = picture.subplots(1, 2), percent(metric)
    for name, rows in curves.items():
        points = [r for r in rows if "dev_loss" in r]
        rounds = [r["round"] for r in points]
        axes[0].plot(rounds, [scale * r[f"dev_{metric}"] for r in points], marker=".", label=name)
        axes[1].plot(rounds, [r["dev_loss"] for r in points], marker=".", label=name)
    for axis, label in zip(axes, (f"dev {metric}" + ", %" * (scale > 1), "dev loss"), strict=True):
        axis.set(xlabel="round", ylabel=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    picture.suptitle(title, fontsize=10)
    with files.whole(path) as part:
        picture.savefig(part, dpi=150)


def draw_split(labels: dict[str, np.ndarray], sizes: dict[str, int], path: Path) -> None:
    """Draw a bar a client, largest first, in a colour a label."""
    picture = blank(9, 3)
    axis = picture.subplots()
    names = sorted(sizes, key=lambda name: -sizes[name])
    edges, bottom = np.arange(len(names) + 1) - 0.5, np.zeros(len(names))
    if labels:
        for kind in np.unique(np.concatenate(list(labels.values()))):
            top = bottom + [(labels[name] == kind).sum() for name in names]
            axis.stairs(top, edges, baseline=bottom, fill=True, label=f"label {kind}")
            bottom = top
        axis.legend(frameon=False, ncols=2, fontsize=8)
    else:
        axis.stairs([sizes[name] for name in names], edges, fill=True)
    axis.set(xlabel=f"{len(names)} clients", ylabel="examples")
    axis.spines[["top", "right"]].set_visible(False)
    with files.whole(path) as part:
        picture.savefig(part, dpi=150)


def table(summaries: list[dict[str, Any]]) -> Table:
    """The table at the end of a run."""
    first = summaries[0]
    out = Table(title=f"{first['task']}: {first['rounds']} rounds, {first['clients']} clients")
    out.add_column("", justify="left")
    for summary in summaries:
        out.add_column(title(summary["method"]), justify="right")
    metric = first["metric"]
    lines = {
        f"test {metric} before": lambda s: figure(metric, s[f"{metric}_before"]),
        f"test {metric} after": lambda s: f"[bold]{figure(metric, s[metric])}",
    }
    for name in ("exact_match", "f1", "rouge_l"):
        if f"{name}_before" in first and name != metric:
            lines[f"test {name} before, after"] = lambda s, name=name: (
                f"{s[f'{name}_before']:.1%}, {s[name]:.1%}"
            )
    lines |= {
        "sent by a client": lambda s: size(s["uplink_bytes_per_client"]),
        "received by a client": lambda s: size(s["downlink_bytes_per_client"]),
        "the whole run as a file": lambda s: size(s["shipped_bytes"]),
        "FedAvg would have moved": lambda s: size(s["fedavg_bytes_per_client"]),
        "seconds a round": lambda s: f"{s['seconds_per_round']:.3g}",
        "compile seconds": lambda s: f"{s['compile_seconds']:.1f}",
    }
    for name, cell in lines.items():
        out.add_row(name, *(cell(s) for s in summaries))
    return out
