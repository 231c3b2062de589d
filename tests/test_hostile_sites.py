"""Sites that say what no site says, or too often: they are named, and the others' round goes on.

A network that repeats and delays what good sites say has nobody named.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.federation import wire
from tests import parties
from tests.test_sites import ALGORITHM, NAMES, RUN, Forger, Net, sites


def test_a_client_that_says_again_and_again_that_it_is_behind_is_named():
    """Each time costs the records that it missed, or a model; with true digests, which all know."""
    net = Net(sites())
    states = [np.asarray(hj.digest(net.server.state))]
    for _ in range(2):
        net.round()
        states.append(np.asarray(hj.digest(net.server.state)))
    host, sent = net.host, []
    net.server.open(NAMES)
    host._begin(NAMES, last=False)
    host._send = lambda name, message: sent.append(message)
    for i in range(20):
        host.receive("site-2", wire.pack(wire.Behind(2, i % 2, states[i % 2]), RUN))
    assert len(sent) == federation.standing.CATCH_UPS
    assert host.faults == {"site-2": "it has been behind 3 times in this round"}


def test_a_client_that_was_sent_all_that_it_needs_and_does_not_move_is_named():
    """Not when it says so once more in one round: the network may have done that."""
    net, still = Net(sites()), np.asarray(hj.digest(parties.begin(ALGORITHM)))
    net.round(NAMES[:2])
    net.sites["site-2"] = Forger(wire.pack(wire.Behind(1, 0, still), RUN))
    net.sites["site-3"] = Forger(wire.pack(wire.Behind(1, 0, still), RUN))
    closed = net.round()
    assert closed.faults == {"site-2": "it stays at round 0"} and closed.silent == ["site-3"]
    net.sites["site-3"] = Forger(wire.pack(wire.Behind(2, 0, still), RUN))
    assert net.round().faults["site-3"] == "it stays at round 0"


class Slow(Net):
    """A net whose messages wait in a line; the host's looking whether sites are gone moves it."""

    def __init__(self, rng: np.random.Generator):
        super().__init__(sites())
        self.rng, self.line, self.held = rng, [], []

    def send(self, name: str, message: bytes) -> None:
        self._put("down", name, message)

    def _put(self, way: str, name: str, message: bytes) -> None:
        for _ in range(self.rng.integers(1, 3)):
            late = self.rng.random() < 0.2
            (self.held if late else self.line).append((way, name, message))

    def move(self, name: str = "") -> bool:
        while self.line:
            way, name, message = self.line.pop(0)
            if way == "up":
                self.host.receive(name, message)
            else:
                self._put("up", name, self.sites[name].answer(message))
        return True

    def round(self, names: list[str] = NAMES, deadline: float = 60.0, **options: Any) -> Any:
        self.line, self.held = self.held, []
        return self.host.conduct(names, deadline, gone=self.move, **options)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_what_a_network_repeats_or_delays_has_nobody_named(seed: int):
    """Up and down, within a round and into the next ones; sites are away between, so are behind."""
    rng = np.random.default_rng(seed)
    net = Slow(rng)
    for _ in range(8):
        names = [name for name in NAMES if rng.random() < 0.6] or NAMES[:1]
        closed = net.round(names)
        assert closed.faults == {} and sorted([*closed.reported, *closed.silent]) == names
    net.line, net.held, net.rng = [], [], np.random.default_rng(0)
    net._put = lambda way, name, message: net.line.append((way, name, message))
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
    assert net.host.end(NAMES, 60, gone=net.move) == NAMES


@pytest.mark.parametrize("message", [
    wire.Failed(0, "ValueError"), wire.Other(0, {}), wire.Apart(0, 0, np.zeros((1, 2))),
    wire.Behind(0, 0, np.zeros(2)), wire.Reply(0, np.zeros(2), None), wire.Step(0, ()),
], ids=lambda message: type(message).__name__)  # fmt: skip
def test_what_comes_a_round_late_changes_nothing(message: wire.Message):
    net = Net(sites())
    net.lost = lambda way, name: name == "site-2"
    net.round()
    net.lost, own = lambda way, name: False, net.sites["site-2"]

    class Late:
        def answer(self, asked: bytes) -> bytes:
            net.host.receive("site-2", wire.pack(message, RUN))
            return own.answer(asked)

    net.sites["site-2"] = Late()
    closed = net.round()
    assert closed.faults == {} and closed.reported == dict.fromkeys(NAMES, 1.0)
    assert net.host.counts["site-2"].late == 1 + 1  # it is behind first, so is asked twice


def test_whatever_a_client_makes_fail_is_its_own_fault(monkeypatch: pytest.MonkeyPatch):
    net = Net(sites())

    def broken(*args: Any) -> None:
        raise KeyError("secret")

    real = federation.host.Host._measured
    monkeypatch.setattr(federation.host.Host, "_measured", lambda self, name, message: (
        broken() if name == "site-2" else real(self, name, message)))  # fmt: skip
    closed = net.round()
    assert closed.faults == {"site-2": "its message cannot be taken: KeyError"}
    assert set(closed.reported) == {"site-1", "site-3"}


LONG: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "algorithm": lambda own, text: own["algorithm"] | {"x": text},
    "key": lambda own, text: text,
    "leaves": lambda own, text: [[text, "f", [1], True]],
    "software": lambda own, text: {"hiso-jax": text},
    "privacy": lambda own, text: text,
    "base": lambda own, text: text,
}


@pytest.mark.parametrize("field", LONG)
def test_a_fault_is_short_whatever_a_client_writes(field: str):
    """Compressed, a text of any length costs it nothing, and would be in every log of the round."""
    header = parties.site("site-2", ALGORITHM).header
    net = Net(sites())
    other = header | {field: LONG[field](header, "a" * 200_000)}
    net.sites["site-2"] = Forger(wire.pack(wire.Other(0, other), RUN))
    closed = net.round()
    assert set(closed.reported) == {"site-1", "site-3"} and 0 < len(closed.faults["site-2"]) <= 1000


def test_while_one_message_is_read_others_are_taken(monkeypatch: pytest.MonkeyPatch):
    """What takes long to read holds up its sender only."""
    net, real = Net(sites()), wire.parse
    reading, go_on = threading.Event(), threading.Event()

    def parse(content: Any, *rest: Any) -> wire.Message:
        if content == b"long":
            reading.set()
            assert go_on.wait(60)
        return real(content, *rest)

    monkeypatch.setattr(wire, "parse", parse)
    net.server.open(NAMES)
    net.host._begin(NAMES, last=False)
    failed = wire.pack(wire.Failed(0, "ValueError"), RUN)
    said = [("site-2", b"long"), ("site-1", failed)]
    threads = [threading.Thread(target=net.host.receive, args=own, daemon=True) for own in said]
    threads[0].start()
    assert reading.wait(60)
    threads[1].start()
    threads[1].join(10)
    assert set(net.host.faults) == {"site-1"}
    go_on.set()
    threads[0].join(60)
    assert set(net.host.faults) == {"site-1", "site-2"}


def full(ledger: hj.Ledger) -> Callable[[], Any]:
    """Fill the disk of a ledger; return what makes room again."""
    connection = ledger._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    return lambda: connection.execute("PRAGMA max_page_count=100000")


def test_a_round_that_could_not_be_opened_is_asked_again_when_it_can():
    """With directions of the clients' own their places are written down before anybody is asked."""
    alg = parties.algorithm(per_client_directions=3)
    net = Net(sites(alg=alg), alg=alg)
    room = full(net.server.ledger)
    names = [*NAMES[:2], "site-" + "9" * 9000]  # more than is left of the last page
    for _ in range(2):
        with pytest.raises(hj.LedgerWriteError):
            net.round(names)
        assert net.server.asked == [] and net.server.round == 0
    room()
    net.lost = lambda way, name: name not in NAMES
    closed = net.round(names)
    assert (closed.round, list(closed.reported), closed.faults) == (0, NAMES[:2], {})
    assert closed.silent == names[2:]


def test_a_round_that_could_not_be_recorded_says_how_long_it_took():
    net = Net(sites())
    real, broken = net.server.ledger.append, [0]

    def append(*given: Any) -> None:
        if broken:
            broken.pop()
            raise hj.LedgerWriteError("full")
        real(*given)

    net.server.ledger.append = append
    with pytest.raises(hj.LedgerWriteError):
        net.round()
    closed = net.host.close()
    assert closed.reported == dict.fromkeys(NAMES, 1.0) and 0 < closed.seconds < 60
    assert net.round().seconds < 60
