"""Rows from files or the hub, as train, dev and test."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.tasks.prompts import Task

Rows = list[dict[str, Any]]
_FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet",
            ".txt": "text"}  # fmt: skip
_STEMS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


def read_file(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> Rows:
    """Read a CSV, TSV, JSONL, JSON, Parquet or text file through ``datasets``.

    Args:
      path: of the file; SQuAD's nested JSON and JSON lists of strings are understood too.
      columns: names, for a CSV or TSV without a header line.

    Raises:
      FileNotFoundError, ValueError: no such file; a suffix that is not known.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path}: expected a suffix of {tuple(_FORMATS)}, got {path.suffix!r}")
    if path.suffix == ".json":
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict) and "paragraphs" in str(content.get("data"))[:10_000]:
            return _squad(content["data"])
        if isinstance(content, list):
            return [row if isinstance(row, dict) else {"text": row} for row in content]
    options: Any = {}
    if path.suffix == ".tsv":
        options |= {"sep": "\t", "quoting": 3}  # a quote is a letter like any other
    if columns and path.suffix in (".csv", ".tsv"):
        options |= {"names": list(columns), "header": None}
    options |= {"data_files": str(path), "split": "train"}
    load: Any = datasets.load_dataset
    return load(_FORMATS[path.suffix], **options).to_list()


def _squad(articles: Sequence[dict[str, Any]]) -> Rows:
    return [
        {"title": article.get("title", ""), "context": paragraph["context"],
         "question": qa["question"], "answers": [a["text"] for a in qa["answers"]], "id": qa["id"]}
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]  # fmt: skip


def _labelled(rows: Rows, task: Task) -> bool:
    value = rows[0].get(task.label) if rows else None
    return value not in (None, "", -1, "-1")


def load(
    task: Task,
    path: str | os.PathLike[str] | None = None,
    columns: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Rows]:
    """Rows of ``train``, ``dev`` (to choose on) and ``test`` (to report).

    A folder has files of these names; a single file is split 70 / 15 / 15 at random. Where
    there is no test split with labels, the dev split is the test, and a part of train the dev.

    Args:
      task: names the columns that must be there, and where it is on the hub.
      path: file or folder; None: the hub.
      columns: names, for CSV and TSV without a header line.
      seed: of random splits.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a column is missing.
    """
    if path is None:
        parts = _from_hub(task)
    elif Path(path).is_dir():
        files = {f.stem: f for f in sorted(Path(path).iterdir()) if f.suffix in _FORMATS}
        parts = {
            name: read_file(files[stem], columns)
            for name, stems in _STEMS.items()
            for stem in stems
            if stem in files
        }
        if "train" not in parts:
            raise FileNotFoundError(f"{path}: expected a file train{tuple(_FORMATS)}")
    else:
        parts = {"train": read_file(path, columns)}
    for name, rows in parts.items():
        wanted = [*task.columns, *([task.label] if name == "train" else [])]
        if missing := [c for c in wanted if rows and c not in rows[0]]:
            raise ValueError(f"{path or task.hub}: {name} lacks columns {missing}; it has "
                             f"{list(rows[0])}")  # fmt: skip
    if not _labelled(parts.get("test", []), task):
        parts["test"] = parts.pop("dev", [])
    for name, share in (("test", 0.15), ("dev", 0.15 / 0.85)):
        if not parts.get(name):
            parts["train"], parts[name] = _cut(parts["train"], share, seed)
    return parts


def _cut(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    held = set(order[: max(int(share * len(rows)), 1)].tolist())
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [rows[i] for i in sorted(held)]


def _from_hub(task: Task) -> dict[str, Rows]:
    import datasets

    if not task.hub:
        raise FileNotFoundError("data: this task is read from files; give a file or a folder")
    found: Any = datasets.load_dataset(task.hub[0], task.hub[1] if task.hub[1:] else None)
    names = {"train": "train", "validation": "dev", "test": "test"}
    return {names[n]: rows.to_list() for n, rows in found.items() if n in names}
