"""The ledger: everything a run has learned, as a header and one record a round.

One SQLite file, so that a record is there as a whole or not at all, whatever is killed and
whenever, and so that people's own tools can read it. A chain of SHA-256 sums runs through
header and records: a byte of them that has changed is found when the file is opened, and so
is a record that has gone.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from hiso_jax._engine import checks, files
from hiso_jax.ledger import compact, digests, tables
from hiso_jax.ledger import header as headers
from hiso_jax.ledger.tables import CorruptLedger, LedgerError, LedgerMismatch, LedgerWriteError
from hiso_jax.protocol import Algorithm, Rate, State

__all__ = [
    "CorruptLedger",
    "Ledger",
    "LedgerError",
    "LedgerMismatch",
    "LedgerWriteError",
    "Records",
]


class Records(NamedTuple):
    """A stretch of a ledger: what an absent client needs, and what is kept about it."""

    first: int  # number of the first round
    scalars: np.ndarray  # float32 [R, K, P]; NaN in the rounds that nobody answered
    learning_rates: np.ndarray | None  # float32 [R] if they follow a schedule
    digests: list[str | None]  # [R] of the state after each; None where it was not kept
    reported: list[dict[str, float]]  # [R] weights of those who reported, by name

    @property
    def nbytes(self) -> int:
        """Bytes that a client is sent: scalars, and learning rates if they follow a schedule."""
        rates = 0 if self.learning_rates is None else self.learning_rates.nbytes
        return self.scalars.nbytes + rates


def _bytes(record: np.ndarray) -> bytes:
    """A record as its row has it: nothing where nobody answered."""
    return b"" if np.isnan(record).all() else record.astype("<f4").tobytes()


class Ledger:
    """Header and records of one run, on disk. One process writes; any number read.

    Attributes:
      path: of the file.
      header: what the run was made of, as plain data (see `describe`).
      rounds: number of records.
      shape: (K, P) of a record.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp, tempfile
      >>> alg = hj.decomfl(lambda params, batch: ((params["w"] - batch) ** 2).mean(), 0.1)
      >>> state = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> path = tempfile.mkdtemp() + "/ledger.sqlite"
      >>> with hj.Ledger.create(path, alg, state) as ledger:
      ...     record = alg.aggregate(alg.probe(state, jnp.ones((4, 1, 3))))
      ...     state = alg.advance(state, record)
      ...     _ = ledger.append(record, hj.digest(state), reported={"ann": 1.0, "bob": 1.0})
      >>> base = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> with hj.Ledger.open(path, alg, base) as ledger:  # in another process, say
      ...     records = ledger.records()
      >>> again = alg.replay(base, records.scalars, records.learning_rates)
      >>> digests.text(hj.digest(again)) == records.digests[-1], records.nbytes
      (True, 20)
    """

    def __init__(self, path: str, connection: sqlite3.Connection):
        self.path, self._connection = path, connection
        self.header, self.rounds, self._chain = tables.verify(path, connection)
        self.shape = headers.shape(self.header)
        self._constant = Rate.from_config(self.header["algorithm"]["learning_rate"]).value

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        algorithm: Algorithm,
        state: State,
        about: Mapping[str, Any] | None = None,
        privacy: Mapping[str, Any] | None = None,
    ) -> Self:
        """Begin the ledger of a run.

        Args:
          path: of a file that is not there yet.
          algorithm: whose records will be kept.
          state: fresh from ``algorithm.init``.
          about: anything else worth keeping in the header, as plain data. What it says under
            ``"train"`` also goes into the compact file of `export`.
          privacy: what the sums are made of, as plain data: the ``config`` of
            `hiso_jax.privacy.Terms`.

        Raises:
          FileExistsError: a ledger is never written over, nor put beside the log of another.
          ValueError: `state` has advanced, or the rule has no config.
          LedgerWriteError: the file cannot be written.
        """
        tables.check_free(path, "path")
        return cls._make(path, headers.describe(algorithm, state, about, privacy))

    @classmethod
    def _make(
        cls,
        path: str | os.PathLike[str],
        header: dict[str, Any],
        rows: Iterable[tuple[Any, ...]] = (),
    ) -> Self:
        text = headers.canonical(header)
        if str(path) == ":memory:":
            return cls(":memory:", tables.create(":memory:", text, rows))
        try:
            with files.atomic_write(path) as part:
                tables.create(str(part), text, rows).close()
        except (sqlite3.Error, OSError) as error:
            raise LedgerWriteError(f"{path}: the ledger cannot be written: {error}") from error
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        algorithm: Algorithm | None = None,
        state: State | None = None,
        *,
        read_only: bool = False,
    ) -> Self:
        """Open a ledger; all of it is verified first.

        Args:
          path: of a file that `create` or `import_` wrote.
          algorithm: if given, must be the one that the ledger belongs to.
          state: if given, must be one of the run: fresh, or after any of its rounds.
          read_only: do not ask for the right to append.

        Raises:
          FileNotFoundError, IsADirectoryError: no such file.
          CorruptLedger: it is not a ledger, or truncated, or edited.
          LedgerError: it cannot be read now, since another process writes, say.
          LedgerMismatch: it belongs to another algorithm or base model; says which field or leaf.
          LedgerWriteError: it cannot be written to, and `read_only` is not set.
        """
        tables.check_path(path, "ledger")
        ledger = cls(str(path), tables.connect(Path(path), read_only))
        try:
            ledger.match(algorithm, state)
            if not read_only:
                tables.make_one_file(ledger.path, ledger._connection)
                with ledger._writing("anything"):
                    pass
        except BaseException:
            ledger.close()
            raise
        return ledger

    def append(
        self,
        record: Any,
        digest: Any,
        learning_rate: Any = None,
        reported: Mapping[str, float] | None = None,
        event: Mapping[str, Any] | None = None,
    ) -> int:
        """Commit one round; once this returns, it survives anything.

        Args:
          record: [K, P] as `advance` took it; NaN for a round that nobody answered.
          digest: of the state after it, from `hiso_jax.digest`.
          learning_rate: what it was applied with; needed if the rate follows a schedule.
          reported: weights of those who reported, by name.
          event: what the round has released, as plain data, for `hiso_jax.privacy.Accountant`.

        Returns:
          The number of the round.

        Raises:
          ValueError: wrong shape, values or learning rate.
          LedgerWriteError: disk full, read-only, or another process writes; nothing was written.
        """
        record = np.asarray(record, np.float32)
        if record.shape != self.shape:
            raise ValueError(f"record: expected shape {self.shape} (local steps, perturbations), "
                             f"got {record.shape}")  # fmt: skip
        if not np.isnan(record).all() and not np.isfinite(record).all():
            raise ValueError(f"record: expected finite scalars, got {record.tolist()}")
        constant = self._constant
        if learning_rate is None:
            if constant is None:
                raise ValueError("learning_rate: needed, since it follows a schedule; got None")
            learning_rate = constant
        rate = float(np.float32(checks.number("learning_rate", learning_rate, 0)))
        if constant is not None and rate != float(np.float32(constant)):
            raise ValueError(f"learning_rate: the ledger's is {constant}, got {learning_rate!r}")
        text = digest if isinstance(digest, str) else digests.text(digest)
        digests.parse(text)
        reported = {} if reported is None else reported
        names = checks.clients("reported", reported) if reported else []
        weights = [float(checks.number("reported", w, 0)) for w in reported.values()]
        said = json.dumps(dict(zip(names, weights, strict=True)))
        row = (_bytes(record), rate, text, said)
        told = None if event is None else headers.canonical(event)
        chain = tables.link(self._chain, self.rounds, *row, told)
        with self._writing(f"round {self.rounds}") as connection:
            tables.insert(connection, self.rounds, row, chain)
            connection.execute("UPDATE head SET rounds = ?, chain = ?", (self.rounds + 1, chain))
            tables.clear_places(connection)
            if told is not None:
                tables.put_event(connection, self.rounds, told)
        self.rounds, self._chain = self.rounds + 1, chain
        return self.rounds - 1

    def open_round(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Note in which place clients are asked for the next round, until that is recorded.

        For clients with directions of their own: their scalars are those of a place, and nothing
        else would tell a server that was started again in what place it had asked.

        Args:
          names: of the clients, in the order of their places.

        Returns:
          Name -> all the places that this client has been asked in for this round.

        Raises:
          LedgerWriteError: they cannot be written.
        """
        with self._writing(f"the opening of round {self.rounds}") as connection:
            known = tables.places(connection, self.rounds, self._chain)
            for place, name in enumerate(checks.clients("names", names)):
                known[name] = sorted({*known.get(name, ()), place})
            tables.put_places(connection, self.rounds, self._chain, known)
        return known

    def opened(self) -> list[str]:
        """Names that `open_round` has noted for the round that is not recorded yet."""
        try:
            return list(tables.places(self._connection, self.rounds, self._chain))
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: it cannot be read now: {error}") from error

    @contextmanager
    def _writing(self, what: str) -> Iterator[sqlite3.Connection]:
        """One transaction, begun only if nobody has written since this ledger was read."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            if self._connection.execute("SELECT rounds, chain FROM head").fetchall() != [
                (self.rounds, self._chain)
            ]:
                raise LedgerWriteError(
                    f"{self.path}: {what} is not recorded: another process has written to this "
                    "ledger since it was opened; open it again"
                )
            yield self._connection
            self._connection.execute("COMMIT")
            if self.path != ":memory:":
                # Or a power cut brings back the journal. SQLite can do the same (EXTRA), but takes
                # it for a failed commit where a file system does not sync folders.
                files.settle(self.path)
        except sqlite3.Error as error:
            raise LedgerWriteError(
                f"{self.path}: {what} is not recorded, the ledger is as it was: {error}"
            ) from error
        finally:
            with suppress(sqlite3.Error):  # the file is rolled back when it is next opened
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def digest(self, round: int) -> str | None:
        """Digest of the state after a round; None where it was not kept.

        Raises:
          ValueError: there is no such round.
        """
        if not 0 <= round < self.rounds:
            raise ValueError(f"round: expected 0 to {self.rounds - 1}, got {round}")
        sql = "SELECT digest FROM records WHERE round = ?"
        try:
            return self._connection.execute(sql, (round,)).fetchone()[0]
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: it cannot be read now: {error}") from error

    def records(self, since: int = 0) -> Records:
        """What happened from round `since` on, which is what an absent client catches up with."""
        if not 0 <= since <= self.rounds:
            raise ValueError(f"since: expected 0 to {self.rounds} rounds, got {since}")
        try:
            rows = self._connection.execute(
                "SELECT scalars, learning_rate, digest, reported FROM records "
                "WHERE round >= ? AND round < ? ORDER BY round",
                (since, self.rounds),
            ).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: it cannot be read now: {error}") from error
        scalars = np.full((len(rows), *self.shape), np.nan, np.float32)
        for i, row in enumerate(rows):
            if row[0]:
                scalars[i] = np.frombuffer(row[0], "<f4").reshape(self.shape)
        rates = np.array([row[1] for row in rows], np.float32)
        return Records(
            first=since,
            scalars=scalars,
            learning_rates=rates if self._constant is None else None,
            digests=[r[2] for r in rows],
            reported=[json.loads(r[3]) for r in rows],
        )

    def events(self) -> list[dict[str, Any] | None]:
        """What each round has released [R]; None where nothing is written down.

        A compact file has no events: the epsilon of a run is read from its ledger.
        """
        try:
            found = tables.events(self._connection)
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: it cannot be read now: {error}") from error
        return [json.loads(found[n]) if n in found else None for n in range(self.rounds)]

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write header, scalars and last digest to one compact file; return its bytes.

        It takes the bytes of the scalars (and learning rates) and less than 4 KiB more; who
        reported, the digests between, and all of ``about`` but what it says under ``"train"``
        (a few words of what was trained, without which no model can be made of it) stay behind.
        `hiso_jax.ledger.compact` is its format.

        Args:
          path: of a ``.safetensors`` file, replaced if it is there.
        """
        records = self.records()
        header = dict(self.header)
        header["leaves"] = [entry[:4] for entry in header["leaves"]]
        if kept := {k: v for k, v in header.pop("about").items() if k == "train"}:
            header["about"] = kept
        last = records.digests[-1] if self.rounds else None
        return compact.write(path, header, records.scalars, records.learning_rates, last)

    @classmethod
    def import_(cls, path: str | os.PathLike[str], to: str | os.PathLike[str] = ":memory:") -> Self:
        """Make a ledger again of what `export` wrote, whole or not at all.

        Args:
          path: of the compact file.
          to: of the ledger to write, which must not be there; in memory by default.

        Raises:
          FileExistsError: as of `create`.
          CorruptLedger: the file is not as it was written, or its header is none.
          LedgerWriteError: the ledger cannot be written.
        """
        tables.check_free(to, "to")
        tables.check_path(path, "file")
        try:
            header, scalars, rates, last = compact.read(path)
        except compact.BadFile as error:
            raise CorruptLedger(f"{path}: {error}{tables.hint(path, compact=True)}") from error
        if rates is None:
            constant = Rate.from_config(header["algorithm"]["learning_rate"]).value
            rates = np.full(len(scalars), constant, np.float32)
        known = [None] * (len(scalars) - 1) + [last]
        rows = ((_bytes(record), float(rate), digest, "{}")
                for record, rate, digest in zip(scalars, rates, known, strict=False))  # fmt: skip
        return cls._make(to, {"about": {}} | header, rows)

    def close(self) -> None:
        """Close the file; the ledger cannot be used afterwards."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def match(self, algorithm: Algorithm | None, state: State | None) -> None:
        """Raise LedgerMismatch unless the ledger is of this algorithm and state."""
        try:
            if algorithm is not None:
                headers.match_algorithm(self.header, algorithm)
            if state is not None:
                done = int(state.round)
                known = self.records(done - 1).digests[0] if 0 < done <= self.rounds else None
                headers.match_state(self.header, state, algorithm, self.rounds, known)
        except headers.Mismatch as error:
            raise LedgerMismatch(f"{self.path}: {error}") from None
