"""The server's half of the conversation: whom to send what, what to make of what comes back.

An engine (NVFlare, or another) brings bytes from one machine to another and nothing else. It
gives `Host` a function that sends, and hands it what it receives, from any thread; the host asks,
sends what a client missed, names those that are of another run or hold another model, and
closes the round when all have answered or time is up. Nothing that a client sends raises here.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from hiso_jax._engine import checks
from hiso_jax.federation import wire
from hiso_jax.federation.past import Past
from hiso_jax.federation.server import Server
from hiso_jax.ledger import digests, snapshots
from hiso_jax.ledger import header as headers

log = logging.getLogger(__name__)
RESETS = 2
"""Times that a client is sent back to the base model before it is only named."""
CATCH_UPS = 3
"""Times a round that a client is sent what it missed: its process may begin again meanwhile."""


class Closed(NamedTuple):
    """What became of a round."""

    round: int
    record: np.ndarray  # float32 [K, S]; NaN if too few answered
    reported: dict[str, float]  # weights of those who count
    faults: dict[str, str]  # who answered and does not count, and why
    silent: list[str]  # who was asked and had not answered
    seconds: float


class Count(NamedTuple):
    """Bytes of a client since the host began: payload, and messages with all their bytes."""

    payload_up: int = 0
    payload_down: int = 0
    up: int = 0
    down: int = 0
    late: int = 0  # messages that came when their round was closed


class Host:
    """A server, and what is known of its clients.

    Args:
      server: of the run.
      send: ``(name, message)``, called from the thread that asks or receives; what it raises
        counts as a message that was lost.
      weights: of clients by name in the mean over clients; 1 for those that are not there.
      base: digest of the state before the first round, uint32 [2], where the server was given a
        later one.

    Raises:
      ValueError: `base` is missing, or the ledger has rounds without a digest; see `Past`.

    Example: see `Site`.
    """

    def __init__(
        self,
        server: Server,
        send: Callable[[str, bytes], Any],
        weights: dict[str, float] | None = None,
        base: Any = None,
    ):
        self._past = Past(server, base)
        self.server, self._send, self._weights = server, send, dict(weights or {})
        header = server.ledger.header
        # Of the version that runs here, whatever version began the ledger.
        software = header["software"] | {"hiso-jax": headers.version("hiso-jax")}
        self.header = header | {"software": software}
        self.run = wire.identity(self.header)
        self._room = snapshots.size(server.algorithm, server.state)
        self._held: dict[str, int] = {}  # name -> round that the client is known to be at
        self._reset: dict[str, int] = {}  # name -> times that it had to begin again
        self._apart: set[str] = set()  # those that have to, at the next ask
        self._asked: dict[str, int] = {}  # name -> slot
        self._faults: dict[str, str] = {}
        self._done: set[str] = set()
        self._catch_ups: Counter[str] = Counter()  # times, of the round
        self._last = False
        self._enough: int | None = None  # so many answers begin to count time
        self._changed = threading.Condition()
        self.counts: dict[str, Count] = {}

    # What an engine calls.

    def conduct(
        self,
        names: Iterable[Any],
        deadline: float,
        minimum: int = 1,
        grace: float | None = None,
        stop: Callable[[], bool] = lambda: False,
        gone: Callable[[str], bool] = lambda name: False,
    ) -> Closed | None:
        """Ask clients for a round, wait for them, close it.

        Args:
          names: of the clients to ask.
          deadline: seconds from now after which the round closes with who has answered.
          minimum: so many must count, or else the round is recorded as one nobody answered.
          grace: seconds after which it closes once `minimum` have answered; None: it waits for
            all until the deadline.
          stop: looked at while waiting; the round is left open, and None returned.
          gone: whether the engine knows that a client is; it is not waited for.

        Raises:
          ValueError: an argument is out of range.
          RuntimeError: a round is open that was stopped; nothing was asked.
          LedgerWriteError: the round cannot be recorded; `close` when it can.
        """
        checks.number("deadline", deadline, 0, above=True)
        checks.count("minimum", minimum)
        if grace is not None:
            checks.number("grace", grace, 0)
        begin = time.monotonic()
        with self._changed:
            round = self.server.open(names)
            self._begin(self.server.asked, last=False)
        for name in list(self._asked):
            self._ask(name)
        if not self._wait(begin + deadline, stop, gone, minimum, grace):
            return None
        if not self._gather(stop, gone, minimum):
            return None
        return self.close(minimum, round, begin)

    def close(self, minimum: int = 1, round: int | None = None, begin: float = 0.0) -> Closed:
        """Close the round that `conduct` opened, where that could not be recorded.

        Raises:
          LedgerWriteError: it still cannot be.
        """
        with self._changed:
            number = self.server.round if round is None else round
            record = self.server.close(minimum)
            # A void round has names in the ledger where it may have shown something of theirs.
            void = np.isnan(record).all()
            reported = {} if void else self.server.ledger.records(number).reported[0]
            silent = [n for n in self._asked if n not in self._done and n not in reported]
            faults, self._asked = self._faults, {}
        return Closed(number, record, reported, faults, silent, time.monotonic() - begin)

    def end(
        self,
        names: Iterable[Any],
        deadline: float,
        stop: Callable[[], bool] = lambda: False,
        gone: Callable[[str], bool] = lambda name: False,
    ) -> list[str]:
        """Bring all clients to the end of the run; return who has proved to be there.

        Args:
          names: of the clients.
          deadline: seconds from now to wait for them.
          stop: looked at while waiting.
          gone: as of `conduct`.
        """
        checks.number("deadline", deadline, 0, above=True)
        with self._changed:
            self._begin(checks.clients("names", names), last=True)
        for name in list(self._asked):
            self._ask(name)
        self._wait(time.monotonic() + deadline, stop, gone)
        with self._changed:
            there = [n for n in self._asked if n in self._done and n not in self._faults]
            self._asked = {}
        return there

    @property
    def digest(self) -> np.ndarray:
        """Of the state that the open round is measured at, uint32 [2]."""
        return self._past.digest(self.server.round)

    @property
    def faults(self) -> dict[str, str]:
        """Who cannot take part in what is going on, and why."""
        return dict(self._faults)

    def fail(self, name: str, why: str) -> None:
        """Take from the engine that a client cannot answer, in its words; from any thread."""
        with self._changed:
            if name in self._asked and name not in self._done:
                self._fault(name, why)
                self._tell()

    def receive(self, name: str, message: Any, late: bool = False) -> None:
        """Take what a client sent, whatever it is; from any thread.

        Args:
          name: of the client, as the engine knows it; not what the message says.
          message: bytes, or what came in their place.
          late: the engine knows that it answers what is over: it is counted, and nothing else.
        """
        again = None
        with self._changed:
            size = len(message) if isinstance(message, (bytes, bytearray)) else 0
            self._count(name, up=size)
            if late or name not in self._asked or name in self._done:
                self._count(name, late=1)
                log.info("round %d: %s: late, it changes nothing", self.server.round, name)
                return
            spec = self.server.algorithm.spec
            try:
                parsed = wire.parse(message, self.run, spec.sent, spec.record)
                again = self._take(name, parsed)
            except (wire.WireError, headers.Mismatch, ValueError) as error:
                self._fault(name, str(error))
            except Exception as error:  # whatever a client sends, the others' round goes on
                log.exception("round %d: %s: its message cannot be taken", self.server.round, name)
                self._fault(name, f"its message cannot be taken: {type(error).__name__}")
            self._tell()
        if again is not None:
            self._post(name, again)

    # What it does with it.

    def _tell(self) -> None:
        """Wake who waits, but not a thousand times a round if there is nothing to do for it."""
        if self._enough is not None or len(self._done) >= len(self._asked):
            self._changed.notify_all()

    def _begin(self, names: list[str], last: bool) -> None:
        self._asked = {name: slot for slot, name in enumerate(names)}
        self._faults, self._done, self._last, self._catch_ups = {}, set(), last, Counter()

    def _wait(
        self,
        until: float,
        stop: Callable[[], bool],
        gone: Callable[[str], bool],
        minimum: int = 1,
        grace: float | None = None,
    ) -> bool:
        """Wait for answers; False if it was stopped."""
        enough = None  # when the first `minimum` had answered
        with self._changed:
            self._enough = None if grace is None else minimum
            while not all(name in self._done or gone(name) for name in self._asked):
                now = time.monotonic()
                if grace is not None and len(self._done) - len(self._faults) >= minimum:
                    enough = now if enough is None else enough
                    until = min(until, enough + grace)
                if now >= until:
                    break
                if stop():
                    return False
                self._changed.wait(min(until - now, 0.2))
        return not stop()

    def _gather(self, stop: Callable[[], bool], gone: Callable[[str], bool], minimum: int) -> bool:
        """What there is to do between answers and record; False if it was stopped."""
        return True

    def _ask(self, name: str) -> None:
        held = self._held.get(name)
        reset = name in self._apart
        self._apart.discard(name)
        with self._changed:
            ask = self._message(name, None if reset else held, reset)
        self._post(name, ask)

    def _message(self, name: str, held: int | None, reset: bool = False) -> wire.Ask:
        """Ask a client that is at round `held`; None: it is to say where it is."""
        server = self.server
        ask = wire.Ask(
            round=server.round,
            digest=self._past.digest(server.round),
            first=server.round,
            records=np.zeros((0, *server.ledger.shape), np.float32),
            slot=self._asked[name],
            last=self._last,
            reset=reset,
        )
        if held is None or held == server.round:
            return ask
        records = self._past.missed(held)
        if records.nbytes > self._room or len(records.scalars) > wire.MOST_ROUNDS:
            return ask._replace(snapshot=snapshots.pack(server.algorithm, server.state))
        return ask._replace(first=held, records=records.scalars, rates=records.learning_rates)

    def _post(self, name: str, ask: wire.Ask | wire.Step) -> None:
        message = wire.pack(ask, self.run)
        if isinstance(ask, wire.Step):
            payload = sum(map(len, ask.parts))
        else:
            payload = ask.records.nbytes + len(ask.snapshot or b"")
            payload += 0 if ask.rates is None else ask.rates.nbytes
        with self._changed:
            self._count(name, payload_down=payload, down=len(message))
        try:
            self._send(name, message)
        except Exception:
            log.exception("round %d: nothing could be sent to %s", ask.round, name)

    def _take(self, name: str, message: wire.Message) -> wire.Ask | None:
        """Make something of a message; return what is to be sent for it."""
        round = self.server.round
        if isinstance(message, wire.Reply):
            if message.round < round:
                self._count(name, late=1)
                log.info("round %d: %s: of round %d, it changes nothing", round, name,
                         message.round)  # fmt: skip
                return None
            self._reply(name, message)
        elif isinstance(message, wire.Behind):
            return self._behind(name, message)
        elif isinstance(message, wire.Apart):
            self._held.pop(name, None)
            self._send_back(name)
            self._fault(name, wire.where_apart(message, self.server.round, self._past.text))
        elif isinstance(message, wire.Other):
            headers.match(self.header, message.header)
            ours, theirs = (h["software"].get("hiso-jax") for h in (self.header, message.header))
            raise headers.Mismatch(f"another version of hiso-jax: {ours} there, {theirs} here")
        elif isinstance(message, wire.Failed):
            self._fault(name, f"{message.kind} on its machine, whose log says more")
        else:
            self._fault(name, f"{type(message).__name__} is nothing that a client sends")
        return None

    def _reply(self, name: str, message: wire.Reply) -> None:
        round = self.server.round
        if message.round > round:
            return self._fault(name, f"a reply to round {message.round}, which is to come")
        if (message.digest != self._past.digest(round)).any():
            self._held.pop(name, None)
            return self._fault(
                name,
                f"measured at another state: after {round} rounds its digest is "
                f"{digests.text(message.digest)} there and {self._past.text(round)} here",
            )
        self._held[name] = round
        self._reset.pop(name, None)
        if self._last:
            self._done.add(name)
        else:
            self._measured(name, message)
        return None

    def _measured(self, name: str, message: wire.Reply) -> None:
        if message.scalars is None:
            return self._fault(name, "a reply without scalars")
        self._count(name, payload_up=message.scalars.nbytes + 8)
        weight = self._weights.get(name, 1.0)
        if self.server.reply(name, message.round, message.scalars, weight):
            self._done.add(name)
        else:
            self._fault(name, "its scalars do not count: they are NaN or infinite, or of "
                              "another place in this round")  # fmt: skip
        return None

    def _behind(self, name: str, message: wire.Behind) -> wire.Ask | None:
        round = message.round
        if round > self.server.round:
            self._send_back(name)
            self._fault(
                name,
                f"it has gone through {round} rounds, the ledger has {self.server.round}: it is "
                "of a run that this ledger, a copy from before, does not know",
            )
        elif (message.digest != self._past.digest(round)).any():
            self._send_back(name)
            self._fault(
                name,
                f"the model that it begins with is not the run's: after {round} rounds its digest "
                f"is {digests.text(message.digest)} there and {self._past.text(round)} here",
            )
        elif self._held.get(name) == round:  # it was sent all that it needs, and did not move
            self._fault(name, f"it stays at round {round}")
        elif self._catch_ups[name] >= CATCH_UPS:  # each may cost a whole model
            self._fault(name, f"it has been behind {CATCH_UPS} times in this round")
        else:
            self._held[name] = round
            self._catch_ups[name] += 1
            return self._message(name, round)
        return None

    def _send_back(self, name: str) -> None:
        self._held.pop(name, None)
        if self._reset.get(name, 0) < RESETS:
            self._reset[name] = self._reset.get(name, 0) + 1
            self._apart.add(name)

    def _fault(self, name: str, why: str) -> None:
        log.error("round %d: client %r does not count: %s", self.server.round, name, why)
        self._faults[name] = why
        self._done.add(name)

    def _count(self, name: str, **more: int) -> None:
        count = self.counts.get(name, Count())
        added = {field: getattr(count, field) + n for field, n in more.items()}
        self.counts[name] = count._replace(**added)
