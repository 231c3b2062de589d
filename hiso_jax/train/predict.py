"""`hiso predict RUN --data FILE`: label new rows with the model that a run has fine-tuned."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from hiso_jax._engine import checks, files
from hiso_jax.tasks import data as files_of_rows
from hiso_jax.tasks.data import Rows
from hiso_jax.tasks.problem import Problem
from hiso_jax.tasks.prompts import Task
from hiso_jax.train import finetune, folders, llm, report, settings

ADDED = ("prediction", "probability")
"""Columns that are added to those of the data."""
BATCH = 32


class Run(NamedTuple):
    """What a run left of which rows are labeled."""

    options: finetune.Options
    task: Task
    values: tuple[str, ...]  # of the label, as labels.json spells them
    model: Path
    rounds: int | None  # that it has taken, if its summary says so

    def problem(self) -> Problem:
        """The run's problem with its fine-tuned model, and no data."""
        options = dataclasses.replace(self.options, answers=0)  # which needs data
        return finetune.build(options, self.values, files_of_rows.made_up, self.model)


def read_run(folder: Path) -> Run:
    """Read what a run left, but not its weights.

    Args:
      folder: of the run; of a run of several methods the folder of one.

    Raises:
      ValueError: there is no run of a text classification, or it has no model yet.
    """
    path = folders.find(folder, "options.json")
    try:
        saved = json.loads((path or folder).read_text())
        job, given = saved["job"], settings.renamed(saved["options"])
        methods = list(saved["learning_rates"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        what = "is no run" if folder.exists() else "is not there"
        # As deep as a site's kit has them: a home folder is not searched.
        near = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/options.json")]
        below = sorted(str(path.parent) for path in near)[:3]
        hint = f"; there is one in {', '.join(below)}" if below else ""
        raise ValueError(f"RUN: {folder} {what}; expected the folder of a job, which has "
                         f"options.json{hint}") from None  # fmt: skip
    wanted = "hiso predict labels texts, with runs of hiso finetune and hiso llm"
    if job not in ("finetune", "llm", "nvflare"):
        raise ValueError(f"RUN: {folder} is a run of hiso {job}; {wanted}")
    if job == "llm":
        options = llm.of_task(llm.Options(**settings.restored(llm.Options, given)))
    else:
        options = finetune.Options(**settings.restored(finetune.Options, given))
    if not finetune.task_of(options).is_class:
        raise ValueError(f"RUN: {folder} is a run of --task {options.task}, which has no labels; "
                         f"{wanted} that learn them")  # fmt: skip
    labels, model = folders.find(folder, "labels.json"), folder / "model"
    if labels is None or not (model / "config.json").is_file():
        one = [folder / method for method in methods if len(methods) > 1]
        if one and folder.joinpath("options.json").is_file():
            raise ValueError(f"RUN: {folder} has a run of each of {', '.join(methods)}; give the "
                             f"folder of one, {one[0]}")  # fmt: skip
        raise ValueError(f"RUN: {folder} has no model yet, which a run writes when it ends; to go "
                         f"on with it: hiso {job} --resume {(path or folder).parent}")  # fmt: skip
    values = tuple(str(row["label"]) for row in json.loads(labels.read_text()))
    try:
        rounds = int(json.loads((folder / "summary.json").read_text())["rounds"])
    except (OSError, ValueError, LookupError, TypeError):
        rounds = None
    return Run(options, finetune.task_of(options, values), values, model, rounds)


def logits_of(
    problem: Problem, rows: Rows, batch_size: int = BATCH, on_batch: Any = lambda done: None
) -> tuple[np.ndarray, int]:
    """Logits of rows, float32 [N, labels], and how many texts took all tokens there are.

    Args:
      problem: of texts with classes.
      rows: N, each with a label, which changes nothing.
      batch_size: rows that are computed at a time.
      on_batch: called after each with the number of rows that are done.

    Raises:
      ValueError: a logit is NaN or infinite; names the row.
    """
    assert problem.logits is not None and problem.columns is not None
    function, size = jax.jit(problem.logits), min(batch_size, len(rows))
    parts, full = [], 0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        # The last batch is filled up: one shape, so one program.
        batch = problem.columns([*part, *part[-1:] * (size - len(part))])
        full += int(np.all(batch["attention_mask"], -1)[: len(part)].sum())
        logits = np.asarray(function(problem.params, problem.prepare(batch)), np.float32)
        parts.append(logits[: len(part)])
        if (bad := np.flatnonzero(~np.isfinite(parts[-1]).all(-1))).size:
            raise ValueError(f"row {start + int(bad[0]) + 1}: the model gives NaN or infinity; its "
                             "weights are broken, as by a learning rate too high")  # fmt: skip
        on_batch(start + len(part))
    return np.concatenate(parts), full


def measured(problem: Problem, logits: np.ndarray, numbers: Sequence[int | None]) -> float:
    """The problem's metric over the rows that have a label.

    Args:
      problem: has the metric.
      logits: [N, labels].
      numbers: N, of each row's label; None where it has none.
    """
    known = np.array([i for i, number in enumerate(numbers) if number is not None])
    wanted = np.array([number for number in numbers if number is not None])
    confusion = np.zeros((logits.shape[1],) * 2)
    np.add.at(confusion, (wanted, logits[known].argmax(-1)), 1)
    return problem.metric_value({"loss": 0.0, "count": 1.0, "confusion": confusion})[1]


def _cell(value: Any) -> str:
    """A value as text; what is missing is empty, lists and objects are JSON."""
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if checks.is_missing(value) else str(value)


def _line(cells: Sequence[str]) -> str:
    """A line of CSV. With another end of lines csv puts no quotes around a lone carriage return."""
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue().removesuffix("\r\n") + "\n"


def write(path: Path, rows: Rows, labels: Sequence[str], logits: np.ndarray) -> list[int]:
    """Write rows with their predictions as CSV, whole or not at all.

    Args:
      path: of the file.
      rows: N, with the same keys.
      labels: as they are to be written.
      logits: [N, labels].

    Returns:
      How many rows each label was given.
    """
    given, wide = logits.argmax(-1).tolist(), logits.astype(np.float64)
    largest = 1 / np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)  # of the softmax
    with files.atomic_write(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        file.write(_line([*rows[0], *ADDED]))
        for row, number, share in zip(rows, given, largest, strict=True):
            file.write(_line([*map(_cell, row.values()), labels[int(number)], f"{share:.4f}"]))
    return np.bincount(given, minlength=len(labels)).tolist()


def predict(
    run: Path,
    data: Path,
    out: Path,
    columns: tuple[str, ...] = (),
    batch_size: int = BATCH,
) -> None:
    """Label the rows of a file, say what came out, and write it.

    Args:
      run: folder of a run.
      data: file of the rows.
      out: the CSV to be written.
      columns: names, for CSV and TSV without a header line.
      batch_size: rows that are computed at a time.

    Raises:
      OSError, ValueError: what is wrong, before anything is computed.
    """
    checks.count("--batch-size", batch_size)
    if out.suffix.lower() != ".csv":
        raise ValueError(f"--out: expected a name that ends in .csv, got {str(out)!r}")
    if out.exists():
        raise FileExistsError(f"--out: {out} exists; nothing is written over")
    found = read_run(run)
    new = files_of_rows.read_new(found.task, data, columns)
    if taken := [name for name in ADDED if name in new.rows[0]]:
        raise ValueError(f"{data} has a column {taken[0]!r} already, which is to be added; rename "
                         "it in the file")  # fmt: skip
    if (done := found.rounds) is not None and done < found.options.rounds:
        report.say(f"Note: the run was stopped after {done} of {found.options.rounds} rounds",
                   style="yellow")  # fmt: skip
    report.say("Reading the model ...")
    problem = found.problem()
    # Rows become columns with their labels: those that have none get any.
    any_label = {found.task.label: found.task.classes[0]}
    labeled = [row if number is not None else row | any_label
                for row, number in zip(new.rows, new.numbers, strict=True)]  # fmt: skip
    with report.progress() as bar:
        task = bar.add_task("predicting", total=len(labeled), status="")
        logits, full = logits_of(
            problem, labeled, batch_size, lambda done: bar.update(task, completed=done)
        )
    counts = write(out, new.rows, found.values, logits)
    count, known = len(labeled), sum(number is not None for number in new.numbers)
    cut = (f"{full:,} of {count:,} texts take all tokens of the run's --length; longer ones are "
           "not read to the end or from the beginning")  # fmt: skip
    for note in (*new.notes, *([cut] if full else ())):
        report.say(f"Note: {note}", style="yellow")
    if known:
        shown = report.figure(problem.metric, measured(problem, logits, new.numbers))
        report.say(f"{problem.metric} ", shown, f" ({known:,} of {count:,} rows have a label)")
    _say_counts(problem.classes, counts)
    report.say("Written to ", str(out))


def _say_counts(classes: Sequence[tuple[str, str]], counts: Sequence[int]) -> None:
    """Print how many rows each label was given, the most frequent first."""
    named = [(count, label if word in ("", label) else f"{label} ({word})")
             for (label, word), count in zip(classes, counts, strict=True) if count]  # fmt: skip
    named.sort(key=lambda pair: -pair[0])
    shown = ", ".join(f"{count:,} as {name}" for count, name in named[: report.MOST])
    more = f", and {len(named) - report.MOST} more labels" * (len(named) > report.MOST)
    report.say(f"{sum(counts):,} rows labeled: {shown}{more}")


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    data: Path,
    out: Path = Path("predictions.csv"),
    columns: tuple[str, ...] = (),
    batch_size: int = BATCH,
) -> None:
    """Label new rows with the model of a text classification that hiso finetune or llm has run.

    Writes the rows as CSV with two more columns: prediction, the label, and probability, the
    label's among all labels. Where rows have a label already, the run's metric is printed, too.

    Args:
      run: the folder of a run; of two methods, that of one.
      data: a file with the columns that the run's prompt reads, in any format of hiso finetune.
      out: the CSV to write; must not exist.
      columns: names of the columns of a CSV or TSV without a header line.
      batch_size: rows that are computed at a time.
    """
    with report.door():
        predict(run, data, out, columns, batch_size)


def cli() -> None:
    """Parse the command line and predict."""
    tyro.cli(main)
