"""What a comparison says: tables and figures of the rows that `hiso compare` wrote."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Literal

from matplotlib import color_sequences
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator, NullFormatter
from rich.markup import escape
from rich.table import Table

from hiso_jax.train import comparison, report
from hiso_jax.train.curves import Curve, compared, curves, deviation, edge, read, spread, tuned
from hiso_jax.train.methods import title
from hiso_jax.train.rows import Row
from hiso_jax.train.settings import RENAMED

TARGET = 0.95
"""Of the baseline's best: where curves are steeper, and so comparisons less noisy."""


def _goal(rows: list[Row], by: str) -> str:
    """A perplexity is the exponential of the loss, and less of it is better: take the loss."""
    return "loss" if rows[0]["metric"] == "perplexity" else by


def summary(
    rows: list[Row], by: str = "metric", baseline: str = "decomfl", chosen_by: str = "loss"
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: each method at its best, lowest dev loss first.

    The last columns say after how many rounds, forward passes and bytes a client's method
    reaches the best dev metric (or loss) that the tuned baseline ever has, at the learning rate
    that gets there first (the paper's Table 2); and after how many rounds 95 % of it.

    Args:
      rows: of one task.
      by: what is to be reached, ``"metric"`` or ``"loss"``.
      baseline: by whom.
      chosen_by: what the best learning rate is the best by.
    """
    every = curves(rows)
    best = tuned(every, _goal(rows, chosen_by))
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


def table(rows: list[Row], chosen_by: str = "loss") -> Table | str:
    """`summary` for the terminal."""
    return ruled(*summary(rows, chosen_by=chosen_by)) if rows else "no rows"


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
        mean, spread = values(curve).mean(0), deviation(values(curve))
        units = (1, curve.passes, curve.bytes / 4)
        for axis, unit in zip(axes, units, strict=False):
            first = int(axis is axes[2])  # which is logarithmic
            x, y, off = curve.rounds[first:] * unit, mean[first:], spread[first:]
            dots = "." if len(x) < 4 else None  # or one look would be a line of no length
            (line,) = axis.plot(x, y, label=title(method), linewidth=1.3, marker=dots)
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
    """Which best of the tuned baseline is to be reached, and what is drawn; rates are chosen by
    the dev loss in any case."""
    baseline: str | None = None
    """The method whose best is to be reached; by default decomfl, if it is among the rows."""
    pivot: bool = False
    """Options against methods, in one table."""
    only: tuple[str, ...] = ()
    """Methods to draw, by the names of the rows: "rms, per-client directions"; by default all."""
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
    task = lambda row: " ".join(map(str, filter(None, map(row.get, ("task", "text_task")))))  # noqa: E731
    if len(tasks := sorted({task(row) for row in rows})) > 1:
        raise SystemExit(f"--where: expected rows of one task, got those of {', '.join(tasks)}; "
                         "choose by task=... or text_task=...")  # fmt: skip
    if lost := set(options.only) - (known := {c.method for c in curves(rows)}):
        raise SystemExit(f"--only: expected any of {', '.join(map(repr, sorted(known)))}, got "
                         f"{sorted(lost)[0]!r}")  # fmt: skip
    for name in ("picture", "page"):
        if getattr(options, name) in options.rows:
            raise SystemExit(f"--{name}: {getattr(options, name)} is a file of rows")
    baseline = options.baseline or "decomfl"
    if options.baseline and baseline not in known:
        names = ", ".join(map(repr, sorted(known)))  # there are commas in some
        raise SystemExit(f"--baseline: expected one of {names}, got {baseline!r}")
    show(*(pivot(rows) if options.pivot else summary(rows, options.by, baseline)))
    if options.picture:
        draw(rows, str(rows[0]["task"]), options.picture, options.only, options.by)
    if options.page:
        comparison.write(rows, options.page)


def cli() -> None:
    """Parse the command line, print and draw."""
    import tyro

    with report.door():
        main(tyro.cli(Results))
