"""`compare.html`: a comparison as one page, with the methods to choose among; it needs no network.

Made of the rows that `hiso compare` wrote and of nothing else. Which curves are shown is decided by
check boxes and style rules: there is no script in it.
"""

import html
import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib import color_sequences
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator, NullFormatter

from hiso_jax._engine import files
from hiso_jax.train import curves, page, report
from hiso_jax.train.curves import Curve
from hiso_jax.train.methods import title
from hiso_jax.train.page import Markup
from hiso_jax.train.rows import Row

SHOWN = 8
"""Methods that are shown at first: of more, those with the lowest dev loss, HiSo and DeComFL."""
COLORS = color_sequences["tab10"]
DASHES = ("solid", "dashed", "dotted", "dashdot")
STYLE = """
body { max-width: 80rem; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 13rem; }
td svg { width: 2.4rem; height: 0.8rem; vertical-align: middle; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.pictures svg { max-width: 34rem; }
button { margin: 0.6rem 0; }
"""


def _look(number: int) -> dict[str, str]:
    """Color and dashes of a method's curves."""
    return {
        "color": to_hex(COLORS[number % len(COLORS)]),
        "linestyle": DASHES[number // len(COLORS) % len(DASHES)],
    }


def _panels(names: Sequence[str], best: dict[str, Curve], every: Sequence[Curve], metric: str,
            mark: str) -> str:  # fmt: skip
    """Metric and loss against rounds, passes and bytes; the loss at the end against the rate."""
    scale = report.percent(metric)
    figure = f"dev {metric}" + ", %" * (scale > 1)
    axes = {"round": lambda curve: 1.0,
            "forward passes of a client that always took part": lambda curve: curve.passes,
            "bytes sent by such a client": lambda curve: float(curve.bytes)}  # fmt: skip
    pictures, count = [], itertools.count()
    for x_label, unit in axes.items():
        picture = report.blank(5, 5.6)
        upper, lower = picture.subplots(2, 1, sharex=True)
        bytes_sent = x_label.startswith("bytes")
        for number, name in enumerate(names):
            curve, look = best[name], _look(number)
            first = int(bytes_sent)  # which is logarithmic, and begins at nothing
            x = curve.rounds[first:] * unit(curve)
            for axis, values in ((upper, scale * curve.figures), (lower, curve.losses)):
                mean, off = values.mean(0)[first:], curves.deviation(values)[first:]
                dots = "." if len(x) < 4 else None  # or one look would be a line of no length
                line = axis.plot(x, mean, linewidth=1.4, marker=dots, **look)[0]
                band = axis.fill_between(x, mean - off, mean + off, color=look["color"], alpha=0.12)
                for what in (line, band):  # its id is what the style rules know it by
                    what.set_gid(f"{mark}{number}-{next(count)}")
        upper.set(ylabel=figure)
        lower.set(ylabel="dev loss", xlabel=x_label)
        if bytes_sent:
            lower.set_xscale("log")
            lower.xaxis.set_minor_formatter(NullFormatter())
        else:
            lower.xaxis.set_major_locator(MaxNLocator(5))
        pictures.append(page.svg(report.framed(picture)))
    picture = report.blank(5, 2.9)
    axis = picture.subplots()
    for number, name in enumerate(names):
        own = sorted((c for c in every if c.method == name), key=lambda c: c.learning_rate)
        line = axis.plot([c.learning_rate for c in own], [c.loss for c in own], marker=".",
                         linewidth=1.4, **_look(number))[0]  # fmt: skip
        line.set_gid(f"{mark}{number}-{next(count)}")
    axis.set(xlabel="learning rate", ylabel="dev loss at the end", xscale="log")
    pictures.append(page.svg(report.framed(picture)))
    return "".join(pictures)


def _swatch(look: dict[str, str]) -> str:
    """A piece of a method's line."""
    dashes = {"dashed": "5 2", "dotted": "1.5 2", "dashdot": "6 2 1.5 2"}.get(look["linestyle"], "")
    return (
        f'<svg viewBox="0 0 24 8"><path d="M0 4H24" stroke="{look["color"]}" stroke-width="2.5" '
        f'stroke-dasharray="{dashes}"></path></svg>'
    )


def _section(task: str, rows: list[Row], mark: str, chosen_by: str) -> tuple[str, str]:
    """A task's table and pictures, and the style rules by which methods are left out."""
    every = curves.curves(rows)
    metric = rows[0]["metric"]
    chosen_by = "loss" if metric == "perplexity" else chosen_by  # which is its exponential
    best = curves.tuned(every, chosen_by)
    names = sorted(best, key=lambda name: best[name].loss)
    # Of very many, those that are looked for are shown; the others are a click away.
    shown = {*names[:SHOWN], "hiso", "decomfl"} if len(names) > SHOWN + 2 else {*names}
    show = lambda value: report.figure(metric, value)  # noqa: E731
    lines, rules = [], []
    for number, name in enumerate(names):
        curve = best[name]
        checked = " checked" * (name in shown)
        label = f'<label><input type="checkbox" id="{mark}{number}"{checked}> ' + (
            f"{_swatch(_look(number))} {html.escape(title(name))}</label>"
        )
        at_edge = " (edge)" * curves.edge(curve, every)
        lines.append([
            Markup(label),
            f"{curve.learning_rate:g}{at_edge}",
            curves.spread(curve.losses[:, -1], "{:.3f}".format),
            curves.spread(curve.figures[:, -1], show),
            curves.spread(curve.tests, show),
            len(curve.tests),
            sum(c.diverged for c in every if c.method == name),
            round(curve.passes, 2),
            report.size(curve.bytes),
            f"{curve.seconds:.0f}",
        ])  # fmt: skip
        rules.append(f"body:has(#{mark}{number}:not(:checked)) [id^='{mark}{number}-']")
    head = ["method", "best rate", "dev loss", f"dev {metric}", f"test {metric}", "seeds",
            "diverged", "passes a round", "sent a round", "seconds a run"]  # fmt: skip
    parts = [
        f"<h2>{html.escape(task)}</h2>",
        "<form>", page.table(lines, head), '<button type="reset">as at first</button></form>',
        f'<div class="pictures">{_panels(names, best, every, metric, mark)}</div>',
    ]  # fmt: skip
    return "".join(parts), ",\n".join(rules) + " { display: none; }\n"


def comparison(rows: list[Row], chosen_by: str = "loss") -> str:
    """The page of a comparison's rows, a section a task.

    Args:
      rows: of any tasks.
      chosen_by: what the best learning rate is the best by, ``"loss"`` or ``"metric"``.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows: there are none to make a page of")
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    name = f"Comparison: {', '.join(tasks)}"
    own = lambda task: [row for row in rows if str(row["task"]) == task]  # noqa: E731
    sections = [_section(task, own(task), f"m{i}-", chosen_by) for i, task in enumerate(tasks)]
    best = "lowest dev loss" if chosen_by == "loss" else "best dev metric"
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p>{len(rows)} runs. Each method is shown at the learning rate with the {best}, "
        "mean and sample standard deviation over seeds; \"edge\" says that this is the lowest or "
        "highest rate that was tried. Diverged are counted at all rates.</p>",
        "<p>Check a method to see its curves.</p>",
        *(section for section, _ in sections),
    ]  # fmt: skip
    return page.document(name, parts, STYLE + "".join(rules for _, rules in sections))


def write(rows: list[Row], path: Path, chosen_by: str = "loss") -> None:
    """Write the page, whole or not at all."""
    with files.atomic_write(path) as part:
        part.write_text(comparison(rows, chosen_by), encoding="utf-8")
