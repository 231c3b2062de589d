"""What a comparison says: tables and figures of the rows that `hiso compare` wrote."""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib import color_sequences
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator, NullFormatter
from rich.markup import escape
from rich.table import Table

from hiso_jax.train import report
from hiso_jax.train import rows as files
from hiso_jax.train.methods import OWN, title
from hiso_jax.train.rows import Row
from hiso_jax.train.settings import RENAMED, renamed

TARGET = 0.95
"""Of the baseline's best: where curves are steeper, and so comparisons less noisy."""


DEFAULTS_OF_OLD_ROWS = {
    "upper_directions": 0,
    "upper_layers": 1,
    "eval_examples": 0,
    "secure": False,
    "epsilon": None,
    "delta": 1e-5,
    "clip": None,
    "select": None,
    "budget": 0.1,
    "renew": 20,
}
"""Options that rows written before there were any lack."""
RENAMED_METHODS = {"experiments.methods:hiso_all": "hiso(update_steps=all)"}
"""Methods that had a name of their own before they took arguments."""


def read(path: Path) -> list[Row]:
    """The rows of a comparison, each with all options."""
    if not path.is_file():
        return []
    found = files.read(path)
    if not all(isinstance(row, dict) and "method" in row for row in found):
        raise ValueError(f"--rows: {path} was not written by hiso compare")
    return [DEFAULTS_OF_OLD_ROWS | _modern(row) for row in found]


def _modern(row: Row) -> Row:
    """A row as it is written today: names of options and methods, and infinity as text."""
    infinite = [k for k, v in row.items() if isinstance(v, float) and math.isinf(v)]
    method = RENAMED_METHODS.get(row["method"], row["method"])
    return renamed(row) | {"method": method} | {name: "inf" for name in infinite}


class Curve(NamedTuple):
    """The runs of a method at one learning rate, seed by seed."""

    method: str  # and in what its rows differ from most
    learning_rate: float
    rounds: np.ndarray  # [E] rounds at which the dev split was looked at
    losses: np.ndarray  # [S, E] on the dev split; infinite after a run diverged
    figures: np.ndarray  # [S, E] its metric
    tests: np.ndarray  # [S] the metric of the test split at the end
    diverged: int
    passes: float  # forward passes of a client a round
    bytes: int  # sent up by a client a round
    seconds: float  # a run, in the mean

    @property
    def loss(self) -> float:
        """At the end, mean over seeds."""
        return float(self.losses[:, -1].mean())

    def reaches(self, goal: float, by: str = "metric") -> int | None:
        """The first round at which the mean metric, or loss, is as good, if there is one."""
        good = self.losses.mean(0) <= goal if by == "loss" else self.figures.mean(0) >= goal
        hits = np.flatnonzero(good)
        return int(self.rounds[hits[0]]) if hits.size else None


def variant(rows: list[Row]) -> Callable[[Row], str]:
    """A function that names the options in which a row differs from most rows."""
    named = ("task", "method", "learning_rate", "seed", "per_client_directions")
    shared = (*named, *DEFAULTS_OF_OLD_ROWS)
    # What follows the metric is what came out.
    names = [n for n in itertools.takewhile(lambda n: n != "metric", rows[0]) if n not in shared]
    # Rows with upper directions name their P in any case.
    plain = [r for r in rows if not r.get("upper_directions")] or rows
    voters = lambda n: plain if n == "num_perturbations" else rows  # noqa: E731
    usual = {n: Counter(str(r.get(n)) for r in voters(n)).most_common(1)[0][0] for n in names}
    other = lambda row, names: [f", {n}={row.get(n)}" for n in names if str(row.get(n)) != usual[n]]  # noqa: E731

    def name(row: Row) -> str:
        parts = [OWN] * bool(row.get("per_client_directions"))
        if row.get("select"):
            parts.append(f", {row['select']} {row['budget']:.0%} every {row['renew']}")
        if not (upper := row.get("upper_directions")):
            return "".join(parts + other(row, names))
        if upper == "auto":
            return "".join([*parts, ", upper directions by a look", *other(row, names)])
        many = [x if isinstance(x, list) else [x] for x in (upper, row["upper_layers"])]
        counts, depths = (" and ".join(map(str, x)) for x in many)
        layers = "layer" if depths == "1" else f"{depths} layers"
        parts.append(f", {counts} of {row['num_perturbations']} in the last {layers}")
        return "".join(parts + other(row, [n for n in names if n != "num_perturbations"]))

    return name


def curves(rows: list[Row]) -> list[Curve]:
    """Group rows, of one task, by method, options and learning rate."""
    groups: dict[tuple[str, float], list[Row]] = {}
    named = variant(rows)
    for row in rows:
        method = row["method"] + named(row)
        groups.setdefault((method, row["learning_rate"]), []).append(row)
    out = []
    for (method, rate), own in groups.items():
        rounds = np.array(max((r["curve"] for r in own), key=len))[:, 0].astype(int)
        losses = np.full((len(own), len(rounds)), np.inf)
        figures = np.zeros((len(own), len(rounds)))
        for i, row in enumerate(own):
            for j, (_, loss, figure) in enumerate(row["curve"]):
                losses[i, j] = np.inf if loss is None or (row["diverged"] and j) else loss
                figures[i, j] = 0 if figure is None or (row["diverged"] and j) else figure
        tests = np.array([r["test"] if not r["diverged"] and r["test"] else 0 for r in own])
        first = own[0]
        seconds = float(np.mean([r["seconds"] for r in own]))
        diverged = sum(r["diverged"] for r in own)
        out.append(Curve(method, rate, rounds, losses, figures, tests, diverged,
                         first["passes_per_round"], first["bytes_per_round"], seconds))  # fmt: skip
    return out


def compared(every: list[Curve]) -> list[Curve]:
    """The curves of as many seeds as any of the method: what further seeds were spent on."""
    most: dict[str, int] = {}
    for curve in every:
        most[curve.method] = max(most.get(curve.method, 0), len(curve.tests))
    return [curve for curve in every if len(curve.tests) == most[curve.method]]


def tuned(every: list[Curve]) -> dict[str, Curve]:
    """Each method at the learning rate with the lowest dev loss at the end."""
    best: dict[str, Curve] = {}
    for curve in compared(every):
        best[curve.method] = min(best.get(curve.method, curve), curve, key=lambda c: c.loss)
    return best


def edge(best: Curve, every: list[Curve]) -> bool:
    """Whether the best learning rate is the lowest or the highest of those tried."""
    rates = [c.learning_rate for c in every if c.method == best.method]
    return best.learning_rate in (min(rates), max(rates)) and len(rates) > 1


def _goal(rows: list[Row], by: str) -> str:
    """A perplexity is the exponential of the loss, and less of it is better: take the loss."""
    return "loss" if rows[0]["metric"] == "perplexity" else by


def spread(values: np.ndarray, shown: Callable[[float], str]) -> str:
    """Mean and standard deviation over seeds, of which one has none."""
    off = f" ± {shown(values.std())}" if len(values) > 1 else ""
    return shown(values.mean()) + off


def summary(
    rows: list[Row], by: str = "metric", baseline: str = "decomfl"
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: each method at its best, lowest dev loss first.

    The last columns say after how many rounds, forward passes and bytes a client's method
    reaches the best dev metric (or loss) that the tuned baseline ever has, at the learning rate
    that gets there first (the paper's Table 2); and after how many rounds 95 % of it.
    """
    every = curves(rows)
    best = tuned(every)
    metric = rows[0]["metric"]
    header = ["method", "learning rate", "dev loss", f"dev {metric}", f"test {metric}", "diverged"]
    shown = functools.partial(report.figure, metric)
    by, goals = _goal(rows, by), []
    if baseline in best and by == "loss":
        goals = [best[baseline].losses.mean(0).min()]
        goals.insert(0, goals[0] / TARGET)
        header += [f"rounds to {goals[0]:.3f}", f"to {goals[1]:.3f}"]
    elif baseline in best:
        goals = [best[baseline].figures.mean(0).max()]
        goals.insert(0, goals[0] * TARGET)
        header += [f"rounds to {goals[0]:.1%}", f"to {goals[1]:.1%}"]
    header += ["forward passes", "floats up"] * bool(goals)
    lines, tried = [], compared(every)
    for method, curve in sorted(best.items(), key=lambda item: item[1].loss):
        at = f"{curve.learning_rate:g}" + (" (edge)" if edge(curve, every) else "")
        last = curve.figures[:, -1]
        line = [
            title(method),
            at,
            f"{curve.loss:.3f}",
            spread(last, shown),
            spread(curve.tests, shown),
            str(sum(c.diverged for c in every if c.method == method)),
        ]
        own = [c for c in tried if c.method == method]
        for goal in goals:
            reached = [(r, c) for c in own if (r := c.reaches(goal, by)) is not None]
            rounds, quickest = min(reached, key=lambda pair: pair[0]) if reached else (None, curve)
            line.append("never" if rounds is None else f"{rounds:,}")
            if goal is goals[-1]:
                cost = (quickest.passes, quickest.bytes // 4)
                line += ["" if rounds is None else f"{rounds * each:,.0f}" for each in cost]
        lines.append(line)
    return header, lines


def table(rows: list[Row]) -> Table | str:
    """`summary` for the terminal."""
    return ruled(*summary(rows)) if rows else "no rows"


def ruled(header: list[str], lines: list[list[str]]) -> Table:
    """A table for the terminal; one that is too wide for it is turned, where that is narrower."""
    rows = [header, *lines]
    turned = [list(column) for column in zip(*rows, strict=True)]
    if report.console.width < _width(rows) > _width(turned):
        rows = turned
    out = Table()
    for name in rows[0]:
        out.add_column(escape(name), overflow="fold")  # a part of a number says another number
    for line in rows[1:]:
        out.add_row(*map(escape, line))
    return out


def _width(rows: list[list[str]]) -> int:
    """Of a table that breaks no cell, with its rules."""
    return 1 + sum(3 + max(map(len, column)) for column in zip(*rows, strict=True))


def show(header: list[str], lines: list[list[str]]) -> None:
    """Print a table, and once more as Markdown, for a page."""
    report.console.print(ruled(header, lines))
    for line in (header, ["---"] * len(header), *lines):
        print("| " + " | ".join(line) + " |")


def pivot(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of another table: options against methods, each at its best.

    Whichever there are more of goes downwards. A cell is dev loss, dev metric (in percent, but
    a perplexity), and the learning rate.
    """
    best, scale = tuned(curves(rows)), report.percent(rows[0]["metric"])
    methods = list(dict.fromkeys(name.partition(", ")[0] for name in best))

    def cell(curve: Curve | None) -> str:
        if curve is None:
            return ""
        last = scale * curve.figures[:, -1]
        return f"{curve.loss:.3f}, {spread(last, '{:.1f}'.format)} at {curve.learning_rate:g}"

    lines = [["", *map(title, methods)]]
    for how in dict.fromkeys(name.partition(", ")[2] for name in best):
        names = [", ".join(filter(None, (method, how))) for method in methods]
        lines.append([how or "as most", *(cell(best.get(name)) for name in names)])
    if len(lines) <= len(methods):  # a page has more room downwards
        lines = [list(line) for line in zip(*lines, strict=True)]
    return lines[0], lines[1:]


def draw(
    rows: list[Row], name: str, path: Path, only: tuple[str, ...] = (), by: str = "metric"
) -> None:
    """Draw metric or loss against rounds, forward passes and floats sent, and against the rate."""
    every = [c for c in curves(rows) if not only or c.method in only]
    best, metric, by = tuned(every), rows[0]["metric"], _goal(rows, by)
    values = lambda curve: curve.losses if by == "loss" else 100 * curve.figures  # noqa: E731
    picture = report.blank(15, 3.8 + 0.2 * -(-len(best) // 3))
    axes = picture.subplots(1, 4)
    looks = cycler(linestyle=["-", "--", ":"]) * cycler(color=color_sequences["tab10"])
    for axis in axes:
        axis.set_prop_cycle(looks)
    for method, curve in best.items():
        mean, spread = values(curve).mean(0), values(curve).std(0)
        units = (1, curve.passes, curve.bytes / 4)
        for axis, unit in zip(axes, units, strict=False):
            first = int(axis is axes[2])  # which is logarithmic
            x, y, off = curve.rounds[first:] * unit, mean[first:], spread[first:]
            (line,) = axis.plot(x, y, label=title(method), linewidth=1.3)
            axis.fill_between(x, y - off, y + off, color=line.get_color(), alpha=0.15)
        own = sorted((c for c in every if c.method == method), key=lambda c: c.learning_rate)
        rates = [c.learning_rate / curve.learning_rate for c in own]
        axes[3].plot(rates, [values(c)[:, -1].mean() for c in own], marker=".")
    labels = ("rounds", "forward passes of a client", "floats a client sends up",
              "learning rate / the best one")  # fmt: skip
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="dev loss" if by == "loss" else f"dev {metric} (%)")
    axes[1].xaxis.set_major_locator(MaxNLocator(5))
    lines, names = axes[0].get_legend_handles_labels()
    columns = 3 if max(map(len, names)) < 60 else 2  # or it would be wider than the picture
    picture.legend(lines, names, loc="outside lower center", ncols=columns)
    axes[2].set_xscale("log")
    axes[2].xaxis.set_minor_formatter(NullFormatter())
    axes[3].set_xscale("log", base=2)
    seeds = " or ".join(str(n) for n in sorted({len(c.tests) for c in best.values()}))
    picture.suptitle(f"{name}: mean and standard deviation over {seeds} seed{'s' * (seeds != '1')}")
    picture.savefig(path, dpi=110)


def where(rows: list[Row], conditions: tuple[str, ...]) -> list[Row]:
    """The rows whose options have one of the values given, ``name=value,value``."""
    split = functools.partial(re.split, r",(?![^(]*\))")  # not between a method's arguments
    pairs = [(name, split(values)) for name, _, values in (c.partition("=") for c in conditions)]
    wanted = [(RENAMED.get(name, name), values) for name, values in pairs]
    return [row for row in rows if all(str(row.get(name)) in values for name, values in wanted)]


@dataclasses.dataclass(frozen=True)
class Results:
    """Print the table of a comparison, as Markdown too, and draw its figure."""

    rows: tuple[Path, ...] = (Path("runs/compare.jsonl"),)
    """What `hiso compare` wrote."""
    where: tuple[str, ...] = ()
    """Which rows: task=mnist, alpha=1.0, method=hiso,decomfl; all must be of one task."""
    by: Literal["metric", "loss"] = "metric"
    """What of the tuned baseline's best is to be reached, and what is drawn."""
    baseline: str | None = None
    """The method whose best is to be reached; by default decomfl, if it is among the rows."""
    pivot: bool = False
    """Options against methods, in one table."""
    only: tuple[str, ...] = ()
    """Methods to draw; by default all."""
    picture: Path | None = None
    """Where to draw the figure, a PNG."""
    page: Path | None = None
    """Where to write a page with the curves, of methods to choose among: an HTML file."""


def main(options: Results) -> None:
    """Print and draw."""
    if lost := [path for path in options.rows if not path.is_file()]:
        raise FileNotFoundError(f"--rows: {lost[0]} is not there")
    rows = where([row for path in options.rows for row in read(path)], options.where)
    if not rows:
        raise SystemExit(f"--where: there is no such row in {', '.join(map(str, options.rows))}")
    baseline = options.baseline or "decomfl"
    if options.baseline and baseline not in (known := {c.method for c in curves(rows)}):
        names = ", ".join(sorted(known))
        raise SystemExit(f"--baseline: expected one of {names}, got {baseline!r}")
    show(*(pivot(rows) if options.pivot else summary(rows, options.by, baseline)))
    if options.picture:
        draw(rows, str(rows[0]["task"]), options.picture, options.only, options.by)
    if options.page:
        from hiso_jax.train import comparison  # which needs this module

        comparison.write(rows, options.page)


def cli() -> None:
    """Parse the command line, print and draw."""
    import tyro

    with report.door():
        main(tyro.cli(Results))
