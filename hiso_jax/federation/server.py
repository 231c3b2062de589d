"""The server of real clients: opens a round, takes replies, closes it; scalars are all it sees.

What a network does to replies (loses, delays, repeats them) ends here: a reply counts
once, while its round is open. Everything that counted is in the ledger before `close` returns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax import aggregators
from hiso_jax._engine import checks, exact
from hiso_jax.ledger import digests
from hiso_jax.ledger.store import Ledger, LedgerMismatch, Records
from hiso_jax.protocol import Algorithm, State


def catch_up(
    algorithm: Algorithm,
    state: State,
    records: Records,
    on_round: Callable[[State], Any] = lambda state: None,
) -> State:
    """Apply the records from the state's round on, and compare digests after each.

    Args:
      algorithm: the run's; its `advance` is compiled once.
      state: fresh from init, or any later one of the run, no older than ``records.first``.
      records: from ``ledger.records(since)``.
      on_round: called with every state, for a progress bar.

    Raises:
      LedgerMismatch: the digest differs after some round; the message says which.

    Returns:
      The state after the last record.
    """
    skip = int(state.round) - records.first
    if not 0 <= skip <= len(records.scalars):
        last = records.first + len(records.scalars)
        raise ValueError(f"state: expected round {records.first} to {last}, got {state.round}")
    advance = jax.jit(algorithm.advance, compiler_options=exact.compiler_options())
    rates = records.learning_rates
    for i in range(skip, len(records.scalars)):
        state = advance(state, records.scalars[i], None if rates is None else rates[i])
        wanted = records.digests[i]
        if wanted is not None and (found := digests.text(digests.digest(state))) != wanted:
            raise LedgerMismatch(
                f"round {records.first + i}: the digest is {found} here and {wanted} in the ledger"
            )
        on_round(state)
    return state


class Server:
    """Holds the state, the ledger and at most one open round.

    Attributes:
      state: after the last round.
      base: digest of the state before the first; None if the state given was a later one.

    Args:
      algorithm: the run's.
      state: fresh from init, or a later one of the run; brought up to the ledger's end.
      ledger: of this run, open for writing.

    Raises:
      LedgerMismatch: the ledger is not that of this algorithm and state.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp, tempfile
      >>> alg = hj.decomfl(lambda params, batch: ((params["w"] - batch) ** 2).mean(), 0.1)
      >>> state = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> ledger = hj.Ledger.create(tempfile.mkdtemp() + "/ledger.sqlite", alg, state)
      >>> server = Server(alg, state, ledger)
      >>> number = server.open(["ann", "bob"])
      >>> server.reply("ann", number, alg.probe(server.state, jnp.ones((1, 1, 3)))[0])
      True
      >>> _ = server.close()  # bob never answered
      >>> server.reply("bob", number, jnp.ones((1, 5))), ledger.records().reported
      (False, [{'ann': 1.0}])
    """

    def __init__(self, algorithm: Algorithm, state: State, ledger: Ledger):
        ledger.match(algorithm, state)
        self.algorithm, self.ledger = algorithm, ledger
        self.base = None if int(state.round) else np.asarray(digests.digest(state))
        self.state = catch_up(algorithm, state, ledger.records(int(state.round)))
        self._advance = jax.jit(algorithm.advance, compiler_options=exact.compiler_options())
        self._asked: dict[str, None] = {}  # in order
        self._places: dict[str, list[int]] = {}
        self._replies: dict[str, tuple[np.ndarray, float]] = {}

    @property
    def round(self) -> int:
        """Number of the round that is open, or will be next."""
        return self.ledger.rounds

    @property
    def asked(self) -> list[str]:
        """The clients that are asked in the open round, in order."""
        return list(self._asked)

    def open(self, names: Iterable[Any]) -> int:
        """Ask clients for a round; return its number.

        With `per_client_directions`, a client's number among them is the `slot` that it probes
        with.
        The ledger keeps it until the round is closed. After a restart ask the same clients in
        the same order: whoever has had another place in this round does not count in it, since
        nobody could tell for which of the two its scalars are.

        Args:
          names: of the clients, different; ``str`` of each is its name.

        Raises:
          ValueError: nobody is asked, one twice, or one without a name.
          RuntimeError: the last round has not been closed.
          LedgerWriteError: places cannot be written down; no round is open.
        """
        if self._asked:
            raise RuntimeError(f"open: round {self.round} is open; close it first")
        asked = checks.clients("names", names)
        most = self.algorithm.spec.directions.clients
        if most is not None:
            if len(asked) > most:
                raise ValueError(
                    f"names: expected at most per_client_directions={most}, got {len(asked)}"
                )
            self._places = self.ledger.open_round(asked)
        self._asked = dict.fromkeys(asked)
        return self.round

    def reply(self, name: Any, round: int, scalars: Any, weight: float = 1.0) -> bool:
        """Take a client's scalars [K, P]; return whether they count.

        A reply to a round that is closed, a second one of the same client, one of a client whose
        place has changed (see `open`), and one with NaN or infinite scalars (or any beyond 1e12)
        where the algorithm excludes those, do not count.

        Raises:
          ValueError: the client was not asked, or scalars or weight are out of range.
        """
        name = checks.client("name", name)
        if not self._waits_for(name, round):
            return False
        shape, scalars = self.algorithm.spec.sent, np.asarray(scalars, np.float32)
        if scalars.shape != shape:
            raise ValueError(f"scalars: client {name!r}: expected shape {shape}, "
                             f"got {scalars.shape}")  # fmt: skip
        # What float32 adds up without losing the others; quickly, for there may be thousands.
        if type(weight) is not float or not 1e-12 <= weight <= 1e12:
            checks.number("weight", weight, 1e-12, 1e12)
        if not (np.abs(scalars) <= aggregators.MOST).all():  # nor is NaN
            if self.algorithm.spec.combine.nonfinite == "exclude":
                return False
            raise ValueError(f"scalars: client {name!r}: expected finite ones of at most "
                             f"{aggregators.MOST:g}, got {scalars.tolist()}")  # fmt: skip
        self._replies[name] = (scalars, float(weight))
        return True

    def close(self, minimum: int = 1) -> np.ndarray:
        """Aggregate the replies by weight, advance, and commit; return the record [K, S].

        The record is NaN, and moves nothing, if nobody replied, or if what the aggregator makes of
        the replies is not finite. If it cannot be written the round stays open with all its
        replies.

        Args:
          minimum: so many must have replied; the round of fewer is one that nobody answered.

        Raises:
          RuntimeError: no round is open.
          ValueError: `minimum` is none.
          LedgerWriteError: the record could not be written; call again when it can.
        """
        if not self._asked:
            raise RuntimeError("close: no round is open")
        checks.count("minimum", minimum)
        record, reported, event = self._combine(minimum)
        rate = np.asarray(self.algorithm.learning_rate(self.state.round))
        state = self._advance(self.state, record, rate)
        self.ledger.append(record, digests.digest(state), rate, reported, event)
        self.state, self._asked, self._places, self._replies = state, {}, {}, {}
        return record

    def _waits_for(self, name: str, round: int) -> bool:
        """Whether a reply of this client would count; ValueError if it was not asked."""
        if round < self.round:
            return False
        if round > self.round or name not in self._asked:
            raise ValueError(f"reply: client {name!r} was not asked in round {round}")
        return name not in self._replies and len(self._places.get(name, ())) <= 1

    def _combine(self, minimum: int) -> tuple[np.ndarray, dict[str, float], dict[str, Any] | None]:
        """The record [K, S] of the replies, their weights by name, and what it releases."""
        record = np.full(self.ledger.shape, np.nan, np.float32)
        # In the order of asking, not of arrival: sums depend on it.
        names = [name for name in self._asked if name in self._replies]
        names = names if len(names) >= minimum else []
        if names:
            # All that were asked, so that each keeps its place; who is away has no weight.
            nothing = (np.zeros_like(self._replies[names[0]][0]), 0.0)
            replies = [self._replies.get(name, nothing) for name in self._asked]
            scalars = np.stack([reply[0] for reply in replies])
            weights = np.array([reply[1] for reply in replies], np.float32)
            record = np.asarray(self.algorithm.aggregate(jnp.asarray(scalars), weights))
        return record, {name: self._replies[name][1] for name in names}, None
