"""What `Clients.from_dataset` takes, as columns of numbers and rows of each client."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def columns_of(dataset: Any) -> tuple[dict[str, Any], int]:
    """The columns of a dataset by name, and its number of rows."""
    if hasattr(dataset, "column_names"):  # a datasets.Dataset; those of a DatasetDict are splits
        if isinstance(dataset, Mapping):
            raise ValueError(f"dataset: expected one split, got {list(dataset)}; give dataset[...]")
        # Numbers as NumPy has them, without a Python object for each.
        whole = dataset.with_format("numpy")
        table = {name: whole[name][:] for name in dataset.column_names}
    elif isinstance(dataset, Mapping):
        table = dict(dataset)
    else:
        table = _of_rows(dataset)
    counts = {name: len(column) for name, column in table.items()}
    if len({*counts.values()}) != 1 or not all(counts.values()):
        raise ValueError(f"dataset: expected columns of one length >= 1, got {counts}")
    return table, next(iter(counts.values()))


def _of_rows(dataset: Any) -> dict[str, Any]:
    """Rows turned into columns."""
    try:
        rows = [dataset[i] for i in range(len(dataset))]
    except (TypeError, KeyError) as error:
        raise ValueError(
            "dataset: expected a datasets.Dataset, a mapping from names to columns, or a sequence "
            f"of rows, got {type(dataset).__name__}"
        ) from error
    if not rows:
        raise ValueError("dataset: expected at least one row, got none")
    if not all(isinstance(row, Mapping) for row in rows):
        width = len(rows[0]) if isinstance(rows[0], tuple | list) else 0
        if not width or not all(isinstance(r, tuple | list) and len(r) == width for r in rows):
            raise ValueError("dataset: expected rows that are mappings, or tuples of one length")
        names = ("x", "y") if width == 2 else tuple(map(str, range(width)))
        rows = [dict(zip(names, row, strict=True)) for row in rows]
    names = list(rows[0])
    if other := next((i for i, row in enumerate(rows) if [*row] != names), None):
        raise ValueError(f"dataset: row {other} has {list(rows[other])}, the first {names}")
    return {name: [row[name] for row in rows] for name in names}


def as_array(name: str, column: Any) -> np.ndarray:
    """A column as an array of numbers."""
    remedy = "tokenize it first, or name the columns to keep in columns="
    try:
        array = np.asarray(column)
    except ValueError:
        raise ValueError(
            f"dataset: rows of column {name!r} have several shapes; pad them"
        ) from None
    if array.dtype == object or array.dtype.kind not in "biuf":
        raise ValueError(f"dataset: column {name!r} is no array of numbers, got {array.dtype} "
                         f"({column[0]!r:.40}); {remedy}")  # fmt: skip
    return array


def numbers_of(partition: Any, count: int) -> dict[Any, np.ndarray]:
    """The numbers of each client's rows as they were given, checked."""
    given = partition if isinstance(partition, Mapping) else dict(enumerate(partition))
    owners = {name: np.asarray(numbers) for name, numbers in given.items()}
    for name, numbers in owners.items():
        if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
            raise ValueError(f"partition: client {name!r}: expected numbers of rows, at least one, "
                             f"got {given[name]!r:.60}")  # fmt: skip
    if not owners:
        raise ValueError("partition: expected at least one client, got none")
    every = np.concatenate(list(owners.values()))
    if every.min() < 0 or every.max() >= count:
        raise ValueError(f"partition: expected numbers from 0 to {count - 1}, got {every.min()} to "
                         f"{every.max()}")  # fmt: skip
    if len(every) != len(np.unique(every)):
        raise ValueError("partition: a row is of two clients, or twice of one")
    return owners
