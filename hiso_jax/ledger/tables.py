"""The file of a ledger: its tables in SQLite, the chain through them, how it is opened.

A round is committed with a rollback journal, which lies beside the file only while it is being
written: between two rounds the one file has all of them, and a copy of it, taken at any moment,
is whole or is refused. (A write-ahead log, which earlier versions used, keeps the last rounds
in a second file. Theirs are read with it, and made one file when they are opened for writing.)
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.ledger import digests
from hiso_jax.ledger import header as headers

FORMAT = 1
PATIENCE = 60.0
"""Seconds to wait for another process that is reading or committing."""
_APPLICATION = 0x4869536F  # "HiSo", in the file's own header
_TABLES = """
CREATE TABLE header (json TEXT NOT NULL, sha256 BLOB NOT NULL);
CREATE TABLE records (
  round INTEGER PRIMARY KEY, scalars BLOB NOT NULL, learning_rate REAL NOT NULL,
  digest TEXT, reported TEXT NOT NULL, chain BLOB NOT NULL);
CREATE TABLE head (rounds INTEGER NOT NULL, chain BLOB NOT NULL);
"""
# Only where a server has opened rounds whose clients have places; no link of the chain.
_PLACES = (
    "CREATE TABLE open_round (round INTEGER NOT NULL, places TEXT NOT NULL, sha256 BLOB NOT NULL)"
)
# Only where rounds have been given events, of what they released; these are in the chain.
_EVENTS = "CREATE TABLE events (round INTEGER PRIMARY KEY, json TEXT NOT NULL)"
_LOGS = ("-journal", "-wal")
# What SQLite says when it is not the file's contents that are at fault.
_NOT_CORRUPT = ("BUSY", "LOCKED", "READONLY", "FULL", "CANTOPEN", "NOMEM", "PERM")


class LedgerError(Exception):
    """Something is wrong with a ledger; what and where is in the message."""


class CorruptLedger(LedgerError, ValueError):
    """The file is not a ledger, or not as it was written."""


class LedgerMismatch(LedgerError, ValueError):
    """The ledger belongs to another base model, algorithm or state."""


class LedgerWriteError(LedgerError, OSError):
    """A record could not be written; the ledger is as it was before."""


def check_path(path: str | os.PathLike[str], what: str) -> None:
    """Raise FileNotFoundError or IsADirectoryError unless there is a file."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"path: {path} is a folder, expected the file of a ledger")
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: {path}: no such {what}")


def check_free(path: str | os.PathLike[str], argument: str) -> None:
    """Raise FileExistsError unless a ledger can be begun there."""
    if str(path) == ":memory:":
        return
    if Path(path).exists():
        raise FileExistsError(f"{argument}: {path} exists; a ledger is never written over")
    for log in (Path(f"{path}{end}") for end in _LOGS):
        if log.exists():  # SQLite would take it for this ledger's, and write what is in it
            raise FileExistsError(
                f"{argument}: {log} is there, of a ledger that {path} was; a killed process left "
                "it, and it may hold rounds: move it to where that ledger is, or away"
            )


def create(name: str, text: str, rows: Iterable[tuple[Any, ...]] = ()) -> sqlite3.Connection:
    """Write a ledger, in one transaction.

    Args:
      name: as of ``sqlite3.connect``.
      text: the header.
      rows: scalars, learning rate, digest and who reported, of each record.
    """
    connection = _connection(name)
    try:
        # Nobody knows of the file yet: a journal on disk would guard nothing.
        connection.executescript(
            f"PRAGMA application_id={_APPLICATION}; PRAGMA user_version={FORMAT};"
            f"PRAGMA journal_mode=MEMORY; BEGIN;{_TABLES}"
        )
        connection.execute("INSERT INTO header VALUES (?, ?)", (text, start(text)))
        chain, count = start(text), 0
        for row in rows:
            chain = link(chain, count, *row)
            insert(connection, count, row, chain)
            count += 1
        connection.execute("INSERT INTO head VALUES (?, ?)", (count, chain))
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def insert(connection: sqlite3.Connection, number: int, row: tuple[Any, ...], chain: bytes) -> None:
    """Put a record beside the others, in the transaction that is open."""
    connection.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", (number, *row, chain))


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """Open the file, whose contents are still to be verified.

    Raises:
      LedgerWriteError: it cannot be written to, and `read_only` is not set.
      LedgerError: it cannot be read without finishing what was being written.
    """
    path = path.resolve()  # SQLite writes beside what a link points to
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return _open(path, "mode=rw")  # also to read: what a killed process left is put right
    if not read_only:
        raise LedgerWriteError(f"{path}: file or folder cannot be written to")
    try:
        return _open(path, "mode=ro")
    except LedgerError as error:
        logs = [p for end in _LOGS if (p := Path(f"{path}{end}")).exists()]
        if left := [p.name for p in logs if p.stat().st_size]:
            raise LedgerError(
                f"{path}: a round was being written when its process ended, and here nothing can "
                f"be put right: copy it with {' and '.join(left)} to where you may write ({error})"
            ) from error
    # SQLite would make a file beside it, or lock it, unless it is told that nobody writes.
    return _open(path, "immutable=1")


def _open(path: Path, mode: str) -> sqlite3.Connection:
    try:
        return _connection(f"{path.as_uri()}?{mode}", uri=True)
    except (sqlite3.Error, ValueError) as error:  # ValueError: text that is not UTF-8
        raise _refused(str(path), "not a readable ledger", error) from error


def _refused(path: str, where: str, error: Exception) -> LedgerError:
    """What to raise when a file cannot be read, or is not what it should be."""
    reason = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_")
    if reason.startswith(_NOT_CORRUPT):
        return LedgerError(f"{path}: it cannot be read now: {error}")
    return CorruptLedger(f"{path}: {where}: {error}{hint(path)}")


def _connection(name: str, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(
        name, timeout=PATIENCE, isolation_level=None, check_same_thread=False, uri=uri
    )
    try:
        connection.execute("PRAGMA synchronous=FULL")  # which reads the file
    except BaseException:
        connection.close()
        raise
    return connection


def make_one_file(path: str, connection: sqlite3.Connection) -> None:
    """Put the rounds in the log of an earlier version into the file, and do without one.

    Raises:
      LedgerWriteError: another process reads that ledger, or nothing can be written.
    """
    try:
        ((mode,),) = connection.execute("PRAGMA journal_mode=DELETE").fetchall()
    except sqlite3.Error as error:
        if not error.sqlite_errorname.startswith("SQLITE_BUSY"):
            raise LedgerWriteError(f"{path}: it cannot be written to: {error}") from error
        mode = "wal"
    if mode not in ("delete", "memory"):
        raise LedgerWriteError(
            f"{path}: an earlier version left it in two files, which cannot become one while "
            "another process has it open; close it there"
        )


def verify(path: str, connection: sqlite3.Connection) -> tuple[dict[str, Any], int, bytes]:
    """Read everything once; return header, number of records and end of the chain.

    Raises:
      CorruptLedger: at the first thing that is not as it was written.
      LedgerError: the file cannot be read now.
    """
    where, get = "the header", lambda sql: connection.execute(sql).fetchall()
    try:
        # One transaction: a process that appends meanwhile is not mistaken for an editor.
        connection.execute("BEGIN")
        found = (get("PRAGMA application_id"), get("PRAGMA user_version"))
        if found != ([(_APPLICATION,)], [(FORMAT,)]):
            raise ValueError(f"expected a ledger of format {FORMAT}")
        if (faults := get("PRAGMA quick_check(1)")) != [("ok",)]:
            raise ValueError(f"SQLite finds {faults[0][0]!r}")
        tables = {sql for (sql,) in get("SELECT sql FROM sqlite_schema")}
        if tables - {_PLACES, _EVENTS} != {sql.strip() for sql in _TABLES.split(";")[:-1]}:
            raise ValueError("the tables are not those of a ledger")
        ((text, total),) = get("SELECT * FROM header")
        if total != start(text):
            raise ValueError("it is not as it was written")
        header = json.loads(text)
        headers.check(header)
        chain, count = start(text), 0
        size = 4 * int(np.prod(headers.shape(header)))
        released = events(connection)
        for row in get("SELECT * FROM records ORDER BY round"):
            where = f"the record of round {count}"
            number, scalars, rate, digest, reported, own = row
            if number != count:
                raise ValueError(f"it is missing, the next is that of round {number}")
            chain = link(chain, number, scalars, rate, digest, reported, released.pop(count, None))
            if own != chain or len(scalars) not in (0, size):
                raise ValueError("it is not as it was written")
            if digest is not None:
                digests.parse(digest)
            count += 1
        where = "the end"
        if released:
            raise ValueError(f"there are events of rounds {sorted(released)}, which are not there")
        ((rounds, head),) = get("SELECT * FROM head")
        if (rounds, head) != (count, chain):
            raise ValueError(f"{rounds!r} records were written, {count} are left")
        where = "the round that is open"
        places(connection, count, chain)
        connection.execute("ROLLBACK")
    except (sqlite3.Error, ValueError, TypeError, LookupError, AttributeError) as error:
        connection.close()
        raise _refused(path, where, error) from error
    return header, count, chain


def hint(path: str | os.PathLike[str], compact: bool = False) -> str:
    """What a file is that was refused as a ledger, or a compact one, where that is easily said."""
    # Only of a file that was refused: closing a file ends the locks that SQLite has on it.
    try:
        with open(path, "rb") as file:
            begin = file.read(64)
    except OSError:
        return ""
    if not begin:
        return " (the file is empty)"
    if begin.startswith(b"version https://git-lfs"):
        return " (it is Git LFS's pointer to the file, which `git lfs pull` fetches)"
    if compact and begin.startswith(b"SQLite format 3\0"):
        return " (it is an SQLite file; a ledger in one is opened with Ledger.open)"
    if not compact and begin[8:9] == b"{":
        return " (it is a safetensors file; a compact ledger is opened with Ledger.import_)"
    return ""


def start(text: str) -> bytes:
    """The chain's first link: the sum of the header."""
    return hashlib.sha256(text.encode()).digest()


def link(
    chain: bytes,
    number: int,
    scalars: bytes,
    rate: float,
    digest: str | None,
    reported: str,
    event: str | None = None,
) -> bytes:
    """The chain's next link: the sum of the last and of all that a record says."""
    said = [number, rate, digest, reported]
    row = json.dumps(said if event is None else [*said, event]).encode()
    return hashlib.sha256(chain + row + scalars).digest()


def events(connection: sqlite3.Connection) -> dict[int, str]:
    """What rounds have released, as JSON, by their numbers."""
    if not _has(connection, "events"):
        return {}
    return dict(connection.execute("SELECT round, json FROM events").fetchall())


def put_event(connection: sqlite3.Connection, round: int, event: str) -> None:
    """Keep what a round has released, in the transaction that records it."""
    if not _has(connection, "events"):
        connection.execute(_EVENTS)
    connection.execute("INSERT INTO events VALUES (?, ?)", (round, event))


def places(connection: sqlite3.Connection, round: int, chain: bytes) -> dict[str, list[int]]:
    """The places that clients have been asked in, in the round that is not recorded yet.

    Raises:
      ValueError: they are not as they were written, or of another round.
    """
    if not _has(connection, "open_round"):
        return {}
    rows = connection.execute("SELECT * FROM open_round").fetchall()
    if not rows:
        return {}
    ((number, text, total),) = rows
    if number != round or total != _sealed(chain, text):
        raise ValueError("the clients' places are not as they were written")
    return json.loads(text)


def put_places(
    connection: sqlite3.Connection, round: int, chain: bytes, places: dict[str, list[int]]
) -> None:
    """Keep the places of the round that is not recorded yet, in the transaction that is open."""
    if not _has(connection, "open_round"):
        connection.execute(_PLACES)
    clear_places(connection)
    text = json.dumps(places)
    row = (round, text, _sealed(chain, text))
    connection.execute("INSERT INTO open_round VALUES (?, ?, ?)", row)


def clear_places(connection: sqlite3.Connection) -> None:
    """Forget them: the round is recorded."""
    if _has(connection, "open_round"):
        connection.execute("DELETE FROM open_round")


def _has(connection: sqlite3.Connection, table: str) -> bool:
    sql = "SELECT 1 FROM sqlite_schema WHERE name = ?"
    return bool(connection.execute(sql, (table,)).fetchall())


def _sealed(chain: bytes, text: str) -> bytes:
    return hashlib.sha256(chain + text.encode()).digest()
