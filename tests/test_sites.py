"""Host and sites without a network, or with one that loses, repeats and delays, in this process."""

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.federation import wire
from hiso_jax.ledger import snapshots
from tests import parties
from tests.helpers import assert_same_bits
from tests.parties import NAMES

ALGORITHM = parties.algorithm()
PROBE = jax.jit(ALGORITHM.probe, static_argnums=2, compiler_options=hj.compiler_options())
RECORD = 2 * 4  # bytes of K x P scalars


class Net:
    """A host and its sites; `lost` says which messages never arrive."""

    def __init__(self, sites: dict[str, Any], ledger: Any = None, alg: hj.Algorithm = ALGORITHM):
        self.sites, self.alg = sites, alg
        self.lost: Callable[[str, str], bool] = lambda way, name: False
        self.begin(
            hj.Ledger.create(":memory:", alg, parties.begin(alg)) if ledger is None else ledger
        )

    def begin(self, ledger: hj.Ledger) -> None:
        """The server's process, begun again."""
        self.server = federation.Server(self.alg, parties.begin(self.alg), ledger)
        self.host = federation.Host(self.server, self.send)

    def send(self, name: str, message: bytes) -> None:
        if not self.lost("down", name):
            answer = self.sites[name].answer(message)
            if not self.lost("up", name):
                self.host.receive(name, answer)

    def round(self, names: list[str] = NAMES, deadline: float = 0.2, **options: Any) -> Any:
        return self.host.conduct(names, deadline, **options)


def sites(
    folder: Path | None = None, alg: hj.Algorithm = ALGORITHM, **options: Any
) -> dict[str, Any]:
    own = lambda name: None if folder is None else folder / name  # noqa: E731
    return {name: parties.site(name, alg, own(name), **options) for name in NAMES}


@pytest.mark.parametrize("options", [
    dict(per_client_directions=2),
    *[pytest.param(own, marks=[pytest.mark.slow, pytest.mark.ci]) for own in ({}, dict(local_steps=2))],
])  # fmt: skip
def test_sites_and_a_simulation_write_one_ledger(options: dict[str, Any]):
    """Records, digests, rates and who reported; two of three take part, some do not answer."""
    alg = parties.algorithm(**options)
    steps, rounds, dropout = alg.spec.steps, 8, 0.3
    simulated = hj.Ledger.create(":memory:", alg, parties.begin(alg))
    reports = federation.run(
        alg, parties.begin(alg), parties.everybody(), rounds=rounds, clients_per_round=2,
        batch_size=parties.BATCH, local_steps=steps, dropout=dropout,
        prepare=parties.one,
    )  # fmt: skip
    net = Net(sites(alg=alg), alg=alg)
    for number, report in enumerate(reports):
        simulated.append(report.metrics.record, hj.digest(report.state), None, report.reported)
        names = federation.draw(NAMES, 2, number)
        away = dict(zip(names, federation.participation(2, number, 0, dropout), strict=True))
        net.lost = lambda way, name, away=away: not away[name]
        closed = net.round(names, deadline=0.01)
        assert closed.faults == {} and set(closed.silent) == {n for n, w in away.items() if not w}
    ours, theirs = net.server.ledger.records(), simulated.records()
    assert any(not reported for reported in ours.reported) or dropout < 1
    assert ours.scalars.tobytes() == theirs.scalars.tobytes()
    assert (ours.digests, ours.reported) == (theirs.digests, theirs.reported)
    assert net.server.ledger.header == simulated.header
    net.lost = lambda way, name: False
    assert net.host.end(NAMES, 5) == NAMES
    for own in net.sites.values():
        assert_same_bits(own.state, net.server.state)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=6)
def test_whatever_is_lost_and_killed(seed: int, tmp_path_factory: pytest.TempPathFactory):
    """No round is lost, all end with the ledger's digest, and its records are those of who answered."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("net")
    path = folder / "ledger.sqlite"
    net = Net(sites(folder), hj.Ledger.create(path, ALGORITHM, parties.begin(ALGORITHM)))
    net.lost = lambda way, name: bool(rng.random() < 0.2)
    for number in range(9):
        if rng.random() < 0.3:  # killed: what is on disk remains
            name = NAMES[rng.integers(3)]
            net.sites[name] = parties.site(name, ALGORITHM, folder / name)
        if rng.random() < 0.3:
            net.server.ledger.close()
            net.begin(hj.Ledger.open(path))
        before = net.server.state
        closed = net.round(deadline=0.005)
        assert closed.round == number and closed.faults == {}
        weights = jnp.array([closed.reported.get(name, 0.0) for name in NAMES])
        assert sorted([*closed.reported, *closed.silent]) == NAMES
        if closed.reported:
            scalars = [PROBE(before, parties.batches_of(name)(number), 0)[0] for name in NAMES]
            record = ALGORITHM.aggregate(jnp.stack(scalars), weights)
            assert np.asarray(record).tobytes() == closed.record.tobytes()
        else:
            assert np.isnan(closed.record).all()
    net.lost = lambda way, name: False
    assert net.host.end(NAMES, 5) == NAMES
    assert net.server.round == 9
    for own in net.sites.values():
        assert_same_bits(own.state, net.server.state)


def test_bytes_are_those_of_the_formula():
    """What `Traffic` accounts in a simulation, and 8 bytes of digest with every reply."""
    net, alone = Net(sites()), [NAMES[:1]] * 2 + [NAMES[1:2]] * 3 + [NAMES]
    traffic = federation.Traffic((1, 2))
    for number, names in enumerate(alone):
        net.round(names)
        traffic.ask(names, number)
    for name in NAMES:
        count = net.host.counts[name]
        asked = sum(name in names for names in alone)
        assert count.payload_down == traffic.down[name] - 8 - 4 * asked  # of key and number
        assert count.payload_up == traffic.up[name] + 8 * asked == (RECORD + 8) * asked
        # Around it, a message has 16 bytes up and 35 down; who is late says so, and is asked again.
        again = name != "site-1"
        assert count.up == count.payload_up + 16 * asked + 28 * again
        assert count.down == count.payload_down + 35 * (asked + again)


def test_who_was_away_comes_back_by_the_shorter_way(tmp_path: Path):
    net = Net(sites(tmp_path))
    for _ in range(4):
        net.round(NAMES[:2])
    net.round()
    assert net.host.counts["site-3"].payload_down == 4 * RECORD
    room = snapshots.size(ALGORITHM, net.server.state)
    assert room == 33 * 4 + 33 * 4  # weights and curvature
    for _ in range(room // RECORD + 2):
        net.round(NAMES[:2])
    before = net.host.counts["site-3"].payload_down
    closed = net.round()
    assert closed.reported == dict.fromkeys(NAMES, 1.0)
    assert room < net.host.counts["site-3"].payload_down - before < room + 300
    assert_same_bits(net.sites["site-3"].state.params, net.sites["site-1"].state.params)
    # One that comes anew begins by a snapshot too, or at its own on disk.
    net.sites["site-3"] = parties.site("site-3", ALGORITHM)
    net.sites["site-1"] = parties.site("site-1", ALGORITHM, tmp_path / "site-1")
    assert net.sites["site-1"].round > 30
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)


def test_rounds_close_with_who_answered():
    net = Net(sites())
    net.lost = lambda way, name: name == "site-2"
    assert net.round().reported == {"site-1": 1.0, "site-3": 1.0}
    closed = net.round(minimum=3)
    assert closed.reported == {} and np.isnan(closed.record).all() and closed.silent == ["site-2"]
    assert net.round(deadline=600, grace=0.0, minimum=2).seconds < 60
    net.lost = lambda way, name: True
    assert net.round().reported == {}
    before = net.server.state
    late = parties.site("site-2", ALGORITHM)
    net.host.receive("site-2", wire.pack(wire.Reply(0, late.digest, np.ones((1, 2))), late.run))
    net.host.receive("nobody", b"hj")
    net.host.receive("site-1", wire.pack(wire.Failed(3, "ValueError"), late.run), late=True)
    assert net.host.counts["site-2"].late == 1 and net.server.round == 4
    net.lost = lambda way, name: False
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
    assert_same_bits(before.key, net.server.state.key)
    assert [len(r) for r in net.server.ledger.records().reported] == [2, 0, 2, 0, 3]


def test_a_round_that_is_stopped_stays_open_and_arguments_are_checked(tmp_path: Path):
    net = Net(sites())
    for options, text in (
        (dict(deadline=0), "deadline: expected"),
        (dict(minimum=0), "minimum: expected"),
        (dict(grace=-1), "grace: expected"),
        (dict(names=[]), "names: expected at least one"),
    ):
        with pytest.raises(ValueError, match=text):
            net.round(**options)
    net.lost = lambda way, name: True
    assert net.round(deadline=60, stop=lambda: True) is None
    with pytest.raises(RuntimeError, match="round 0 is open"):
        net.round()
    assert net.server.ledger.rounds == 0
    compact = hj.Ledger.create(":memory:", ALGORITHM, parties.begin(ALGORITHM))
    later = ALGORITHM.advance(parties.begin(ALGORITHM), jnp.ones((1, 2)))
    compact.append(np.ones((1, 2)), hj.digest(later))
    compact.append(np.ones((1, 2)), hj.digest(ALGORITHM.advance(later, jnp.ones((1, 2)))))
    compact.export(tmp_path / "run.safetensors")  # with the last digest only
    with pytest.raises(ValueError, match="rounds without a digest"):
        Net(sites(), hj.Ledger.import_(tmp_path / "run.safetensors"))
    compact = hj.Ledger.create(":memory:", ALGORITHM, parties.begin(ALGORITHM))
    compact.append(np.ones((1, 2)), hj.digest(later))
    with pytest.raises(ValueError, match="base: needed"):
        federation.Host(federation.Server(ALGORITHM, later, compact), net.send)


def other_base() -> Any:
    params = {"w": jnp.arange(33.0) / 10 + jnp.eye(33)[7] * 1e-6}
    return parties.site("site-2", ALGORITHM, begin=lambda: parties.begin(ALGORITHM, params))


def other_algorithm() -> Any:
    return parties.site("site-2", parties.algorithm(smoothing=2e-3))


def other_version() -> Any:
    own = parties.site("site-2", ALGORITHM)
    own.header["software"]["hiso-jax"] = "0.0.9"
    own.run = wire.identity(own.header)
    return own


def other_data() -> Any:
    return parties.site("site-2", ALGORITHM, batches=lambda round: np.full((1, 1, 33), np.nan))


def no_data() -> Any:
    def batches(round: int) -> Any:
        raise FileNotFoundError("/home/ann/patients.csv")

    return parties.site("site-2", ALGORITHM, batches=batches)


class Forger:
    """Sends what no site sends."""

    def __init__(self, content: Any):
        self.content = content

    def answer(self, message: bytes) -> Any:
        return self.content


class Huge:
    """Its scalars are finite, and their sum with others' is not."""

    def __init__(self, name: str):
        self.real = parties.site(name, ALGORITHM)

    def answer(self, message: bytes) -> bytes:
        said = wire.parse(self.real.answer(message), self.real.run, (1, 2), (1, 2))
        if isinstance(said, wire.Reply):
            said = said._replace(scalars=np.full((1, 2), 3.4e38, np.float32))
        return wire.pack(said, self.real.run)


RUN = parties.site("site-2", ALGORITHM).run
FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "another base": (other_base, "another base model: its digest is .* leaves with other values: w"),
    "another algorithm": (other_algorithm, "smoothing is 0.001 there and 0.002 here"),
    "another version": (other_version, r"another version of hiso-jax: [\d.]+ there, 0\.0\.9 here"),
    "NaN": (other_data, "scalars: client 'site-2': expected finite ones of at most 1e"),
    "no data": (no_data, "^FileNotFoundError on its machine, whose log says more$"),
    "10 MB": (lambda: Forger(wire.pack(wire.Reply(0, np.zeros(2), np.zeros(2_500_000)), RUN)),
              "expected 16 bytes after its head, got 10000008"),
    "10 MB of header": (lambda: Forger(b"hj\2\4" + RUN + bytes(4 + 10**7)), "at most 1048576 bytes"),
    "a bomb": (lambda: Forger(b"hj\2\4" + RUN + bytes(4) + zlib.compress(bytes(10**8))), "no header"),
    "no bytes": (lambda: Forger("reply"), "expected at least 16 bytes, got <class 'str'>"),
    "nothing": (lambda: Forger(b""), "expected at least 16 bytes, got 0 bytes"),
    "another state": (lambda: Forger(wire.pack(wire.Reply(0, np.zeros(2), np.zeros((1, 2))), RUN)),
                      "measured at another state: after 0 rounds its digest is 0{16} there"),
    "of the future": (lambda: Forger(wire.pack(wire.Reply(9, np.zeros(2), np.zeros((1, 2))), RUN)),
                      "a reply to round 9, which is to come"),
    "an ask": (lambda: Forger(wire.pack(wire.Ask(0, np.zeros(2), 0, np.zeros((0, 1, 2))), RUN)),
               "Ask is nothing that a client sends"),
    "another protocol": (lambda: Forger(b"hj\1\1" + RUN + bytes(4)),
                         "expected version 2 of the messages, got 1"),
    "no header": (lambda: Forger(wire.pack(wire.Other(0, {"algorithm": 3}), b"12345678")),
                  "what it says of itself is no header"),
    "software as a text": (lambda: Forger(wire.pack(wire.Other(
        0, parties.site("site-2", ALGORITHM).header | {"software": "none"}), RUN)), "no header"),
    "leaves named by numbers": (lambda: Forger(wire.pack(wire.Other(
        0, parties.site("site-2", ALGORITHM).header | {"leaves": [[1, "float32", [3], True]]}), RUN)),
        "other leaves: only there w, only here 1"),
    "too large": (lambda: Huge("site-2"), "expected finite ones of at most 1e"),
    "a wild header": (lambda: Forger(wire.pack(wire.Other(0, dict.fromkeys(
        ("algorithm", "key", "base", "leaves", "software"), 7)), RUN)), "no header"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_does_not_fit_is_named_and_does_not_count(fault: str):
    make, text = FAULTS[fault]
    good, net = sites(), Net(sites())
    net.sites["site-2"] = make()
    closed = net.round()
    assert list(closed.faults) == ["site-2"] and closed.silent == []
    assert re.search(text, closed.faults["site-2"]), closed.faults
    assert "patients" not in str(closed.faults)
    assert closed.reported == {"site-1": 1.0, "site-3": 1.0}
    net.sites["site-2"] = good["site-2"]  # put right
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)


def test_a_state_that_goes_apart_is_named_with_its_round_and_comes_back(tmp_path: Path):
    """A bit of one weight flips in memory: found in the next round, healed in the one after."""
    net = Net(sites(tmp_path))
    for _ in range(4):
        net.round()
    state = net.sites["site-2"].state
    # None of the last bits, which the next step's rounding may take away again.
    bits = jax.lax.bitcast_convert_type(state.params["w"], jnp.uint32).at[5].add(1 << 12)
    flipped = jax.lax.bitcast_convert_type(bits, jnp.float32)
    net.sites["site-2"].state = state._replace(params={"w": flipped})
    closed = net.round()
    assert closed.reported == {"site-1": 1.0, "site-3": 1.0}
    assert (
        "its state went apart in round 3: the digest after 4 rounds is" in closed.faults["site-2"]
    )
    assert net.server.ledger.digest(3) in closed.faults["site-2"]
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
    assert_same_bits(net.sites["site-2"].state, net.sites["site-1"].state)


def test_an_edited_snapshot_is_named_and_replaced(tmp_path: Path):
    net = Net(sites(tmp_path))
    for _ in range(5):
        net.round()
    (path,) = (tmp_path / "site-2").rglob("round-00000003.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    net.sites["site-2"] = parties.site("site-2", ALGORITHM, tmp_path / "site-2")
    closed = net.round()
    assert (
        "the model that it begins with is not the run's: after 3 rounds" in closed.faults["site-2"]
    )
    assert closed.reported == {"site-1": 1.0, "site-3": 1.0}
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)
    assert path.read_bytes() == whole  # written anew on the way from the base
    path.write_bytes(b"garbage")  # no snapshot at all: nothing is wrong with beginning at the base
    net.sites["site-2"] = parties.site("site-2", ALGORITHM, tmp_path / "site-2")
    assert net.sites["site-2"].round == 6
    for old in (tmp_path / "site-2").rglob("*.safetensors"):
        old.write_bytes(b"garbage")
    net.sites["site-2"] = parties.site("site-2", ALGORITHM, tmp_path / "site-2")
    assert net.sites["site-2"].round == 0
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)


def test_a_ledger_from_before_is_noticed(tmp_path: Path):
    """An old copy of the ledger: sites that have gone further are named, and go back with it."""
    net = Net(sites())
    for _ in range(3):
        net.round()
    old = hj.Ledger.create(":memory:", ALGORITHM, parties.begin(ALGORITHM))
    net.begin(old)
    closed = net.round()
    assert closed.reported == {} and "it has gone through 2 rounds" in closed.faults["site-1"]
    assert net.round().reported == dict.fromkeys(NAMES, 1.0)


def test_what_always_goes_apart_is_not_sent_back_for_ever():
    net = Net(sites())
    begun = []
    params = {"w": jnp.arange(33.0) / 10}
    own = parties.site(
        "site-2", ALGORITHM, begin=lambda: begun.append(0) or parties.begin(ALGORITHM, params)
    )
    real = own._advance
    own._advance = lambda state, *rest: real(
        state._replace(params={"w": state.params["w"] + 1}), *rest
    )
    net.sites["site-2"] = own
    for number in range(8):
        closed = net.round()
        if number:
            assert "went apart in round 0: the digest after 1 rounds" in closed.faults["site-2"]
    assert len(begun) == 1 + federation.standing.RESETS


def test_a_site_refuses_what_no_server_sends():
    own = parties.site("site-1", ALGORITHM)
    for content in (b"", b"hj\2\1" + own.run + bytes(12), b"hj\2\0" + own.run + bytes(4),
                    b"hj\1\0" + own.run + bytes(40), b"no message of hiso_jax at all"):  # fmt: skip
        with pytest.raises(wire.WireError):
            own.answer(content)
    assert own.round == 0
    with pytest.raises(ValueError, match="snapshot_every"):
        parties.site("site-1", ALGORITHM, snapshot_every=0)
    ask = wire.Ask(3, np.zeros(2), 3, np.zeros((0, 1, 2)), snapshot=b"garbage")
    answer = wire.parse(own.answer(wire.pack(ask, own.run)), own.run, (1, 2), (1, 2))
    assert answer == wire.Failed(3, "ValueError") and own.round == 0
