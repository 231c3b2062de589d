"""What a person sees of a run: bars, tables, curves."""

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hiso_jax import LedgerError
from hiso_jax._engine import files
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import progress as bars
from hiso_jax.train.methods import title

MOST = 40
"""Labels that are printed; the file has all."""
NAMED = 12
"""Clients, and labels, whose names a picture has room for."""
console = Console(emoji=False, highlight=False)


def say(*parts: str, style: str = "") -> None:
    """Print a line as it is: no markup, no breaks; every second part, a path say, is bold."""
    line = Text.assemble(*((p, "bold" if i % 2 else "") for i, p in enumerate(parts)), style=style)
    console.print(line, soft_wrap=True)


def fail(error: BaseException | str) -> None:
    """Print what went wrong, in one line."""
    say(" ".join(str(error).split()) or repr(error), style="red")


def resuming(folder: Path) -> str:
    """The option that goes on with the run in a folder, as a shell takes it.

    Example:
      >>> resuming(Path("runs/job")), resuming(Path("my run"))
      ('--resume runs/job', "--resume 'my run'")
    """
    return f"--resume {shlex.quote(str(folder))}"


@contextlib.contextmanager
def door(run: Path | None = None) -> Iterator[None]:
    """End with one line and exit code 1 on what was asked for and cannot be had.

    Ctrl-C ends with 130, and the way to go on with `run`, if it is one that was to be gone on with.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("Stopped." + (f" To go on: {resuming(run)}" if run else ""), style="yellow")
        sys.exit(130)
    except (OSError, ValueError, TypeError, LedgerError) as error:
        fail(error)
        sys.exit(1)
    except (ArithmeticError, LookupError, MemoryError, RuntimeError) as error:
        fail(f"{type(error).__name__}: {error}")
        sys.exit(1)


def progress(count: str = "{task.completed}/{task.total}") -> Any:
    """A bar that keeps a line of figures beside it; lines where there is no terminal."""
    return bars.progress(console, count)


def plain(value: Any) -> Any:
    """A value as JSON has it: what is not a finite number is None.

    Example:
      >>> plain({"loss": float("nan"), "curve": (1, float("inf"))})
      {'loss': None, 'curve': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes, without NaN."""
    return json.dumps(plain(content), indent=indent, default=str, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with files.atomic_write(path) as part:
        part.write_text(dumps(content, 2) + "\n")


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


def figure(metric: str, value: float | None) -> str:
    """A metric as people write it."""
    if value is None or math.isnan(value):
        return "not a number"
    return f"{value:.2f}" if percent(metric) == 1 else f"{value:.1%}"


def loss_of(value: float | None) -> str:
    """The loss of a round's clients; none is known where nobody answered, or under --epsilon.

    Example:
      >>> [loss_of(x) for x in (0.25, float("nan"), None)]
      ['loss 0.250', 'loss unknown', 'loss unknown']
    """
    return "loss unknown" if value is None or math.isnan(value) else f"loss {value:.3f}"


def blank(width: float, height: float) -> Any:
    """An empty picture."""
    # Imported here, for it takes as long as jax; and no pyplot: no display, no state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def framed(picture: Any) -> Any:
    """The picture, with a light grid and half of a frame."""
    for axis in picture.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return picture


def draw(curves: dict[str, list[dict[str, Any]]], metric: str, title: str, path: Path) -> None:
    """Draw metric and loss on the dev split against rounds, one curve a method."""
    picture = blank(9, 3.4)
    axes, scale = picture.subplots(1, 2), percent(metric)
    for name, rows in curves.items():
        # What was infinite is None in a file.
        points = [r for r in rows if r.get("dev_loss") is not None]
        rounds = [r["round"] for r in points]
        figures = [math.nan if (y := r[f"dev_{metric}"]) is None else scale * y for r in points]
        axes[0].plot(rounds, figures, marker=".", label=name)
        axes[1].plot(rounds, [r["dev_loss"] for r in points], marker=".", label=name)
    for axis, label in zip(axes, (f"dev {metric}" + ", %" * (scale > 1), "dev loss"), strict=True):
        axis.set(xlabel="round", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    framed(picture)
    axes[0].legend(frameon=False)
    picture.suptitle(title, fontsize=10, parse_math=False)  # a name may have a $ in it
    with files.atomic_write(path) as part:
        picture.savefig(part, dpi=150)


def draw_split(
    labels: dict[str, np.ndarray],
    sizes: dict[str, int],
    path: Path,
    classes: Sequence[tuple[str, str]] = (),
) -> None:
    """Draw a bar a client, largest first, in a color a label.

    Args:
      labels: by client, the number of each example's.
      sizes: examples, by client.
      path: of the picture.
      classes: label and word of each number, as a `Problem` has them.
    """
    picture = blank(9, 3)
    axis = picture.subplots()
    names = sorted(sizes, key=lambda name: -sizes[name])
    edges, bottom = np.arange(len(names) + 1) - 0.5, np.zeros(len(names))
    if labels:
        kinds = np.unique(np.concatenate(list(labels.values()))).tolist()
        for number, kind in enumerate(kinds):
            top = bottom + [(labels[name] == kind).sum() for name in names]
            words = dict.fromkeys(filter(None, classes[kind])) if kind < len(classes) else [kind]
            shown = " ".join(map(str, words))
            shown = f"label {shown:.40}" if number < NAMED or len(kinds) == NAMED + 1 else None
            if number == NAMED and shown is None:
                shown = f"and {len(kinds) - NAMED} more"
            axis.stairs(top, edges, baseline=bottom, fill=True, label=shown)
            bottom = top
        beside = picture.legend(loc="outside right upper", frameon=False, fontsize=8)
        for text in beside.get_texts():
            text.set_parse_math(False)
    else:
        axis.stairs([sizes[name] for name in names], edges, fill=True)
    if len(names) <= NAMED:
        shown = [f"{name:.20}" for name in names]
        axis.set_xticks(range(len(names)), shown, fontsize=8, parse_math=False)
    else:
        axis.set_xticks([])
    axis.set(xlabel=f"{len(names)} clients, the largest first", ylabel="examples")
    axis.spines[["top", "right"]].set_visible(False)
    with files.atomic_write(path) as part:
        picture.savefig(part, dpi=150)


def beside(summary: Mapping[str, Any]) -> str:
    """What is not in the bytes of a run whose scalars are masked."""
    return ", beside its masks" * bool(summary.get("secure"))


def table(summaries: list[dict[str, Any]]) -> Table:
    """The table at the end of a run."""
    first = summaries[0]
    name = f"{first['task']}: {first['rounds']} rounds, {first['clients']} clients"
    out = Table(title=escape(name))
    out.add_column("", justify="left")
    for summary in summaries:
        out.add_column(escape(title(summary["method"])), justify="right")
    metric = first["metric"]
    lines = {
        f"test {metric} before": lambda s: figure(metric, s[f"{metric}_before"]),
        f"test {metric} after": lambda s: f"[bold]{figure(metric, s[metric])}",
    }
    for name in ("exact_match", "f1", "rouge_l"):
        if f"{name}_before" in first and name != metric:
            lines[f"test {name} before, after"] = lambda s, name=name: (
                f"{figure(name, s[f'{name}_before'])}, {figure(name, s[name])}"
            )
    if "epsilon_spent" in first:
        lines[f"epsilon spent, delta {first['delta']:g}"] = lambda s: f"{s['epsilon_spent']:.3g}"
    lines |= {
        f"sent by a client{beside(first)}": lambda s: size(s["uplink_bytes_per_client"]),
        f"received by a client{beside(first)}": lambda s: size(s["downlink_bytes_per_client"]),
        "the whole run as a file": lambda s: size(s["shipped_bytes"]) * bool(s["shipped_bytes"]),
        "FedAvg would have moved": lambda s: size(s["fedavg_bytes_per_client"]),
        "seconds a round": lambda s: f"{s['seconds_per_round']:.3g}",
        "compile seconds": lambda s: f"{s['compile_seconds']:.1f}",
    }
    for name, cell in lines.items():
        out.add_row(name, *(cell(s) for s in summaries))
    return out


def answers(name: str, rows: list[dict[str, Any]]) -> Table:
    """What a model wrote before and after."""
    out = Table(title=escape(f"{name}: what the model writes"), show_lines=True)
    for column in ("prompt", "wanted", "before", "after"):
        out.add_column(column, overflow="fold")
    for row in rows:
        cells = (row["prompt"], row["wanted"], row["before"], row["written"])
        out.add_row(*(escape(cell) for cell in cells))
    return out


def counts(problem: Problem) -> list[dict[str, Any]]:
    """Label, word and number of examples by split, a row a class."""
    clients = problem.clients.columns
    parts = {"train": clients, "dev": problem.dev, "test": problem.test}
    return [
        {"label": label, "word": word}
        | {name: int((part["label"] == number).sum()) for name, part in parts.items()}
        for number, (label, word) in enumerate(problem.classes)
    ]


def show_data(problem: Problem) -> None:
    """Print what the labels are, and all that was done to the data."""
    rows = counts(problem)
    if rows:
        out = Table(title="labels")
        shown = [name for name in rows[0] if name != "word" or any(row["word"] for row in rows)]
        for name in shown:
            out.add_column(name, justify="left" if name in ("label", "word") else "right")
        for row in rows[:MOST]:
            out.add_row(*(escape(str(row[name])) for name in shown))
        console.print(out)
    if len(rows) > MOST:
        say(f"and {len(rows) - MOST} more labels, all in labels.json")
    lines = [f"train has no example of label {row['label']!r}, there is nothing to learn it from"
             for row in rows if not row["train"]]  # fmt: skip
    for line in (*problem.notes, *lines):
        say(f"Note: {line}", style="yellow")
