"""Rows from files, the hub or datasets, as train, dev and test."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hiso_jax._engine import checks
from hiso_jax.tasks import labels, splits
from hiso_jax.tasks.prompts import Task, answers_in
from hiso_jax.tasks.reading import FORMATS, Rows, alike, read_file

__all__ = ["Data", "Rows", "check_text", "load", "read", "read_file", "split_files"]

SPELLINGS = {
    "train": {"train", "training"},
    "dev": {"dev", "development", "validation", "valid", "val", "eval", "evaluation"},
    "test": {"test", "testing"},
}
"""What files, folders and splits of hubs are called, in lower case."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
# What may lie beside the data under the name of a split without holding any of it.
_HARMLESS = {".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".md", ".log", ".py", ".sh", ".ipynb"}
# What holds data but is not read.
_UNREAD = {
    ".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".xls", ".xlsx", ".ods", ".arrow",
    ".feather", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".orc", ".avro", ".db", ".sqlite", ".xml",
    ".yaml", ".yml",
}  # fmt: skip


class Data(NamedTuple):
    """What a task was given."""

    parts: dict[str, Rows]  # "train", "dev" (to choose on) and "test" (to report)
    notes: tuple[str, ...]  # what was left out, or done otherwise than one may think


def load(
    task: Task,
    path: Any = None,
    columns: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Rows]:
    """Rows of ``train``, ``dev`` and ``test``: the parts of `read`, with its arguments."""
    return read(task, path, columns, seed).parts


def read(
    task: Task,
    path: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    seed: int = 0,
    names: Sequence[str] = (),
) -> Data:
    """Read a task's rows; ``docs/data.md`` has the rules.

    A folder has a file for each split, a single file is split 70 / 15 / 15 at random. Where
    there is no test split with labels, the dev split is the test, and a part of train the dev.
    Rows without a label are left out, with a note.

    Args:
      task: names the columns that must be there, and where it is on the hub.
      path: file or folder; a mapping from splits to ``datasets.Dataset`` objects or lists of
        rows; None: the hub.
      columns: names, for CSV and TSV without a header line.
      seed: of random splits.
      names: other columns whose values are text where they are there, such as clients' names.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a column is missing, two files are of one split, or rows do not fit; rows are
        counted as they were given, whichever were left out or go to another split.

    Example:
      >>> rows = [{"text": f"film {i}", "y": i % 2} for i in range(20)] + [{"text": "?", "y": None}]
      >>> found = read(Task("{text}", label="y", verbalizer=("bad", "good")), {"train": rows})
      >>> {name: len(part) for name, part in found.parts.items()}, found.notes
      ({'train': 14, 'test': 3, 'dev': 3}, ('train: 1 of 21 rows has no y, left out',))
    """
    where, notes = "/".join(task.hub), []
    if path is None:
        parts, notes = _from_hub(task)
    elif isinstance(path, (Mapping, list)) or hasattr(path, "to_list"):
        where, (parts, notes) = "data", _from_datasets(path)
    elif not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a file, a folder, rows, or a Dataset, got {type(path)}")
    elif Path(path).is_dir():
        where = str(path)
        files, notes = split_files(path)
        parts = {name: _joined(own, columns) for name, own in files.items()}
    else:
        where, parts = str(path), {"train": read_file(path, columns)}
        notes = _one_of_parts(Path(path))
    if "train" not in parts:
        raise ValueError(f"{where}: expected a split 'train', got {list(parts)}")
    wanted = [*task.columns, task.label, *names]
    parts = {name: _renamed(rows, wanted) for name, rows in parts.items()}
    for name, rows in parts.items():
        _check_columns(f"{where}: {name}", rows, task, name)
    missing = _missing_label(task, parts["train"])
    for name, rows in list(parts.items()):
        kept = []
        for number, row in enumerate(rows, 1):
            place = f"{where}: {name}, row {number}"
            if not missing(place, row):
                _check_row(place, row, task, names)
                kept.append(row)
        if gone := len(rows) - len(kept):
            if not kept and name != "test":
                raise ValueError(f"{where}: no row of {name} has a label, column {task.label!r}")
            what = f"rows {'has' if gone == 1 else 'have'} no {task.label}, left out"
            notes.append(f"{name}: {gone} of {len(rows)} {what}")
        _check_texts(f"{where}: no row of {name}", kept, task)
        parts[name] = kept
    return Data(_complete(where, parts, seed, notes), tuple(notes))


class New(NamedTuple):
    """Rows to be labeled."""

    rows: Rows
    numbers: list[int | None]  # of each row's label, None where it has none
    notes: tuple[str, ...]


def read_new(task: Task, path: str | os.PathLike[str], columns: Sequence[str] = ()) -> New:
    r"""Read the rows of one file to be labeled; they may have labels or not.

    Args:
      task: with classes; names the columns that must be there.
      path: of the file, as `read_file` reads it.
      columns: names, for CSV and TSV without a header line.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a column is missing, rows do not fit, or a label is none of the task's.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "new.jsonl"
      >>> _ = path.write_text('{"text": "a joy", "y": 1}\n{"text": "a bore", "y": null}')
      >>> read_new(Task("{text}", label="y", verbalizer=("bad", "good")), path).numbers
      [1, None]
    """
    where, rows = str(path), _renamed(read_file(path, columns), [*task.columns, task.label])
    _check_columns(where, rows, task, "test")  # of which labels may be missing
    missing, numbers = _missing_label(task, rows), []
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        for column in task.columns:
            check_text(f"{place}: {column}", row[column])
        try:
            numbers.append(None if missing(place, row) else task.label_of(row))
        except ValueError as error:
            hint = "without that column no label is looked at"
            raise ValueError(f"{place}: {error}; {hint}") from None
    _check_texts(f"{where}: no row", rows, task)
    return New(rows, numbers, tuple(_one_of_parts(Path(path))))


def made_up(task: Task) -> dict[str, Rows]:
    """Rows of all splits for whoever has no data and computes no loss: one of each label.

    Example:
      >>> made_up(Task("{text}", label="y", verbalizer=("bad", "good")))["train"]
      [{'text': 'some words', 'y': 0}, {'text': 'some words', 'y': 1}]
    """
    words: dict[str, Any] = {column: "some words" for column in task.columns}
    values = task.classes if task.is_class else ["some words"]
    rows = [words | {task.label: value} for value in values]
    return {name: rows for name in SPELLINGS}


def _one_of_parts(path: Path) -> list[str]:
    """A note if a file is one of several, as the hub writes them."""
    count = int(part[3]) if (part := _SHARD.fullmatch(path.stem)) else 1
    return [f"{path.name} is one of {count} parts, the others are not read"] if count > 1 else []


def split_files(folder: str | os.PathLike[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Which files of a folder are of which split, and notes on those that are of none.

    A file is of the split that it is called after: ``dev.csv``, ``Validation.jsonl``, the parts
    ``train-00000-of-00002.parquet``; failing that, of the one that its name has as a word,
    ``reviews_train.csv``.

    Raises:
      FileNotFoundError: none is of train.
      ValueError: two are of one split, parts are missing, or one cannot be read.
    """
    called: dict[str, list[Path]] = {}
    worded: dict[str, list[Path]] = {}
    others = []
    paths = sorted(p for p in Path(folder).iterdir() if p.name[0] != ".")
    for path in paths:
        kind, stem = path.suffix.lower(), path.stem.casefold()
        shard = _SHARD.fullmatch(stem)
        words = re.split(r"[\W_\d]+", stem)
        whole = [n for n, own in SPELLINGS.items() if (shard[1] if shard else stem) in own]
        named = [n for n, own in SPELLINGS.items() if own & set(words)]
        readable = kind in FORMATS and path.is_file()
        first = any(stem.partition(".")[0] in own for own in SPELLINGS.values())
        if not readable and ((first and kind not in _HARMLESS) or (named and kind in _UNREAD)):
            raise ValueError(f"{path}: not a file that is read, only {tuple(FORMATS)}; unpack or "
                             "convert it, or take it out of the folder")  # fmt: skip
        if not readable:
            others.append(path)
        elif whole:
            called.setdefault(whole[0], []).append(path)
        elif len(named) == 1:
            worded.setdefault(named[0], []).append(path)
        else:
            others.append(path)
    files = {}
    for name in SPELLINGS:
        own = called.get(name) or worded.get(name, [])
        if not _are_parts(own) and len(own) > 1:
            raise ValueError(f"{folder}: {', '.join(p.name for p in own)} are all of {name}; "
                             "leave one there, or join them")  # fmt: skip
        if own:
            files[name] = own
        others += [] if own is worded.get(name) else worded.get(name, [])
    if "train" not in files:
        there = ", ".join(p.name for p in paths) or "nothing"
        raise FileNotFoundError(
            f"{folder}: expected a file train{tuple(FORMATS)}, there is {there:.300}"
        )
    return files, [f"not read: {', '.join(sorted(p.name for p in others)):.300}"] if others else []


def _are_parts(paths: Sequence[Path]) -> bool:
    """Whether files are all the parts of one; some of them only are refused."""
    found = [_SHARD.fullmatch(path.stem) for path in paths]
    kinds = {(m[1], m[3], p.suffix) for m, p in zip(found, paths, strict=True) if m}
    if not paths or not all(found) or len(kinds) > 1:
        return False
    count = next(int(m[3]) for m in found if m)
    if [int(m[2]) for m in found if m] != list(range(count)):
        raise ValueError(f"{paths[0].parent}: of {count} parts there are only "
                         f"{', '.join(p.name for p in paths)}")  # fmt: skip
    return True


def _joined(paths: Sequence[Path], columns: Sequence[str]) -> Rows:
    """The rows of the files of one split."""
    parts = [read_file(path, columns) for path in paths]
    for path, rows in zip(paths, parts, strict=True):
        if rows and parts[0] and rows[0].keys() != parts[0][0].keys():
            raise ValueError(f"{path}: columns {list(rows[0])}, but {list(parts[0][0])} in "
                             f"{paths[0].name}")  # fmt: skip
    return [row for rows in parts for row in rows]


def _renamed(rows: Rows, wanted: Sequence[str]) -> Rows:
    """The rows with columns as they are asked for, whichever way Unicode writes their accents."""
    if not rows or all(column in rows[0] for column in wanted):
        return rows
    there = {checks.nfc(column): column for column in rows[0]}
    new = {there.get(checks.nfc(c)): c for c in wanted if c not in rows[0]}
    return [{new.get(column, column): value for column, value in row.items()} for row in rows]


def _check_columns(where: str, rows: Rows, task: Task, name: str) -> None:
    if not rows:
        raise ValueError(f"{where} has no rows")
    wanted = [*task.columns, *([] if name == "test" else [task.label])]
    if missing := [c for c in dict.fromkeys(wanted) if c not in rows[0]]:
        raise ValueError(f"{where} lacks columns {missing}; it has {list(rows[0])}")


def _missing_label(task: Task, train: Rows) -> Callable[[str, dict[str, Any]], bool]:
    """A function (place, row) -> whether the row's label is missing.

    -1 is how the hub writes a hidden label; it is one only if the task, or train, has it.
    """
    known = task.classes or [row[task.label] for row in train]
    minus = any(str(value).strip() in ("-1", "-1.0") for value in known)

    def missing(place: str, row: dict[str, Any]) -> bool:
        value = row.get(task.label)
        if not task.is_class:
            return checks.is_missing(value) or (not task.prompt and not str(value).strip())
        try:
            text = labels.spell(value)
        except ValueError as error:
            raise ValueError(f"{place}: {task.label}: {error}") from None
        check_text(f"{place}: {task.label}", text)
        return text is None or (text == "-1" and not minus)

    return missing


def check_text(where: str, value: Any) -> None:
    """Raise ValueError unless a model can be given a value as text."""
    if isinstance(value, (list, tuple, dict, bytes, np.ndarray)):
        raise ValueError(f"{where}: expected text, got {value!r:.60}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half of a pair of UTF-16, or bytes that are not UTF-8, in "
                             f"{value!r:.60}") from None  # fmt: skip


def _is_empty(value: Any) -> bool:
    return checks.is_missing(value) or not str(value).strip()


def _check_row(place: str, row: dict[str, Any], task: Task, names: Sequence[str]) -> None:
    for column in (*task.columns, *(name for name in names if name in row)):
        check_text(f"{place}: {column}", row[column])
    if task.is_class:
        if task.values or task.label_descriptions or task.hub:  # else its labels are the data's
            try:
                task.label_of(row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        return
    if task.label not in row:
        return
    place = f"{place}: {task.label}"
    if task.metric == "perplexity":
        check_text(place, row[task.label])
        return
    try:
        answers = answers_in(row[task.label])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    for answer in answers:
        check_text(place, answer)


def _check_texts(what: str, rows: Rows, task: Task) -> None:
    read_by = task.columns if rows else []
    if read_by and all(_is_empty(row[c]) for row in rows for c in read_by):
        raise ValueError(f"{what} has a text, column {', '.join(map(repr, read_by))}")


def _complete(where: str, parts: dict[str, Rows], seed: int, notes: list[str]) -> dict[str, Rows]:
    """All three splits; those that are not there are taken from dev and train."""
    if not parts.get("test") and "dev" in parts:
        parts["test"] = parts.pop("dev")
        notes.append("no test split with labels: dev is reported, a part of train is the dev split")
    rows = len(parts["train"])
    for name, share in (("test", 0.15), ("dev", 0.15 / 0.85)):
        if not parts.get(name):
            whole = parts["train"]
            picks = splits.hold_out(len(whole), share, seed)
            parts["train"], parts[name] = ([whole[i] for i in own] for own in picks)
    if not parts["train"]:
        raise ValueError(f"{where}: {rows} rows with labels are too few to take dev and test from")
    return parts


def _from_datasets(found: Any) -> tuple[dict[str, Rows], list[str]]:
    parts = found if isinstance(found, Mapping) else {"train": found}
    rows: dict[str, Rows] = {}
    others = []
    for name, part in parts.items():
        split = next((n for n, own in SPELLINGS.items() if str(name).casefold() in own), None)
        if split is None:
            others.append(str(name))
        elif split in rows:
            raise ValueError(
                f"data: two splits are called {split}, of {list(parts)}; leave one out"
            )
        elif not all(isinstance(row, Mapping) for row in part):
            raise TypeError(f"data: {name}: expected rows that are dicts")
        else:
            rows[split] = alike([dict(row) for row in part])
    return rows, [f"not read: the splits {', '.join(others)}"] if others else []


def _from_hub(task: Task) -> tuple[dict[str, Rows], list[str]]:
    import datasets

    if not task.hub:
        raise FileNotFoundError("data: this task is read from files; give a file or a folder")
    try:
        found: Any = datasets.load_dataset(task.hub[0], task.hub[1] if task.hub[1:] else None)
    except Exception as error:  # whatever the hub's client raises
        line = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"data: the hub gives no {'/'.join(task.hub)}: {line}") from None
    return _from_datasets(found)
