"""Who takes part: clients by name, their examples, and what is drawn of both in a round.

Everything random here is a function of (seed, round), so a run can be stopped after any
round and resumed, and two methods can be given the very same clients and batches.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hiso_jax._engine import checks, files
from hiso_jax.federation.selecting import IMPORTANCE, Select, Subset
from hiso_jax.federation.tables import as_array, columns_of, numbers_of

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
      balanced: in turns of ``clients // count`` rounds, each in an order of its own: nobody is
        drawn twice in a turn, so that nobody takes part in more than
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
      select: how a client chooses the examples that its batches are drawn from, and when it does
        so anew; by default they are drawn from all.

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

    select: Select | None
    chosen: "Chosen | None"

    def __init__(self, data: Mapping[Any, Mapping[str, np.ndarray]], select: Select | None = None):
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
        self.select = select

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
        table, count = columns_of(dataset)
        given = isinstance(partition, str)
        if given and partition not in table:
            raise ValueError(f"partition: expected one of the columns {list(table)}, got "
                             f"{partition!r}")  # fmt: skip
        owners = (
            checks.groups("partition", table[partition]) if given else numbers_of(partition, count)
        )
        kept = [name for name in table if not (given and name == partition)]
        if columns is not None:
            if lost := [name for name in columns if name not in table]:
                raise ValueError(f"columns: {lost} are not there; the dataset has {list(table)}")
            kept = list(columns)
        if not kept or "weight" in kept:  # which batches are given
            raise ValueError(f'columns: expected one at least and none called "weight", got {kept}')
        order = np.concatenate(list(owners.values()))
        arrays = {name: as_array(name, table[name])[order] for name in kept}
        return cls.joined(list(owners), [len(own) for own in owners.values()], arrays)

    def _hold(self, names: list[str], sizes: np.ndarray, columns: Arrays) -> None:
        self.names, self._columns, self._sizes = names, columns, sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._index = {name: i for i, name in enumerate(names)}
        self._shares = sizes / sizes.sum()
        self.select = self.chosen = None

    def selecting(self, select: Select | None) -> "Clients":
        """The same clients with another way to choose, or none; nothing is copied."""
        clients = Clients.__new__(Clients)
        clients._hold(self.names, self._sizes, self._columns)
        clients.select = select
        return clients

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

    def asked(
        self, rounds: range, count: int, seed: int = 0, sampling: str = "uniform"
    ) -> list[str]:
        """Who is drawn by `sample` in any of some rounds, each once."""
        every = (self.sample(count, round, seed, sampling) for round in rounds)
        return list(dict.fromkeys(name for names in every for name in names))

    def due(self, round: int) -> bool:
        """Whether clients choose anew before this round."""
        return self.select is not None and round % self.select.renew == 0

    def choose(
        self, params: Any, names: Sequence[Any], round: int, seed: int = 0, first: int = 0
    ) -> None:
        """Let clients look at their examples with the model as it is, and choose.

        Args:
          params: the model's, before this round.
          names: who chooses.
          round: a multiple of R.
          seed, first: as of `batches`.

        Raises:
          ValueError: there is no `select`, it is not the round for it, or the model does not give
            what the method needs.
          FloatingPointError: the model makes NaN of examples.
        """
        if (select := self.select) is None or not self.due(round):
            raise ValueError(f"round: expected one in which clients choose anew, got {round}")
        if IMPORTANCE in self._columns and select.method == IMPORTANCE:
            raise ValueError(
                f"data: expected no column called {IMPORTANCE!r}, which is the weights'"
            )
        numbers = [self._index[str(name)] for name in names]
        spans = [slice(s, s + n) for s, n in zip(self._starts, self._sizes, strict=True)]
        own = [{k: v[spans[i]] for k, v in self._columns.items()} for i in numbers]
        together = {k: np.concatenate([columns[k] for columns in own]) for k in own[0]}
        seen, subsets, start = select.look(params, together, (seed, round, 4)), {}, 0
        for i, columns in zip(numbers, own, strict=True):
            part = {k: v[start : start + self._sizes[i]] for k, v in seen.items()}
            subsets[self.names[i]] = select.choose(columns, part, (seed, round, 3, first + i))
            start += self._sizes[i]
        self.chosen = Chosen(round, subsets)

    def look_passes(self, rounds: int, count: int, seed: int = 0, sampling: str = "uniform") -> int:
        """Forward passes of single examples that the choices of a run take, of all clients."""
        if self.select is None or not self.select.passes:
            return 0
        renew, sizes = self.select.renew, self.sizes
        periods = (range(r, min(r + renew, rounds)) for r in range(0, rounds, renew))
        asked = (name for period in periods for name in self.asked(period, count, seed, sampling))
        return self.select.passes * sum(sizes[name] for name in asked)

    def _own(self, name: Any, round: int) -> Subset:
        """What of a client's examples its batches are drawn from in a round."""
        i = self._index[str(name)]
        if self.select is None:
            return Subset(np.arange(self._sizes[i]))
        wanted = round - round % self.select.renew
        if self.chosen is None or self.chosen.round != wanted:
            held = "nothing" if self.chosen is None else f"that of round {self.chosen.round}"
            raise ValueError(f"round: batches of round {round} are drawn from what clients chose "
                             f"before round {wanted}, see `choose`; they hold {held}")  # fmt: skip
        if (found := self.chosen.subsets.get(self.names[i])) is None:
            raise ValueError(f"names: {self.names[i]!r} has chosen nothing in round {wanted}")
        return found

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
        `batch_size` gives all it has, and the rest of its batch has ``weight`` 0. With `select`
        it has what it chose last; ``importance`` is then a column, if the method gives one.

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
        factor = np.ones(shape, np.float32)
        for c, name in enumerate(names):
            i, own = self._index[str(name)], self._own(name, round)
            size = len(own.picks)
            kept = min(size, batch_size)
            rng = np.random.default_rng([seed, round, 1, first + i])
            for k in range(local_steps):
                drawn = rng.permutation(size)[:kept]
                picks[c, k, :kept] = own.picks[drawn]
                if own.weights is not None:
                    factor[c, k, :kept] = own.weights[drawn]
            picks[c] += self._starts[i]
            weight[c, :, :kept] = 1
        out = {k: v[picks] for k, v in self._columns.items()} | {"weight": weight}
        weighted = self.select is not None and self.select.method == IMPORTANCE
        return out | ({IMPORTANCE: factor} if weighted else {})


class Chosen(NamedTuple):
    """What clients have chosen, and before which round."""

    round: int
    subsets: dict[str, Subset]  # of those who did, by name

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, whole or not at all. It belongs to the clients: it tells of data."""
        subsets = list(self.subsets.values())
        sizes = np.array([len(subset.picks) for subset in subsets])
        joined = {"names": np.array(list(self.subsets)), "sizes": sizes,
                  "round": np.array(self.round),
                  "picks": np.concatenate([subset.picks for subset in subsets])}  # fmt: skip
        if weights := [x for subset in subsets if (x := subset.weights) is not None]:
            joined["weights"] = np.concatenate(weights)
        with files.atomic_write(path) as part, open(part, "wb") as file:
            np.savez(file, allow_pickle=False, **joined)

    @classmethod
    def load(cls, path: str | os.PathLike[str], clients: Clients) -> "Chosen | None":
        """What `save` wrote; None if it is not there, is damaged or is not of these clients."""
        try:
            with np.load(path) as found:
                names, sizes = found["names"].tolist(), found["sizes"]
                cuts = np.cumsum(sizes)[:-1]
                picks = np.split(found["picks"], cuts)
                weights = np.split(found["weights"], cuts) if "weights" in found else picks
                own = cls(int(found["round"]), {
                    name: Subset(p, w if "weights" in found else None)
                    for name, p, w in zip(names, picks, weights, strict=True)
                })  # fmt: skip
        except Exception:  # its readers have many words for one byte that has changed
            return None
        inside = (n in clients.sizes and 0 <= p.min() and p.max() < clients.sizes[n]
                  for n, p in ((n, s.picks) for n, s in own.subsets.items()))  # fmt: skip
        return own if all(inside) else None
