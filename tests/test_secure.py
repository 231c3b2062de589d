"""Masked rounds: sums to the bit for whoever is gone at any step, and forgeries named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

pytest.importorskip("cryptography", reason="needs the extra secure")
pytest.importorskip("Crypto", reason="needs the extra secure")

from hiso_jax import secure
from hiso_jax.secure import primitives
from hiso_jax.secure import session as sessions

NAMES = ("ann", "bob", "cem", "dia", "eve")
SITES = {name: name.encode().ljust(32) for name in (*NAMES, *map(str, range(12)))}  # no secrets
DIRECTORY = {name: primitives.site_public(key) for name, key in SITES.items()}
STEPS = (b"K", b"S", b"M", b"R")


def vector(name: str, length: int = 3) -> np.ndarray:
    """Numbers from all of 64 bits."""
    rng = np.random.default_rng(list(name.encode()))
    return rng.integers(-(2**60), 2**60, length)


def clients(session: secure.Session) -> dict[str, secure.Client]:
    return {n: secure.Client(session, n, SITES[n], DIRECTORY) for n in session.names}


class Round(RuleBasedStateMachine):
    """Against a plain sum: messages come in any order, late, twice, or never."""

    @initialize(threshold=st.integers(3, 5), least=st.integers(2, 5))
    def begin(self, threshold: int, least: int) -> None:
        self.session = secure.Session("run", 7, NAMES, 3, threshold, None, least)
        self.server = secure.Server(self.session, DIRECTORY)
        self.clients = clients(self.session)
        self.step, self.void = 0, False
        self.waiting = {name: client.advertise() for name, client in self.clients.items()}
        self.taken: dict[str, bytes] = {}
        self.late: dict[str, bytes] = {}
        self.there = list(NAMES)

    def left(self) -> bool:
        return self.step < 4 and not self.void

    @precondition(lambda self: self.left() and self.waiting)
    @rule(pick=st.integers(0, 9))
    def deliver(self, pick: int) -> None:
        name = sorted(self.waiting)[pick % len(self.waiting)]
        self.taken[name] = self.waiting.pop(name)
        assert self.server.receive(name, self.taken[name])

    @precondition(lambda self: self.left() and self.waiting)
    @rule()
    def deliver_all(self) -> None:
        while self.waiting:
            self.deliver(0)

    @precondition(lambda self: self.left() and self.taken)
    @rule(pick=st.integers(0, 9))
    def again(self, pick: int) -> None:
        name = sorted(self.taken)[pick % len(self.taken)]
        assert not self.server.receive(name, self.taken[name])

    @precondition(lambda self: self.late)
    @rule(pick=st.integers(0, 9))
    def too_late(self, pick: int) -> None:
        name = sorted(self.late)[pick % len(self.late)]
        assert not self.server.receive(name, self.late[name])

    @precondition(lambda self: self.left() and len(self.taken) >= 3)
    @rule()
    def close(self) -> None:
        few = len(self.taken) < max(self.session.threshold, self.session.least)
        if few and self.step < 3:
            self.void = True
            with pytest.raises(secure.TooFew):
                self.server.close()
            return
        self.late = dict(self.waiting)
        answered = [name for name in NAMES if name in self.taken]
        if self.step == 3:
            self.end(answered)
            return
        replies = self.server.close()
        assert set(replies) == set(answered)
        self.step += 1
        if self.step == 3:
            self.there = answered
        act: Any = [None, secure.Client.share, None, secure.Client.unmask][self.step]
        if self.step == 2:
            act = lambda client, message: client.mask(message, vector(client.name))  # noqa: E731
        self.waiting = {n: act(self.clients[n], message) for n, message in replies.items()}
        self.taken = {}

    @precondition(lambda self: not self.left())
    @rule(name=st.sampled_from(NAMES))
    def over(self, name: str) -> None:
        """Whatever has become of it, the round takes nothing more."""
        if self.late:
            assert not any(self.server.receive(n, message) for n, message in self.late.items())
        with pytest.raises(secure.SecureError):
            self.server.receive(name, b"hsa1?")

    def end(self, answered: list[str]) -> None:
        self.step = 4
        if len(answered) < self.session.threshold:
            with pytest.raises(secure.TooFew, match="shares of client"):
                self.server.total()
            # Nothing is lost by having asked: shares that come now make the sum.
            assert all(self.server.receive(n, message) for n, message in self.waiting.items())
            answered, self.late = answered + list(self.waiting), {}
            if len(answered) < self.session.threshold:
                return
        total, names = self.server.total()
        assert names == self.there and total.dtype == np.int64
        np.testing.assert_array_equal(total, sum(vector(name) for name in self.there))


TestRound = Round.TestCase
TestRound.settings = settings(
    deadline=None, max_examples=40, stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


@pytest.mark.parametrize("gone", [(), ("3",), ("0", "7", "11")])
def test_neighbors_on_a_circle_add_up_too(gone: tuple[str, ...]):
    session = secure.Session(
        "run", 1, tuple(map(str, range(12))), 4, threshold=4, degree=6, least=9
    )
    for name in session.names:  # who is whose neighbor is mutual, and known to all alike
        assert len(session.neighbors(name)) == 6
        assert all(name in session.neighbors(other) for other in session.neighbors(name))
    vectors = {name: vector(name, 4) for name in session.names if name not in gone}
    told: list[tuple[str, str, bytes]] = []
    total, names = secure.run(session, vectors, SITES, DIRECTORY, told=lambda *m: told.append(m))
    np.testing.assert_array_equal(total, sum(vectors.values()))
    assert names == list(vectors)
    # No plain vector is in any message.
    assert not any(v.tobytes() in message for v in vectors.values() for *_, message in told)


def test_a_client_gives_one_vector_a_round(tmp_path: Path):
    """Also after a crash: what it has noted is on disk."""
    session = secure.Session("run", 4, NAMES[:3], 1)
    path = tmp_path / "journal"
    vectors = {name: np.array([1]) for name in session.names}
    journals = {"ann": secure.Journal(path)}
    secure.run(session, vectors, SITES, DIRECTORY, journals)
    again = {"ann": secure.Journal(path)}
    with pytest.raises(secure.SecureError, match="round 4 .*was given for round 4 before"):
        secure.run(session, vectors, SITES, DIRECTORY, again)
    other = secure.Session("run", 5, NAMES[:3], 1)
    assert secure.run(other, vectors, SITES, DIRECTORY, again)[0].tolist() == [3]
    with pytest.raises(secure.SecureError, match="given for round 5 before"):
        secure.run(session, vectors, SITES, DIRECTORY, {"ann": secure.Journal(path)})


def until(step: int) -> tuple[Any, Any, Any]:
    """A round of which `step` steps are closed, with what the server has said last."""
    session = secure.Session("run", 7, NAMES, 3)
    server, parties = secure.Server(session, DIRECTORY), clients(session)
    replies: Any = dict.fromkeys(NAMES)
    for number in range(step):
        for name, client in parties.items():
            server.receive(name, act(client, number, replies[name]))
        replies = server.close()
    return server, parties, replies


def act(client: secure.Client, step: int, message: Any) -> bytes:
    if step == 0:
        return client.advertise()
    if step == 2:
        return client.mask(message, vector(client.name))
    return client.share(message) if step == 1 else client.unmask(message)


def edit(message: bytes, field: int, change: Any, server: bool = False) -> bytes:
    """A message of a client (or the server) with a field changed."""
    session = secure.Session("run", 7, NAMES, 3)
    at, parts = 37, []
    while at < len(message):
        size = int.from_bytes(message[at : at + 4], "big")
        parts.append(message[at + 4 : at + 4 + size])
        at += 4 + size
    sender = parts.pop(0).decode()
    assert (sender == "") == server
    parts[field] = change(parts[field])
    return sessions.pack(message[4:5], session, sender, parts)


flip = lambda data: bytes([data[0] ^ 1]) + data[1:]  # noqa: E731


def test_swapped_keys_are_named():
    """A server that puts in keys of its own would read all shares."""
    server, parties, _ = until(0)
    sent = {name: client.advertise() for name, client in parties.items()}
    for field in range(3):
        with pytest.raises(secure.SecureError, match="client 'bob': its keys are not signed"):
            server.receive("bob", edit(sent["bob"], field, flip))
    for name, message in sent.items():
        assert server.receive(name, message)
    keys = server.close()["ann"]
    names = [n for n in server.session.circle("ann") if n != "ann"]
    own = secure.Client(server.session, names[1], bytes(32), DIRECTORY).advertise()  # another site
    with pytest.raises(
        secure.SecureError, match=f"client '{names[1]}': its keys are not signed"
    ) as found:
        parties["ann"].share(edit(keys, 3, lambda _: own, server=True))
    assert found.value.client == names[1]
    with pytest.raises(secure.SecureError, match=f"client {names[0]!r} is there twice"):
        parties["ann"].share(edit(keys, 2, lambda _: names[0].encode(), server=True))
    with pytest.raises(secure.SecureError, match=f"client {names[1]!r}: its message names"):
        parties["ann"].share(edit(keys, 3, lambda _: sent[names[0]], server=True))
    with pytest.raises(secure.SecureError, match="client 'zoe' is no neighbor"):
        parties["ann"].share(edit(keys, 0, lambda _: b"zoe", server=True))
    assert parties["ann"].share(keys)  # and the true ones are still taken


def test_keys_of_another_round_or_twice_are_named():
    server, parties, _ = until(0)
    other = secure.Session("run", 8, NAMES, 3)
    old = secure.Client(other, "ann", SITES["ann"], DIRECTORY).advertise()
    with pytest.raises(secure.SecureError, match="client 'ann': .*another session"):
        server.receive("ann", old)
    server.receive("ann", parties["ann"].advertise())
    fresh = secure.Client(server.session, "ann", SITES["ann"], DIRECTORY).advertise()
    with pytest.raises(secure.SecureError, match="client 'ann': a second message .* differs"):
        server.receive("ann", fresh)
    zeros = lambda count: bytes(count)  # noqa: E731  # two clients with one key
    twins = [
        secure.Client(server.session, n, SITES[n], DIRECTORY, random=zeros) for n in NAMES[1:3]
    ]
    server.receive("bob", twins[0].advertise())
    with pytest.raises(secure.SecureError, match="client 'cem': its key is repeated: client 'bob'"):
        server.receive("cem", twins[1].advertise())
    with pytest.raises(secure.SecureError, match="client 'dia': its message .* is cut off"):
        server.receive("dia", parties["dia"].advertise()[:-1])
    with pytest.raises(secure.SecureError, match="client 'zoe' was not asked"):
        server.receive("zoe", old)
    with pytest.raises(secure.SecureError, match="client 'dia': .*more fields than any step"):
        server.receive("dia", parties["dia"].advertise() + bytes(4 * 23))


def test_forged_swapped_and_repeated_shares_are_named_on_the_way():
    server, parties, keys = until(1)
    sent = {name: client.share(keys[name]) for name, client in parties.items()}
    for name, message in sent.items():
        server.receive(name, message)
    shares = server.close()["ann"]
    a, b = [n for n in server.session.circle("ann") if n != "ann"][:2]
    fields = sessions.unpack(b"S", server.session, "", shares)
    give = lambda field, change: edit(shares, field, change, server=True)  # noqa: E731
    ask = lambda message: parties["ann"].mask(message, vector("ann"))  # noqa: E731
    with pytest.raises(
        secure.SecureError, match=f"'{a}': its shares for 'ann' are forged or swapp"
    ):
        ask(give(1, flip))
    with pytest.raises(
        secure.SecureError, match=f"'{a}': its shares for 'ann' are forged or swapp"
    ):
        ask(give(1, lambda _: fields[5]))
    with pytest.raises(
        secure.SecureError, match=f"client '{a}': its share for 'ann' is not the one"
    ):
        ask(give(2, flip))
    with pytest.raises(secure.SecureError, match=f"client '{a}' is there twice"):
        ask(give(4, lambda _: a.encode()))
    with pytest.raises(ValueError, match=r"vector: client 'ann': expected int64 \[3\]"):
        parties["ann"].mask(shares, np.ones(3))
    assert a != b and ask(shares)


def test_forged_shares_are_named_when_they_are_revealed():
    server, parties, requests = until(3)
    sent = {name: client.unmask(requests[name]) for name, client in parties.items()}
    owner = server.session.circle("bob")[0]
    with pytest.raises(secure.SecureError, match=f"'bob': its share of client '{owner}' is forged"):
        server.receive("bob", edit(sent["bob"], 1, flip))
    with pytest.raises(secure.SecureError, match=f"'bob': two shares of client '{owner}'"):
        server.receive("bob", edit(sent["bob"], 2, lambda _: owner.encode()))
    for name in NAMES[2:]:
        server.receive(name, sent[name])
    with pytest.raises(secure.TooFew, match="3 shares of client"):
        server.total()
    assert server.receive("bob", sent["bob"])  # the true one
    np.testing.assert_array_equal(server.total()[0], sum(map(vector, NAMES)))


def test_a_dealer_whose_shares_make_nothing_is_named(monkeypatch: pytest.MonkeyPatch):
    real = primitives.split
    server, parties, keys = until(1)
    for name, client in parties.items():
        with monkeypatch.context() as patch:
            if name == "cem":  # commits to shares of another secret
                patch.setattr(primitives, "split", lambda t, n, _: real(t, n, bytes(16)))
            server.receive(name, client.share(keys[name]))
    shares = server.close()
    for name, client in parties.items():
        if name != "dia":
            server.receive(name, client.mask(shares[name], vector(name)))
    for name, request in server.close().items():
        server.receive(name, parties[name].unmask(request))
    with pytest.raises(secure.SecureError, match="client 'cem': its shares do not make the mask"):
        server.total()


def test_no_client_says_both_things_of_another():
    """With shares of both secrets of one client, a reply that comes late could be read."""
    server, parties, requests = until(3)
    first = parties["ann"].unmask(requests["ann"])
    assert parties["ann"].unmask(requests["ann"]) == first
    at = 2 * server.session.circle("ann").index("cem") + 2
    told_otherwise = edit(requests["ann"], at, lambda _: b"\0", server=True)
    with pytest.raises(secure.SecureError, match="'ann' has answered another list"):
        parties["ann"].unmask(told_otherwise)
    me = 2 * server.session.circle("bob").index("bob") + 2
    with pytest.raises(secure.SecureError, match="'bob' itself is gone"):
        parties["bob"].unmask(edit(requests["bob"], me, lambda _: b"\0", server=True))
    with pytest.raises(secure.TooFew, match="1 clients are there"):
        parties["bob"].unmask(edit(requests["bob"], 0, lambda _: bytes([0, 0, 0, 1]), server=True))
    with pytest.raises(secure.SecureError, match="lists lack, or have for nothing, .*'zoe'"):
        parties["bob"].unmask(edit(requests["bob"], at - 1, lambda _: b"zoe", server=True))


def test_steps_out_of_order_are_refused():
    server, parties, keys = until(1)
    with pytest.raises(secure.SecureError, match="step M is out of order"):
        parties["ann"].mask(b"", vector("ann"))
    message = parties["ann"].share(keys["ann"])
    with pytest.raises(secure.SecureError, match="step S is out of order"):
        parties["ann"].share(keys["ann"])
    with pytest.raises(secure.SecureError, match="'bob': a message of kind b'M', but the step is"):
        server.receive("bob", message[:4] + b"M" + message[5:])
    with pytest.raises(secure.SecureError, match="total: step b'S' is not closed"):
        server.total()


@pytest.mark.parametrize("given, text", [
    (dict(names=("ann",)), "names: expected at least 2"),
    (dict(threshold=2), "threshold: expected more than half of 5 .*got 2"),
    (dict(threshold=6), "threshold: .*got 6"),
    (dict(degree=3), "degree: expected an even number, got 3"),
    (dict(least=1), "least: expected 2 to 5, got 1"),
    (dict(length=0), "length: expected an int >= 1, got 0"),
])  # fmt: skip
def test_sessions_out_of_range_are_refused(given: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        secure.Session(**(dict(run="run", round=0, names=NAMES, length=3) | given))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "Crypto.Protocol.SecretSharing", None)
    with pytest.raises(ImportError, match=r"pip install 'hiso-jax\[secure\]'"):
        primitives.split(2, 3, bytes(16))
