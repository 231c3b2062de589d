"""Rows of a comparison, and the curves of its methods over their seeds."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hiso_jax.train import rows as files
from hiso_jax.train.methods import OWN
from hiso_jax.train.rows import Row
from hiso_jax.train.settings import renamed

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
    "size_spread": 0.0,
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
    shared = {*named, *DEFAULTS_OF_OLD_ROWS} - {"size_spread"}
    # What follows the metric is what came out.
    names = [n for n in itertools.takewhile(lambda n: n != "metric", rows[0]) if n not in shared]
    # Rows with upper directions name their P in any case.
    plain = [r for r in rows if not r.get("upper_directions")] or rows
    voters = lambda n: plain if n == "num_perturbations" else rows  # noqa: E731
    value = lambda row, n: str(row.get(n, DEFAULTS_OF_OLD_ROWS.get(n)))  # noqa: E731
    usual = {n: Counter(value(r, n) for r in voters(n)).most_common(1)[0][0] for n in names}
    other = lambda row, names: [f", {n}={v}" for n in names if (v := value(row, n)) != usual[n]]  # noqa: E731

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
        worst = np.inf if own[0]["metric"] == "perplexity" else 0.0  # of a run that diverged
        figures = np.full((len(own), len(rounds)), worst)
        for i, row in enumerate(own):
            for j, (_, loss, figure) in enumerate(row["curve"]):
                losses[i, j] = np.inf if loss is None or (row["diverged"] and j) else loss
                figures[i, j] = worst if figure is None or (row["diverged"] and j) else figure
        none = lambda r: r["diverged"] or r["test"] is None  # noqa: E731
        tests = np.array([worst if none(r) else r["test"] for r in own])
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


def tuned(every: list[Curve], by: str = "loss") -> dict[str, Curve]:
    """Each method at the learning rate with the lowest dev loss at the end, or the best metric.

    Args:
      every: curves.
      by: ``"loss"``, or ``"metric"`` if more of it is better.
    """
    best: dict[str, Curve] = {}
    cost = lambda c: c.loss if by == "loss" else -c.figures[:, -1].mean()  # noqa: E731
    for curve in compared(every):
        best[curve.method] = min(best.get(curve.method, curve), curve, key=cost)
    return best


def edge(best: Curve, every: list[Curve]) -> bool:
    """Whether the best learning rate is the lowest or the highest of those tried."""
    rates = [c.learning_rate for c in every if c.method == best.method]
    return best.learning_rate in (min(rates), max(rates)) and len(rates) > 1


def deviation(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over the first axis, the seeds; 0 where there is one seed.

    Its square has the divisor S - 1: that of few seeds is not too small on average.
    """
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def spread(values: np.ndarray, shown: Callable[[float], str]) -> str:
    """Mean and sample standard deviation over seeds, of which one has none."""
    alike = len(values) > 1 and np.isfinite(values).all()
    return shown(values.mean()) + (f" ± {shown(float(deviation(values)))}" if alike else "")
