"""The server's half of the conversation: whom to send what, what to make of what comes back.

An engine (NVFlare, or another) brings bytes from one machine to another and nothing else. It
gives `Host` a function that sends, and hands it what it receives, from any thread; the host asks,
sends what a client missed, names those that are of another run or hold another model, and
closes the round when all have answered or time is up. Nothing that a client sends raises here.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from hiso_jax._engine import checks
from hiso_jax.aggregators import MOST
from hiso_jax.federation import wire
from hiso_jax.federation.server import Server
from hiso_jax.federation.standing import Standing
from hiso_jax.ledger import header as headers

log = logging.getLogger(__name__)
MOST_WHY = 1000
"""Characters of a fault, whose text may be a client's."""


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
        self._standing = Standing(server, base)
        self.server, self._send, self._weights = server, send, dict(weights or {})
        header = server.ledger.header
        # Of the version that runs here, whatever version began the ledger.
        software = header["software"] | {"hiso-jax": headers.version("hiso-jax")}
        self.header = header | {"software": software}
        self.run = wire.identity(self.header)
        self._asked: dict[str, int] = {}  # name -> slot
        self._faults: dict[str, str] = {}
        self._done: set[str] = set()
        self._last, self._begun = False, 0.0
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
          LedgerWriteError: the round cannot be recorded; `close` when it can. Or it could not
            even be opened, and nobody is asked (``server.asked`` is empty): call this again.
        """
        checks.number("deadline", deadline, 0, above=True)
        checks.count("minimum", minimum)
        if grace is not None:
            checks.number("grace", grace, 0)
        with self._changed:
            round = self.server.open(names)
            self._begin(self.server.asked, last=False)
        for name in list(self._asked):
            self._ask(name)
        if not self._wait(self._begun + deadline, stop, gone, minimum, grace):
            return None
        if not self._gather(stop, gone, minimum):
            return None
        return self.close(minimum, round)

    def close(
        self, minimum: int = 1, round: int | None = None, begin: float | None = None
    ) -> Closed:
        """Close the round that `conduct` opened, where that could not be recorded.

        Args:
          minimum: as of `conduct`.
          round: its number, if it is known.
          begin: when it began, of ``time.monotonic()``; by default when `conduct` opened it.

        Raises:
          RuntimeError: no round is open.
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
        seconds = time.monotonic() - (self._begun if begin is None else begin)
        return Closed(number, record, reported, faults, silent, seconds)

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
        return self._standing.past.digest(self.server.round)

    @property
    def faults(self) -> dict[str, str]:
        """Who cannot take part in what is going on, and why."""
        return dict(self._faults)

    def fail(self, name: str, why: str) -> None:
        """Take from the engine that a client cannot answer, in its words; from any thread."""
        with self._changed:
            if self._waits_for(name):
                self._fault(name, why)
                self._tell()

    def receive(self, name: str, message: Any, late: bool = False) -> None:
        """Take what a client sent, whatever it is; from any thread.

        Args:
          name: of the client, as the engine knows it; not what the message says.
          message: bytes, or what came in their place.
          late: the engine knows that it answers what is over: it is counted, and nothing else.
        """
        size = len(message) if isinstance(message, (bytes, bytearray)) else 0
        with self._changed:
            self._count(name, up=size)
            if late or not self._waits_for(name):
                return self._late(name)
        # Not under the lock: what takes long to read keeps nobody else from being heard.
        parsed, why = self._tried(name, self._parse, message)
        with self._changed:
            if not self._waits_for(name):
                return self._late(name)
            again, round = None, self.server.round
            if parsed is not None and parsed.round < round:
                self._late(name)
            elif parsed is not None and parsed.round > round:
                why = f"a reply to round {parsed.round}, which is to come"
            elif parsed is not None:
                again, why = self._tried(name, self._take, name, parsed)
            if why:
                self._fault(name, why)
            self._tell()
        return None if again is None else self._post(name, again)

    # What it does with it.

    def _waits_for(self, name: str) -> bool:
        return name in self._asked and name not in self._done

    def _late(self, name: str) -> None:
        self._count(name, late=1)
        log.info("round %d: %s: late, it changes nothing", self.server.round, name)

    def _parse(self, message: Any) -> wire.Message:
        spec = self.server.algorithm.spec
        return wire.parse(message, self.run, spec.sent, spec.record)

    def _tried(self, name: str, do: Callable[..., Any], *given: Any) -> tuple[Any, str]:
        """What it gives, or why a client does not count: whatever it sends, the round goes on."""
        try:
            return do(*given), ""
        except ValueError as error:
            return None, str(error)
        except Exception as error:
            log.exception("round %d: %s: its message cannot be taken", self.server.round, name)
            return None, f"its message cannot be taken: {type(error).__name__}"

    def _tell(self) -> None:
        """Wake who waits, but not a thousand times a round if there is nothing to do for it."""
        if self._enough is not None or len(self._done) >= len(self._asked):
            self._changed.notify_all()

    def _begin(self, names: list[str], last: bool) -> None:
        self._asked = {name: slot for slot, name in enumerate(names)}
        self._faults, self._done, self._last = {}, set(), last
        self._begun = time.monotonic()
        self._standing.begin()

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
        with self._changed:
            ask = self._placed(name, self._standing.ask(name))
        self._post(name, ask)

    def _placed(self, name: str, ask: wire.Ask) -> wire.Ask:
        return ask._replace(slot=self._asked[name], last=self._last)

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
        """Make something of a message of this round; return what is to be sent for it.

        Raises:
          ValueError: the client does not count; says why.
        """
        if isinstance(message, wire.Reply):
            self._standing.measured(name, message.digest)
            if self._last:
                self._done.add(name)
            else:
                self._measured(name, message)
        elif isinstance(message, wire.Behind):
            again = self._standing.behind(name, message)
            return None if again is None else self._placed(name, again)
        elif isinstance(message, wire.Apart):
            raise ValueError(self._standing.apart(name, message))
        elif isinstance(message, wire.Other):
            headers.match(self.header, message.header)
            ours, theirs = (h["software"].get("hiso-jax") for h in (self.header, message.header))
            raise headers.Mismatch(f"another version of hiso-jax: {ours} there, {theirs} here")
        elif isinstance(message, wire.Failed):
            blames = f"; it blames {message.blames!r}" if message.blames in self._asked else ""
            raise ValueError(f"{message.kind} on its machine, whose log says more{blames}")
        else:
            raise ValueError(f"{type(message).__name__} is nothing that a client sends")
        return None

    def _measured(self, name: str, message: wire.Reply) -> None:
        if message.scalars is None:
            raise ValueError("a reply without scalars")
        self._count(name, payload_up=message.scalars.nbytes + 8)
        weight = self._weights.get(name, 1.0)
        if not self.server.reply(name, message.round, message.scalars, weight):
            raise ValueError("its scalars do not count: they are NaN, infinite or beyond "
                             f"{MOST:g}, or of another place in this round")  # fmt: skip
        self._done.add(name)

    def _fault(self, name: str, why: str) -> None:
        why = why[:MOST_WHY]
        log.error("round %d: client %r does not count: %s", self.server.round, name, why)
        self._faults[name] = why
        self._done.add(name)

    def _count(self, name: str, **more: int) -> None:
        count = self.counts.get(name, Count())
        added = {field: getattr(count, field) + n for field, n in more.items()}
        self.counts[name] = count._replace(**added)
