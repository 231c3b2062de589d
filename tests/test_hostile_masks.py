"""Masked rounds with a site that forges: who is named, who is left out, what it costs the others."""

import sys
from typing import Any

import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import secure
from hiso_jax.federation import wire
from hiso_jax.secure import client as clients
from hiso_jax.secure import primitives
from hiso_jax.secure import session as sessions
from tests.test_hostile_sites import full
from tests.test_masked_sites import NAMES, NOISY, TERMS, Net  # skips without the extras

GOOD = {"site-1": 1.0, "site-3": 1.0}
BLAMED = "SecureError on its machine, whose log says more; it blames 'site-2'"


class Edited:
    """A site whose steps are changed on their way up."""

    def __init__(self, real: Any, change: Any):
        self.real, self.change = real, change

    def answer(self, message: bytes) -> bytes:
        answer = self.real.answer(message)
        parsed = wire.parse(answer, self.real.run, (1, 2), (1, 2))
        if not isinstance(parsed, wire.Step):
            return answer
        return wire.pack(parsed._replace(parts=self.change(parsed.parts)), self.real.run)


def test_a_site_without_a_certificate_is_named_though_it_has_shown_one_before():
    """Its key of the last round is no proof to the others, who have kept none."""
    net = Net(TERMS, threshold=2)
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
    net.sites["site-2"] = Edited(
        net.sites["site-2"], lambda parts: parts[:1] if parts[0][4:5] == b"K" else parts
    )
    for _ in range(2):
        closed = net.round()
        assert closed.faults == {"site-2": "it shows no certificate"}
        assert closed.reported == GOOD
    net.sites["site-2"] = Edited(net.sites["site-2"].real, lambda parts: ())
    assert net.round().faults == {"site-2": "a step of nothing"}


@pytest.mark.parametrize("size", [48, 47, 0, 10**6])
def test_garbage_in_the_place_of_shares_is_refused_by_who_can_tell(
    size: int, monkeypatch: pytest.MonkeyPatch
):
    """Of another size by the server; else by the others, who say whom they blame."""
    real = clients.Client._seal
    seal = lambda own, *given: bytes(size) if own.name == "site-2" else real(own, *given)  # noqa: E731
    monkeypatch.setattr(clients.Client, "_seal", seal)
    net = Net(TERMS, threshold=2)
    closed = net.round()
    if size == 48:
        assert closed.reported == {} and closed.faults == dict.fromkeys(GOOD, BLAMED)
    else:
        assert closed.reported == GOOD and list(closed.faults) == ["site-2"]
        assert f"{size} bytes are no shares for" in closed.faults["site-2"]
    monkeypatch.undo()
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)


def test_who_has_forged_what_only_the_sum_shows_voids_one_round(monkeypatch: pytest.MonkeyPatch):
    """The server has the proof: it is named, and left out from then on."""
    real = sessions.commitment

    def commit(session: Any, kind: bytes, owner: str, *rest: Any) -> bytes:
        forged = kind == b"seed" and owner == "site-2"
        if forged and sys._getframe(1).f_code.co_name == "share":
            return real(session, kind, owner, "", b"another seed ...")
        return real(session, kind, owner, *rest)

    monkeypatch.setattr(sessions, "commitment", commit)
    net = Net(TERMS, threshold=2)
    closed = net.round()
    assert closed.reported == {} and closed.silent == []
    assert (
        "round 0 is void: client 'site-2': its shares do not make the mask"
        in (closed.faults["site-2"])
    )
    for _ in range(2):
        closed = net.round()
        assert closed.reported == GOOD and list(closed.faults) == ["site-2"]
        assert closed.faults["site-2"].startswith("left out: round 0 is void: client 'site-2'")


def test_a_blame_is_a_word_of_one_site_and_nobody_is_left_out_for_it():
    net = Net(TERMS, threshold=2)
    real = net.sites["site-2"].answer
    for blamed, text in (("site-1", "; it blames 'site-1'"), ("nobody", "")):
        failed = wire.pack(wire.Failed(net.server.round, "SecureError", blamed), net.host.run)
        net.sites["site-2"].answer = lambda message, failed=failed: failed
        closed = net.round()
        assert closed.faults["site-2"] == f"SecureError on its machine, whose log says more{text}"
        assert closed.reported == GOOD
    net.sites["site-2"].answer = real
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize("which", ["seal", "pads"])
def test_a_key_that_nobody_can_agree_with_is_refused_by_the_server(
    which: str, monkeypatch: pytest.MonkeyPatch
):
    """Else the others, whose secrets with it would be zeros, refuse it only when it is in."""
    net, real = Net(TERMS, threshold=2), primitives.public

    def public(key: bytes) -> bytes:
        own = sys._getframe(2).f_locals.get("self")
        low = isinstance(own, secure.Client) and own.name == "site-2"
        return bytes(32) if low and key == getattr(own, f"_{which}_key") else real(key)

    monkeypatch.setattr(primitives, "public", public)
    closed = net.round()
    assert closed.reported == GOOD
    assert closed.faults == {"site-2": f"client 'site-2': no X25519 key: {'00' * 32}"}


def test_steps_that_a_network_repeats_later_cost_nobody_the_round():
    """Each comes again in the next step, before the answer to that."""
    net = Net(NOISY, threshold=2)
    line: list[tuple[str, bytes]] = []
    before: dict[str, bytes] = {}

    def send(name: str, message: bytes) -> None:
        line.append((name, message))

    def move(name: str) -> bool:
        while line:
            name, message = line.pop(0)
            if name in before:
                net.host.receive(name, before[name])
            before[name] = net.sites[name].answer(message)
            net.host.receive(name, before[name])
        return True

    net.host._send = send
    for _ in range(3):
        closed = net.round(gone=move)
        assert closed.reported == dict.fromkeys(NAMES, 1.0)
        assert closed.faults == {} and closed.silent == []


def test_a_step_that_comes_when_its_session_is_over_has_nobody_named():
    net, kept = Net(NOISY, threshold=2), list[tuple[str, bytes]]()
    receive, close = net.host.receive, net.host.close

    def late(name: str, message: bytes) -> None:
        slow = b"hsa1S" in message and name != "site-1"  # its shares
        kept.append((name, message)) if slow else receive(name, message)

    def closed_after(*given: Any) -> Any:
        for own in kept:
            receive(*own)
        return close(*given)

    net.host.receive, net.host.close = late, closed_after
    closed = net.round()
    assert closed.faults == {} and closed.silent == ["site-2", "site-3"] and len(kept) == 2


def test_a_disk_that_is_full_before_the_sum_makes_the_round_void():
    """Whose noise a sum uses is noted first; without the note nothing is revealed or charged."""
    net = Net(NOISY, threshold=2)
    seen = set[bytes]()
    net.lost = lambda name, step: bool(seen.add(step))
    room = full(net.server.ledger)
    real, net.server._note = net.server._note, lambda names: real(["n" * 9000])
    with pytest.raises(hj.LedgerWriteError):
        net.round()
    assert b"M" not in seen
    room()
    closed = net.host.close()
    assert closed.reported == {} and np.isnan(closed.record).all() and closed.seconds < 60
    assert net.server.ledger.events() == [None]
    net.server._note = real
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
