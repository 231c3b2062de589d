"""Masked rounds between a host and sites, in this process: one ledger, and who is gone when."""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryptography", reason="needs the extra secure")
pytest.importorskip("Crypto", reason="needs the extra secure")
pytest.importorskip("dp_accounting", reason="needs the extra dp")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import hiso_jax as hj
from hiso_jax import federation, privacy, secure
from hiso_jax.federation import masked, private, wire
from tests import parties
from tests.helpers import assert_same_bits

NAMES = parties.NAMES
ALGORITHM = parties.algorithm()
TERMS = privacy.Terms(masked=True)
NOISY = privacy.Terms.of(privacy.distributed(2.0, 4.0, clients=3, least=2), epsilon=50.0)
CENTRAL = privacy.Terms.of(privacy.central(2.0, 4.0, clients=3), epsilon=50.0)


def certified(
    name: str, issuer: Any = None, days: int = 9, small: bool = True
) -> tuple[bytes, bytes, Any]:
    """Private key and certificate, PEM, and what signs for those after it."""
    kind: Any = (
        ec.generate_private_key(ec.SECP256R1()) if small else rsa.generate_private_key(65537, 2048)
    )
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    by, signer = (subject, kind) if issuer is None else issuer
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(by, subject, kind.public_key(), x509.random_serial_number(),
                                   now - datetime.timedelta(10), now + datetime.timedelta(days))  # fmt: skip
    plain, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    key = kind.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    return key, made.sign(signer, hashes.SHA256()).public_bytes(pem), (subject, kind)


_, AUTHORITY, ISSUER = certified("authority")
KITS = {name: certified(name, ISSUER)[:2] for name in NAMES}


def masks(name: str, terms: privacy.Terms, journal: Any = None, kit: Any = None) -> masked.Masks:
    journal = secure.Journal(journal)
    identity = secure.Identity(*(KITS[name] if kit is None else kit))
    return masked.Masks(terms, name, identity, AUTHORITY, journal, name.encode().ljust(32, b"!"))


class Net:
    """A masked host and its sites; `lost` says of which name and which step nothing arrives."""

    def __init__(self, terms: privacy.Terms = TERMS, folder: Path | None = None, **options: Any):
        self.terms = terms
        self.sites = {name: self.site(name, folder) for name in NAMES}
        self.lost: Callable[[str, bytes], bool] = lambda name, step: False
        ledger = hj.Ledger.create(
            ":memory:", ALGORITHM, parties.begin(ALGORITHM), None, terms.config
        )
        self.server = private.PrivateServer(
            ALGORITHM, parties.begin(ALGORITHM), ledger, directory={}
        )
        given: Any = dict(patience=0.05) | options
        self.host = masked.MaskedHost(self.server, self.send, AUTHORITY, **given)
        self.seen: list[tuple[str, bytes]] = []

    def site(self, name: str, folder: Path | None = None, **given: Any) -> Any:
        journal = None if folder is None else folder / name
        return parties.site(name, ALGORITHM, promised=masks(name, self.terms, journal, **given))

    def send(self, name: str, message: bytes) -> None:
        parsed = wire.parse(message, self.host.run, (1, 2), (1, 2))
        step = parsed.parts[0] if isinstance(parsed, wire.Step) else b"A"
        if not self.lost(name, step):
            answer = self.sites[name].answer(message)
            assert self.sites[name].answer(message) == answer  # asked again, it says the same
            self.seen.append((name, answer))
            self.host.receive(name, answer)

    def round(self, names: list[str] = NAMES, **options: Any) -> Any:
        return self.host.conduct(names, 0.05, **options)


@pytest.mark.parametrize("terms", [TERMS, NOISY], ids=["exact", "noise"])
def test_masked_sites_and_a_simulation_write_one_ledger(terms: privacy.Terms):
    """Byte for byte: records, digests, rates, who reported, what was released, and the header."""
    rounds, dropout = 6, 0.2
    begin = lambda: parties.begin(ALGORITHM)  # noqa: E731
    simulated = hj.Ledger.create(":memory:", ALGORITHM, begin(), None, terms.config)
    summed = private.Simulated(terms, bytes(range(32)), "run")
    own = lambda name: privacy.of_run(name.encode().ljust(32, b"!"), net.host.run.hex())  # noqa: E731
    summed._own = lambda purpose, name: own(name)  # as the sites have it
    net, few = Net(terms), 0
    for number, report in enumerate(federation.run(
        ALGORITHM, begin(), parties.everybody(), rounds=rounds, clients_per_round=3,
        batch_size=parties.BATCH, dropout=dropout, prepare=parties.one, summed=summed,
    )):  # fmt: skip
        simulated.append(report.metrics.record, hj.digest(report.state), None, report.reported,
                         report.event)  # fmt: skip
        names = federation.draw(NAMES, 3, number)
        away = dict(zip(names, federation.participation(3, number, 0, dropout), strict=True))
        net.lost = lambda name, step, away=away: not away[name]
        closed = net.round(names)
        assert closed.faults == {} and set(closed.silent) == {n for n, w in away.items() if not w}
        few += not closed.reported
    ours, theirs = net.server.ledger.records(), simulated.records()
    assert 0 < few < rounds
    assert ours.scalars.tobytes() == theirs.scalars.tobytes()
    assert (ours.digests, ours.reported) == (theirs.digests, theirs.reported)
    assert net.server.ledger.events() == simulated.events()
    assert net.server.ledger.header == simulated.header
    net.lost = lambda name, step: False
    assert net.host.end(NAMES, 5) == NAMES
    for own in net.sites.values():
        assert_same_bits(own.state, net.server.state)
    kinds = {type(wire.parse(m, net.host.run, (1, 2), (1, 2))) for _, m in net.seen}
    assert kinds <= {wire.Reply, wire.Step, wire.Behind}
    assert all(len(m) < 40 or b"hsa1" in m for _, m in net.seen)  # nobody's scalars


def test_a_trusted_server_adds_noise_to_what_sites_send():
    """The same ledger as a simulation with its secret; a site that promises nothing is named."""
    begin = lambda: parties.begin(ALGORITHM)  # noqa: E731
    secret = bytes(range(32))
    ledgers = [hj.Ledger.create(":memory:", ALGORITHM, begin(), None, CENTRAL.config) for _ in "ab"]
    server = private.PrivateServer(ALGORITHM, begin(), ledgers[0], secret=secret)
    sites = {name: parties.site(name, ALGORITHM, promised=CENTRAL) for name in NAMES}
    send = lambda name, message: host.receive(name, sites[name].answer(message))  # noqa: E731
    host = federation.Host(server, send)
    summed = private.Simulated(CENTRAL, privacy.of_run(secret, private.run_name(ledgers[0])), "run")
    for number, report in enumerate(federation.run(
        ALGORITHM, begin(), parties.everybody(), rounds=3, clients_per_round=3,
        batch_size=parties.BATCH, prepare=parties.one, summed=summed,
    )):  # fmt: skip
        ledgers[1].append(report.metrics.record, hj.digest(report.state), None, report.reported,
                          report.event)  # fmt: skip
        assert host.conduct(federation.draw(NAMES, 3, number), 5.0).faults == {}
    ours, theirs = (ledger.records() for ledger in ledgers)
    assert ours.scalars.tobytes() == theirs.scalars.tobytes()
    assert (ours.digests, ours.reported) == (theirs.digests, theirs.reported)
    assert ledgers[0].events() == ledgers[1].events() == [CENTRAL.mechanism.event] * 3
    sites["site-2"] = parties.site("site-2", ALGORITHM)
    closed = host.conduct(NAMES, 5.0)
    assert "something else is promised of privacy" in closed.faults["site-2"]
    with pytest.raises(ValueError, match="promised: replies are masked"):
        parties.site("site-2", ALGORITHM, promised=TERMS)


@pytest.mark.parametrize("threshold, degree", [(0, masked.NEIGHBORS), (2, None)])
def test_with_a_threshold_each_site_has_all_others_for_neighbors(
    threshold: int, degree: int | None
):
    """It is of all who answer, however many they are; without one, a site has so many neighbors."""
    net, given = Net(threshold=threshold), []
    mask = net.server.mask

    def spy(few: int, many: int | None, *names: Any, **options: Any) -> Any:
        given.append((few, many))
        return mask(few, many, *names, **options)

    net.server.mask = spy
    assert len(net.round().reported) == 3 and given == [(threshold, degree)]


@pytest.mark.parametrize("step, left, silent", [
    (b"A", 2, ["site-2"]), (b"B", 2, ["site-2"]), (b"K", 2, ["site-2"]), (b"S", 2, ["site-2"]),
    (b"M", 3, []),  # its vector had come
])  # fmt: skip
def test_a_site_that_is_gone_at_any_step_is_out_of_the_sum(
    step: bytes, left: int, silent: list[str]
):
    """Two of three are enough here; with one the round is void, and the next one goes on."""
    net = Net(NOISY, threshold=2)
    net.lost = lambda name, own: name == "site-2" and own == step
    closed = net.round()
    assert len(closed.reported) == left and np.isfinite(closed.record).all()
    assert closed.silent == silent and closed.faults == {}
    net.lost = lambda name, own: name != "site-1" and own == step
    closed = net.round()
    enough = step == b"M"  # two have dealt shares of all, and one reveals its own: too few
    assert (
        closed.reported == {} and np.isnan(closed.record).all() and not (enough and closed.faults)
    )
    net.lost = lambda name, own: False
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
    # After the last step's question the server may have the sum, whatever it says it has.
    assert [event is None for event in net.server.ledger.events()] == [False, not enough, False]
    assert net.server.ledger.records().reported[1] == (dict.fromkeys(NAMES, 1.0) if enough else {})


def test_a_vector_is_given_once_also_by_a_process_that_has_begun_again(tmp_path: Path):
    """The server lost the round it was in: who has given a vector for it gives no other one."""
    net = Net(folder=tmp_path)
    net.lost = lambda name, step: step == b"M"
    assert net.round().reported == {}
    again = Net(folder=tmp_path)
    closed = again.round()
    assert closed.reported == {} and set(closed.faults) == set(NAMES)
    assert all(why.startswith("SecureError on its machine") for why in closed.faults.values())
    assert again.round().reported == dict.fromkeys(NAMES, 1.0)


def test_of_fewer_than_a_round_needs_nothing_is_revealed():
    net, seen = Net(NOISY, threshold=2), set[bytes]()

    def lost(name: str, step: bytes) -> bool:
        seen.add(step)
        return name == "site-3"

    net.lost = lost
    closed = net.round(minimum=3)
    assert closed.reported == {} and np.isnan(closed.record).all()
    assert b"M" not in seen and net.server.ledger.events() == [None]
    assert net.round(minimum=2).reported == dict.fromkeys(NAMES[:2], 1.0) and b"M" in seen


def test_the_server_s_name_for_a_run_opens_no_other_journal(tmp_path: Path):
    """Two sums of one round that differ in one site would be that site's scalars."""
    net = Net(NOISY, threshold=2)
    net.round()
    own = net.sites["site-1"]
    for name in ("another", own.run.hex() + "\n9 x", 7):
        about = json.dumps(dict(run=name, names=NAMES, threshold=2, degree=None, least=2))
        own._masks.keep(0, np.zeros((1, 2)))
        with pytest.raises(secure.SecureError, match="run: expected '"):
            own._masks.answer(wire.Step(0, (masked.BEGIN, about.encode())))
    journal = secure.Journal(tmp_path / "journal")
    for name in ("x\ny", "x\u2028y", ""):
        with pytest.raises(secure.SecureError, match="run: expected one line"):
            journal.take(name, 0)
    journal.take("a run", 3)
    secure.Journal(tmp_path / "journal").take("a run", 4)
    (tmp_path / "journal").write_text("4 a run\ny\n")
    with pytest.raises(ValueError, match="is no journal"):
        secure.Journal(tmp_path / "journal")


def test_a_run_that_stops_records_what_may_have_been_revealed():
    """Between the last question and the record: the round is closed, not left to nobody."""
    net = Net(NOISY, threshold=2)
    net.lost = lambda name, step: step == b"M"
    session = lambda: net.server.masked  # noqa: E731
    closed = net.round(stop=lambda: session() is not None and session().step == b"R")
    assert closed is not None and np.isnan(closed.record).all()
    assert net.server.ledger.records().reported == [dict.fromkeys(NAMES, 1.0)]
    assert net.server.ledger.events() == [NOISY.mechanism.event]


OTHERS = certified("other authority")
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "another authority": (lambda: certified("site-2", OTHERS[2])[:2], "is not of this authority"),
    "another's certificate": (lambda: KITS["site-3"], "its certificate is that of 'site-3'"),
    "a key that is not the certificate's": (lambda: (certified("x")[0], KITS["site-2"][1]),
                                            r"is not of this authority \(InvalidSignature\)"),
    "over": (lambda: certified("site-2", ISSUER, -2)[:2], "its certificate was valid from"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_site_without_a_certificate_of_the_authority_does_not_count(what: str):
    make, text = WRONG[what]
    net = Net(NOISY, threshold=2)
    net.sites["site-2"] = net.site("site-2", kit=make())
    closed = net.round()
    assert list(closed.faults) == ["site-2"] and re.search(text, closed.faults["site-2"])
    assert closed.reported == {"site-1": 1.0, "site-3": 1.0}


def test_a_server_that_puts_its_own_keys_in_the_place_of_a_sites_is_refused():
    """It has an authority of its own; the sites have theirs, and give nothing."""
    net = Net(NOISY, threshold=2)
    own = secure.Identity(*certified("site-2", OTHERS[2])[:2])
    shown = net.host._shown
    net.host._shown = lambda kind, name: [
        own.credential if before == b"site-2" else part
        for before, part in zip([b"", *shown(kind, name)], shown(kind, name), strict=False)
    ]  # fmt: skip
    closed = net.round()
    assert closed.reported == {} and set(closed.faults) == {"site-1", "site-3"}


def test_keys_of_the_kinds_that_startup_kits_have():
    for small in (True, False):
        key, certificate, _ = certified("ann", ISSUER, small=small)
        identity = secure.Identity(key, certificate)
        assert secure.Identity(key, certificate).key == identity.key
        public = secure.holder(identity.credential, "ann", AUTHORITY)
        assert public == secure.site_public(identity.key)
        for i in (0, 40, len(identity.credential) - 5):
            wrong = bytearray(identity.credential)
            wrong[i] ^= 1
            with pytest.raises(secure.SecureError, match="client 'ann': its certificate"):
                secure.holder(bytes(wrong), "ann", AUTHORITY)


def test_a_step_that_comes_a_round_late_changes_nothing():
    net = Net(NOISY, threshold=2)
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
    old = [message for name, message in net.seen if name == "site-2" and b"hsa1" in message]
    own = net.sites["site-2"]

    class Late:
        def answer(self, message: bytes) -> bytes:
            if old:
                net.host.receive("site-2", old.pop())
            return own.answer(message)

    net.sites["site-2"] = Late()
    closed = net.round()
    assert closed.reported == dict.fromkeys(NAMES, 1.0) and closed.faults == {} and not old
    assert net.host.counts["site-2"].late >= 4


def test_what_does_not_fit_is_named():
    plain = parties.site("site-2", ALGORITHM)
    net = Net(NOISY, threshold=2)
    net.sites["site-2"] = plain
    closed = net.round()
    assert "something else is promised of privacy" in closed.faults["site-2"]
    net.sites["site-2"] = net.site("site-2")
    little = dataclasses.replace(NOISY, mechanism=dataclasses.replace(NOISY.mechanism, least=3))
    asked = masks("site-1", little)
    asked.keep(0, np.zeros((1, 2)))
    about = (
        b'{"run": "", "names": ["site-1", "site-2"], "threshold": 2, "degree": null, "least": 2}'
    )
    with pytest.raises(secure.SecureError, match="least: 2 clients would have less noise"):
        asked.answer(wire.Step(0, (masked.BEGIN, about)))
    with pytest.raises(secure.SecureError, match="round 1: nothing was measured"):
        asked.answer(wire.Step(1, (masked.BEGIN, about)))
    with pytest.raises(secure.SecureError, match="round 0: no session has begun"):
        asked.answer(wire.Step(0, (b"K", b"")))
    open_server = functools.partial(
        hj.Ledger.create, ":memory:", ALGORITHM, parties.begin(ALGORITHM)
    )
    with pytest.raises(ValueError, match="server: expected one of masked replies"):
        ledger = open_server(None, privacy.Terms().config)
        own = private.PrivateServer(ALGORITHM, parties.begin(ALGORITHM), ledger)
        masked.MaskedHost(own, net.send, AUTHORITY)


def test_the_budget_ends_the_rounds_before_anybody_is_asked():
    net = Net(dataclasses.replace(NOISY, epsilon=2.0))
    with pytest.raises(privacy.BudgetSpent, match="the budget is 2"):
        for _ in range(30):
            net.round()
    rounds = net.server.round
    assert rounds > 1 and net.host._asked == {}
    assert net.server.accountant.epsilon() == privacy.epsilon_of({(4.0, 1.0): rounds}, 1e-5) <= 2
    assert net.host.end(NAMES, 5) == NAMES
