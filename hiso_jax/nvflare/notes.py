"""``rounds.jsonl``: a line per round, for people and programs that follow a run."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from hiso_jax.federation.host import Closed
from hiso_jax.train import rows

NO_NOTE = "no note: the process ended"
TRAFFIC = ("payload_up", "payload_down", "messages_up", "messages_down", "wire_sent",
           "wire_received")  # fmt: skip


class Notes:
    """The lines of a run, which go on where its last job ended.

    Args:
      path: of the file; its folder is made.
      rounds: that the ledger has. Those without a line, for the process was killed between record
        and line, get one that says so.
    """

    def __init__(self, path: Path, rounds: int):
        found = rows.read(path)
        known = {row.get("round") for row in found}
        self._path = path
        self._left = [{"round": n, "note": NO_NOTE} for n in range(rounds) if n not in known]
        last = next((row for row in reversed(found) if TRAFFIC[0] in row), {})
        self._before = [last.get(name, 0) for name in TRAFFIC]

    def add(self, row: rows.Row, traffic: Sequence[int]) -> None:
        """Take a round's line, and write it with those that are left from before.

        Args:
          row: see `row_of`.
          traffic: bytes of this job's process so far, in the order of `TRAFFIC`; those of the
            jobs before are added.

        Raises:
          OSError: there is no room; the lines are kept for the next time.
        """
        total = [sum(each) for each in zip(self._before, traffic, strict=True)]
        self._left.append(row | dict(zip(TRAFFIC, total, strict=True)))
        self.write()

    def write(self) -> None:
        """Write what is left.

        Raises:
          OSError: there is no room; the lines are kept for the next time.
        """
        with rows.append(self._path) as add:
            while self._left:
                add(self._left[0])
                del self._left[0]


def row_of(closed: Closed, asked: Iterable[str], needed: int, reason: str) -> rows.Row:
    """What became of a round: who answered, and why it is void if it is.

    Args:
      closed: the round.
      asked: names of who was asked.
      needed: so many must answer.
      reason: why a round in which so many did is void, if that is known.

    Example:
      >>> import numpy as np
      >>> void = Closed(4, np.full((1, 1), np.nan), {}, {"bob": "NaN"}, ["cem"], 2.0)
      >>> row = row_of(void, ["ann", "bob", "cem"], needed=3, reason="")
      >>> row["answered"], told(row)
      (['ann'], '1 answered, 3 needed; silent: cem; bob: NaN')
    """
    # Nobody is reported of a void round, also where all have answered.
    absent = closed.faults.keys() | set(closed.silent)
    answered = list(closed.reported) or [name for name in asked if name not in absent]
    row: rows.Row = {
        "round": closed.round,
        "seconds": round(closed.seconds, 4),
        "answered": answered,
        "faults": closed.faults,
        "silent": closed.silent,
    }
    if closed.reported:
        return row
    few = f"{len(answered)} answered, {needed} needed"
    return row | {"void": few if len(answered) < needed else reason or "no finite record"}


def told(row: rows.Row) -> str:
    """A row in words: how many count or why none does, who is silent, whose answer is wrong."""
    text = row.get("void", f"{len(row['answered'])} count")
    text += f"; silent: {', '.join(row['silent'])}" if row["silent"] else ""
    return text + "".join(f"; {name}: {why}" for name, why in row["faults"].items())
