"""Who takes part: clients by name, their examples, and what is drawn of both in a round.

Everything random here is a function of (seed, round), so a run can be stopped after any
round and resumed, and two methods can be given the very same clients and batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hiso_jax._engine import checks

Arrays = dict[str, np.ndarray]
"""Named columns of one client: each [N, ...], the same N."""


def draw(
    names: Sequence[str],
    count: int,
    round: int,
    seed: int = 0,
    shares: Any = None,
    balanced: bool = False,
) -> list[str]:
    """Draw the names of `count` different clients for a round; needs no data of theirs.

    Args:
      names: of all clients; their order counts.
      count: C.
      round: number of the round.
      seed: of the run.
      shares: [clients] the chance of each, by default all alike.
      balanced: in turns: nobody is drawn again before as many rounds as can be made of all the
        clients have passed, so that nobody takes part in more than
        ``ceil(rounds / (clients // count))``. Who is drawn most answers for a privacy budget.

    Raises:
      ValueError: there are fewer clients.

    Example:
      >>> sorted(draw(["a", "b", "c"], 3, round=0))
      ['a', 'b', 'c']
      >>> sorted(n for r in range(6) for n in draw(["a", "b", "c"], 1, r, balanced=True))
      ['a', 'a', 'b', 'b', 'c', 'c']
    """
    if not 1 <= count <= len(names):
        raise ValueError(f"count: expected 1 to {len(names)} clients a round, got {count}")
    if balanced:
        turn, at = divmod(round, len(names) // count)
        order = np.random.default_rng([seed, turn, 3]).permutation(len(names))
        return [names[int(i)] for i in order[at * count : (at + 1) * count]]
    rng = np.random.default_rng([seed, round, 0])
    picks = rng.choice(len(names), count, replace=False, p=shares)
    return [names[int(i)] for i in picks]


class Clients:
    """Clients by name, each with columns of its own examples.

    Names are text, as in a ledger: ``str`` of what is given, which any method may be given again.

    Args:
      data: name -> columns; every column of a client has its number of examples first.

    Raises:
      ValueError: no client, a client without examples, columns that do not match, or names that
        are missing or the same text.

    Example:
      >>> import numpy as np
      >>> clients = Clients({"a": {"x": np.arange(3)}, "b": {"x": np.arange(10, 15)}})
      >>> batch = clients.batches(["b"], round=0, batch_size=2)
      >>> {name: column.shape for name, column in batch.items()}
      {'x': (1, 1, 2), 'weight': (1, 1, 2)}
    """

    def __init__(self, data: Mapping[Any, Mapping[str, np.ndarray]]):
        names = checks.clients("data", data)
        clients = {
            name: {k: np.asarray(v) for k, v in own.items()}
            for name, own in zip(names, data.values(), strict=True)
        }
        columns = {(k, v.shape[1:], v.dtype) for k, v in next(iter(clients.values())).items()}
        sizes = []
        for name, own in clients.items():
            lengths = {len(v) for v in own.values()}
            if len(lengths) != 1 or min(lengths) == 0:
                raise ValueError(
                    f"data: client {name!r} needs columns of one length >= 1, got "
                    f"{ {k: len(v) for k, v in own.items()} }"
                )
            if {(k, v.shape[1:], v.dtype) for k, v in own.items()} != columns or "weight" in own:
                raise ValueError(
                    f"data: client {name!r} must have the same columns as the others, and none "
                    f'called "weight"; got { {k: (v.shape[1:], v.dtype) for k, v in own.items()} }'
                )
            sizes.append(lengths.pop())
        first = clients[next(iter(clients))]
        joined = {k: np.concatenate([own[k] for own in clients.values()]) for k in first}
        self._hold(list(clients), np.array(sizes), joined)

    @classmethod
    def joined(
        cls, names: Sequence[Any], sizes: Sequence[int], columns: Mapping[str, np.ndarray]
    ) -> "Clients":
        """Clients whose examples lie one client after the other; nothing is copied.

        Args:
          names: of the clients, different.
          sizes: examples of each, >= 1.
          columns: name -> array [sum(sizes), ...].

        Raises:
          ValueError: names, sizes and columns do not match, or names are missing or the same.

        Example:
          >>> Clients.joined(["a", "b"], [2, 1], {"x": np.arange(3)})["b"]["x"]
          array([2])
        """
        lengths = {len(v) for v in columns.values()} | {int(np.sum(sizes))}
        if len(names) != len(sizes) or not len(names) or min(sizes) < 1 or len(lengths) != 1:
            raise ValueError(
                f"sizes: expected one >= 1 a client that add up to the columns' length; got "
                f"{len(names)} names, {len(sizes)} sizes and lengths {sorted(lengths)}"
            )
        clients = cls.__new__(cls)
        clients._hold(checks.clients("names", names), np.asarray(sizes), dict(columns))
        return clients

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        partition: str | Mapping[Any, Any] | Sequence[Any],
        columns: Sequence[str] | None = None,
    ) -> "Clients":
        """Clients from a ``datasets.Dataset``, or from any rows in memory.

        Args:
          dataset: a ``datasets.Dataset``; a mapping from names to columns; or a sequence of rows,
            each a mapping from names or a tuple, whose columns are then called x and y (more of
            them: 0, 1, 2, ...), as torchvision's data sets are.
          partition: name of a column, each value of which is a client (1, 1.0 and "1" are one); or
            the numbers of each client's rows: a mapping from clients, or a list for clients 0, 1,
            ..., as `hiso_jax.tasks.splits.iid`, ``dirichlet`` and ``by_size`` give. Rows in no
            client are left out.
          columns: names of those that are kept, by default all but that of the partition.

        Raises:
          ValueError: a column is not there, has rows of several shapes, or is no array of numbers
            (tokenize a text first); a row is missing, of two clients, or of a client without name.

        Example:
          >>> rows = {"x": [[0, 1], [2, 3], [4, 5]], "y": [0, 1, 1], "ward": ["a", "b", "a"]}
          >>> clients = Clients.from_dataset(rows, partition="ward")
          >>> clients.sizes, clients["a"]["x"].tolist()
          ({'a': 2, 'b': 1}, [[0, 1], [4, 5]])
        """
        table, count = _columns_of(dataset)
        given = isinstance(partition, str)
        if given and partition not in table:
            raise ValueError(f"partition: expected one of the columns {list(table)}, got "
                             f"{partition!r}")  # fmt: skip
        owners = (
            checks.groups("partition", table[partition]) if given else _numbers(partition, count)
        )
        kept = [name for name in table if not (given and name == partition)]
        if columns is not None:
            if lost := [name for name in columns if name not in table]:
                raise ValueError(f"columns: {lost} are not there; the dataset has {list(table)}")
            kept = list(columns)
        if not kept or "weight" in kept:  # which batches are given
            raise ValueError(f'columns: expected one at least and none called "weight", got {kept}')
        order = np.concatenate(list(owners.values()))
        arrays = {name: _as_array(name, table[name])[order] for name in kept}
        return cls.joined(list(owners), [len(own) for own in owners.values()], arrays)

    def _hold(self, names: list[str], sizes: np.ndarray, columns: Arrays) -> None:
        self.names, self._columns, self._sizes = names, columns, sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._index = {name: i for i, name in enumerate(names)}
        self._shares = sizes / sizes.sum()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def columns(self) -> Arrays:
        """The examples of all clients, end to end in the order of `names`."""
        return dict(self._columns)

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each client."""
        return dict(zip(self.names, self._sizes.tolist(), strict=True))

    def __getitem__(self, name: Any) -> Arrays:
        """A client's own columns."""
        i = self._index[str(name)]
        own = slice(self._starts[i], self._starts[i] + self._sizes[i])
        return {k: v[own] for k, v in self._columns.items()}

    def sample(self, count: int, round: int, seed: int = 0, sampling: str = "uniform") -> list[str]:
        """Draw the names of `count` different clients for a round.

        Args:
          count: C.
          round: number of the round.
          seed: of the run.
          sampling: ``"uniform"``, or ``"size"``: with probability in proportion to a
            client's examples, so that the plain mean over clients stands for the mean over
            examples (as in FedProx, arXiv 1812.06127); or ``"balanced"``: in turns.
        """
        checks.choice("sampling", sampling, ("uniform", "size", "balanced"))
        shares = self._shares if sampling == "size" else None
        return draw(self.names, count, round, seed, shares, sampling == "balanced")

    def batches(
        self,
        names: Sequence[Any],
        round: int,
        batch_size: int,
        local_steps: int = 1,
        seed: int = 0,
        first: int = 0,
    ) -> Arrays:
        """Draw the batches of a round, leaves [C, K, B, ...].

        A client draws without repetition within a local step; one with fewer examples than
        `batch_size` gives all it has, and the rest of its batch has ``weight`` 0.

        Args:
          names: whose batches; C of them.
          round: number of the round.
          batch_size: B.
          local_steps: K.
          seed: of the run.
          first: where these are some of a run's clients, the number there of the first of them:
            a client that is alone on its machine draws what it would draw in a simulation.
        """
        shape = (len(names), local_steps, batch_size)
        picks, weight = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for c, name in enumerate(names):
            i = self._index[str(name)]
            size, kept = int(self._sizes[i]), min(int(self._sizes[i]), batch_size)
            rng = np.random.default_rng([seed, round, 1, first + i])
            for k in range(local_steps):
                picks[c, k, :kept] = rng.permutation(size)[:kept]
            picks[c] += self._starts[i]
            weight[c, :, :kept] = 1
        return {k: v[picks] for k, v in self._columns.items()} | {"weight": weight}


def _columns_of(dataset: Any) -> tuple[dict[str, Any], int]:
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
        table = _columns_of_rows(dataset)
    counts = {name: len(column) for name, column in table.items()}
    if len({*counts.values()}) != 1 or not all(counts.values()):
        raise ValueError(f"dataset: expected columns of one length >= 1, got {counts}")
    return table, next(iter(counts.values()))


def _columns_of_rows(dataset: Any) -> dict[str, Any]:
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


def _as_array(name: str, column: Any) -> np.ndarray:
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


def _numbers(partition: Any, count: int) -> dict[Any, np.ndarray]:
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
