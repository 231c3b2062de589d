"""What a comparison is to run: entries of methods, learning rates, seeds and what else is varied.

A grid is a TOML file. At its top, for the whole file: ``task``, ``data``, ``columns``, ``out``.
Every ``[[run]]`` is an entry:

- ``method`` (one, or a list) and ``learning_rate`` (a list);
- ``vary``: a table of other options of the job, each a value or a list of values;
- ``seeds``, ``extend``, ``refine``, ``seeds_at_best``: how the best rate of each method and each
  combination of values is looked for, see `hiso_jax.train.search.Search`;
- ``by``: ``"loss"``, of the dev split at the end, or ``"metric"``.

What stands at the top, before the first entry, is what an entry has that does not say otherwise;
a ``vary`` at the top is completed by the entry's.
"""

import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_type_hints

from hiso_jax._engine import checks
from hiso_jax.train import job, methods, rows, search
from hiso_jax.train import options as choices
from hiso_jax.train.rows import Row
from hiso_jax.train.search import Run, Search


@dataclasses.dataclass(frozen=True)
class Entry:
    """Searches that are alike: one for each method and each combination of what is varied."""

    name: str
    """What people see of it."""
    task: str
    points: tuple[job.Options, ...]
    """Options of each search, but for learning rate and seed."""
    search: Search
    by: Literal["loss", "metric"] = "loss"

    def run(self, point: job.Options, run: Run) -> tuple[Row, job.Options]:
        """What names a run, and its options."""
        options = dataclasses.replace(point, learning_rate=run[0], seed=run[1])
        return dict(task=self.task, **choices.settings(options)), options


@dataclasses.dataclass(frozen=True)
class Grid:
    """A file of entries, or the one entry that options ask for."""

    out: Path
    entries: tuple[Entry, ...]


OF_THE_FILE = {"task": str, "data": Path, "columns": tuple[str, ...], "out": Path}
OF_AN_ENTRY: dict[str, Any] = {
    "method": tuple[str, ...],
    "learning_rate": tuple[float, ...],
    "vary": dict,
    "seeds": int,
    "extend": bool,
    "refine": bool,
    "seeds_at_best": int,
    "by": Literal["loss", "metric"],
}
"""What the keys of a file are; errors of both kinds begin with the option of the same name."""
FIRST_LOOK = 3
"""Seeds, where nothing else is said."""


def entry(
    name: str,
    task: str,
    start: job.Options,
    axes: dict[str, tuple[Any, ...]],
    *,
    method: tuple[str, ...] = (),
    learning_rate: tuple[float, ...] = (),
    by: Literal["loss", "metric"] = "loss",
    **how: Any,
) -> Entry:
    """An entry, if every run that it may ask for is one.

    Args:
      name: what people see of it.
      task: the job.
      start: its options.
      axes: the values of those that are varied.
      method: as of the job's --method.
      learning_rate: of the first look.
      by: what the best rate is chosen by.
      **how: the other fields of `Search`.

    Raises:
      TypeError, ValueError: something is out of range; begins with the option's name.
    """
    for key, values in (("--method", method), ("--learning-rate", learning_rate)):
        if not values:
            raise ValueError(f"{key}: expected at least one, got none")
    for rate in learning_rate:
        checks.number("--learning-rate", rate, 0, above=True)
    how = {"seeds": FIRST_LOOK} | how
    for key in ("seeds", "seeds_at_best"):
        checks.count(f"--{key.replace('_', '-')}", how.get(key, 1))
    for key in ("extend", "refine"):
        if how.get(key) and len(set(learning_rate)) < 2:
            raise ValueError(f"--{key}: expected two learning rates or more, got {learning_rate}")
    points = []
    for spelled in dict.fromkeys(map(methods.check, method)):
        for values in itertools.product(*(dict.fromkeys(axis) for axis in axes.values())):
            own: dict[str, Any] = dict(zip(axes, values, strict=True))
            points.append(dataclasses.replace(start, method=spelled, **own))
            choices.check(task, points[-1])
    return Entry(name, task, tuple(points), Search(learning_rate, **how), by)


def read(path: Path, data: Path | None = None, out: Path | None = None) -> Grid:
    """A grid as its file has it, with other data and another file of rows if they are given.

    Raises:
      ValueError: something in the file is none; names file, entry and key.
      OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--grid: {path} is not there")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    where = str(path)
    try:
        given = content.pop("run", None)
        tables = isinstance(given, list) and all(isinstance(table, dict) for table in given)
        if not tables or not given:
            raise ValueError("expected entries, each under [[run]], got none")
        top = _typed(content, OF_THE_FILE | OF_AN_ENTRY)
        of_file = {key: top.pop(key) for key in OF_THE_FILE if key in top}
        if "task" not in of_file:
            raise ValueError(
                f"--task: expected one of {', '.join(choices.TASKS)} at the top, got none"
            )
        task, columns = of_file["task"], of_file.get("columns", ())
        start = choices.defaults(task, data or of_file.get("data"), columns)
        entries = []
        for number, table in enumerate(given, 1):
            where = f"{path}: entry {number}"
            if early := sorted(OF_THE_FILE.keys() & table.keys()):
                raise ValueError(f"--{early[0]}: stands at the top, for the whole file")
            own = _typed(table, OF_AN_ENTRY)
            every = top | own
            every["vary"] = top.get("vary", {}) | own.get("vary", {})
            shown = _shown(every.get("method", ()), own.get("vary", {}))
            axes = _axes(type(start), task, every.pop("vary"))
            entries.append(entry(f"entry {number}, {shown}", task, start, axes, **every))
    except (TypeError, ValueError) as error:
        key = lambda found: found[1].replace("-", "_")  # noqa: E731
        raise ValueError(f"{where}: {re.sub(r'^--([a-z-]+)', key, str(error))}") from None
    return Grid(out or of_file.get("out", Path("runs") / f"{path.stem}.jsonl"), tuple(entries))


def _typed(table: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The values of a table, each as it is kept; ``methods`` is ``method``."""
    if {"method", "methods"} <= table.keys():
        raise ValueError("--methods: expected method or methods, got both")
    out = {}
    for given, value in table.items():
        key = "method" if given == "methods" else given
        if key not in kinds:
            raise ValueError(f"--{given}: expected one of {', '.join(kinds)}")
        try:
            out[key] = choices.fit(kinds[key], value)
        except ValueError as wanted:
            raise ValueError(f"--{given}: expected {wanted}, got {value!r}") from None
    return out


def _axes(kind: type, task: str, table: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What is varied, from a table of values and of lists of them."""
    hints, axes = get_type_hints(kind), {}
    for given, values in table.items():
        name = choices.modern(given)
        if name not in hints or name in choices.ELSEWHERE:
            raise ValueError(f"--vary: {task} has no option {given!r} that can be varied")
        values = values if isinstance(values, list) else [values]
        try:
            axes[name] = tuple(choices.fit(hints[name], value) for value in values)
        except ValueError as wanted:
            raise ValueError(f"--vary: expected {wanted} for {given}, got {values!r}") from None
        if not values:
            raise ValueError(f"--vary: expected at least one value for {given}, got none")
    return axes


def _shown(names: tuple[str, ...], table: dict[str, Any]) -> str:
    """An entry in a few words."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value)  # noqa: E731
    return ", ".join((" ".join(names), *(f"{k}={text(v)}" for k, v in table.items())))


class Found:
    """The rows of a file, by what they are a run of; those that lack an option are none."""

    def __init__(self, grid: Grid, found: list[Row]):
        first = grid.entries[0]
        self.names = first.run(first.points[0], (1.0, 0))[0].keys() - {"learning_rate", "seed"}
        self._rows: dict[str, dict[Run, Row]] = {}
        for row in found:
            self.add(row)

    def add(self, row: Row) -> None:
        """One more, unless there is one of this run."""
        if self.names <= row.keys():
            own = self._rows.setdefault(rows.key(row, self.names), {})
            own.setdefault((row["learning_rate"], row["seed"]), row)

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self._rows.values()))

    def of(self, entry: Entry, point: job.Options) -> dict[Run, Row]:
        """Those of a search, by learning rate and seed."""
        return self._rows.get(rows.key(entry.run(point, (1.0, 0))[0], self.names), {})


def score(row: Row, by: str = "loss") -> float:
    """How a run ended on the dev split, the lower the better; infinite if it diverged."""
    _, loss, metric = row["curve"][-1]
    upwards = by == "metric" and row["metric"] != "perplexity"
    value = metric if by == "metric" else loss
    if row["diverged"] or value is None or math.isnan(value):
        return math.inf
    return -value if upwards else value


def scores(entry: Entry, point: job.Options, found: Found) -> dict[Run, float]:
    """`score` of what there is of a search."""
    return {run: score(row, entry.by) for run, row in found.of(entry, point).items()}


def missing(entry: Entry, found: Found) -> Iterator[tuple[Row, job.Options]]:
    """What an entry asks for next: what names each run, and its options."""
    for point in entry.points:
        for run in search.missing(entry.search, scores(entry, point, found)):
            yield entry.run(point, run)


def forecast(entry: Entry, found: Found) -> int:
    """How many runs of it are left, by `hiso_jax.train.search.forecast`."""
    return sum(search.forecast(entry.search, scores(entry, p, found)) for p in entry.points)


def finished(grid: Grid, found: Found) -> list[Row]:
    """The rows of a grid: of all runs that were asked for, each once."""
    out: dict[int, Row] = {}
    for entry in grid.entries:
        for point in entry.points:
            own = found.of(entry, point)
            asked = search.asked(entry.search, scores(entry, point, found))
            out |= {id(own[run]): own[run] for run in asked if run in own}
    return list(out.values())
