"""The server against a plain model: whatever the network and the machine do, in any order."""

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hiso_jax as hj
from hiso_jax.federation import server
from hiso_jax.ledger import snapshots
from tests.helpers import PROBLEMS, assert_same_bits, quadratic_loss

CLIENTS = ["ann", "bob", "cem", "dia", "eve"]
ALGORITHM = hj.federated_hiso(
    quadratic_loss, optax.linear_schedule(0.1, 0.0, 30), local_steps=2, num_perturbations=2
)


def fresh() -> hj.State:
    return ALGORITHM.init(PROBLEMS["quadratic"].params, jax.random.key(4))


def scalars_of(name: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, CLIENTS.index(name)])
    return rng.normal(size=(2, 2)).astype(np.float32)


class Federation(RuleBasedStateMachine):
    """The model: a list of (record or None, weights by name), and the replies of an open round."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.generation = 0
        ledger = hj.Ledger.create(self.path, ALGORITHM, fresh())
        self.server = server.Server(ALGORITHM, fresh(), ledger)
        self.past: list[tuple[np.ndarray | None, dict[str, float]]] = []
        self.asked: list[str] = []
        self.replies: dict[str, tuple[np.ndarray, float]] = {}
        self.absent = {name: fresh() for name in CLIENTS[:2]}  # clients that keep a state

    @property
    def path(self) -> Path:
        return self.folder / f"{self.generation}.sqlite"

    @precondition(lambda self: not self.asked)
    @rule(names=st.lists(st.sampled_from(CLIENTS), min_size=1, unique=True))
    def open(self, names: list[str]) -> None:
        assert self.server.open(names) == len(self.past)
        self.asked = names

    @precondition(lambda self: self.asked)
    @rule(pick=st.integers(0, 99), seed=st.integers(0, 50), weight=st.integers(1, 9))
    def reply(self, pick: int, seed: int, weight: int) -> None:
        name = self.asked[pick % len(self.asked)]
        scalars = scalars_of(name, seed)
        counted = self.server.reply(name, len(self.past), scalars, weight)
        assert counted == (name not in self.replies)  # a second one is a duplicate
        self.replies.setdefault(name, (scalars, weight))

    @precondition(lambda self: self.past)
    @rule(name=st.sampled_from(CLIENTS), back=st.integers(1, 5))
    def late_reply(self, name: str, back: int) -> None:
        assert not self.server.reply(name, max(len(self.past) - back, 0), np.ones((2, 2)))

    @rule(name=st.sampled_from(CLIENTS), ahead=st.integers(0, 2))
    def stray_reply(self, name: str, ahead: int) -> None:
        if ahead == 0 and name in self.asked:
            return
        with pytest.raises(ValueError, match="was not asked"):
            self.server.reply(name, len(self.past) + ahead, np.ones((2, 2)))

    @precondition(lambda self: self.asked)
    @rule()
    def bad_reply(self) -> None:
        left = [name for name in self.asked if name not in self.replies]
        for scalars in (np.ones((2, 3)), np.full((2, 2), np.inf)) if left else ():
            with pytest.raises(ValueError, match=f"scalars: client {left[0]!r}"):
                self.server.reply(left[0], len(self.past), scalars)

    @precondition(lambda self: self.asked)
    @rule()
    def close(self) -> None:
        self.server.close()
        record = None
        if self.replies:
            scalars, weights = zip(*self.replies.values(), strict=True)
            record = np.average(np.float64(scalars), axis=0, weights=weights)
        names = sorted(self.replies, key=self.asked.index)
        self.past.append((record, {name: self.replies[name][1] for name in names}))
        self.asked, self.replies = [], {}

    @precondition(lambda self: self.asked)
    @rule()
    def cannot_be_written(self) -> None:
        """Nothing changes, and the round can still be closed."""
        before = self.server.state
        self.server.ledger._connection.execute("PRAGMA busy_timeout = 0")
        other = sqlite3.connect(self.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(hj.LedgerWriteError, match=f"round {len(self.past)} is not recorded"):
            self.server.close()
        other.close()
        assert self.server.state is before

    @rule(at=st.integers(0, 30))
    def crash_and_reopen(self, at: int) -> None:
        """What lies on disk at this moment, SQLite's journal included, is opened again."""
        old = self.path
        self.generation += 1
        for suffix in ("", "-journal"):
            if Path(f"{old}{suffix}").exists():
                shutil.copy(f"{old}{suffix}", f"{self.path}{suffix}")
        self.server.ledger.close()
        with hj.Ledger.open(self.path, ALGORITHM) as ledger:
            older = server.catch_up(ALGORITHM, fresh(), ledger.records())
            assert int(older.round) == len(self.past)
            if at % 2:
                snapshots.save(self.folder / "snapshots", ALGORITHM, older)
        ledger = hj.Ledger.open(self.path)
        state = snapshots.restore(self.folder / "snapshots", ALGORITHM, fresh(), ledger)
        self.server = server.Server(ALGORITHM, state, ledger)
        self.asked, self.replies = [], {}  # an open round is lost, nothing else

    @rule(name=st.sampled_from(CLIENTS[:2]))
    def absent_client_catches_up(self, name: str) -> None:
        since = int(self.absent[name].round)
        records = self.server.ledger.records(since)
        assert records.nbytes == (len(self.past) - since) * (2 * 2 * 4 + 4)
        self.absent[name] = server.catch_up(ALGORITHM, self.absent[name], records)
        assert_same_bits(self.absent[name], self.server.state)

    @invariant()
    def ledger_is_the_past(self) -> None:
        if not hasattr(self, "past"):
            return
        records = self.server.ledger.records()
        assert self.server.round == len(self.past) == len(records.scalars)
        assert int(self.server.state.round) == len(self.past)
        assert records.reported == [reported for _, reported in self.past]
        for scalars, (record, _) in zip(records.scalars, self.past, strict=True):
            if record is None:
                assert np.isnan(scalars).all()
            else:
                np.testing.assert_allclose(scalars, record, rtol=1e-5, atol=1e-6)

    def teardown(self) -> None:
        if hasattr(self, "past"):
            empty = all(record is None for record, _ in self.past)
            moved = not np.array_equal(self.server.state.params["w"], fresh().params["w"])
            assert moved != empty or not self.past
            self.server.ledger.close()
            shutil.rmtree(self.folder)


TestFederation = Federation.TestCase
TestFederation.settings = settings(
    deadline=None,
    max_examples=40,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_client_that_drops_out_changes_only_weights(tmp_path: Path):
    """A round of three of whom one reports is the round of that one alone."""
    batches = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 33)), jnp.float32)
    scalars = ALGORITHM.probe(fresh(), batches)
    states: list[Any] = []
    for number, names in enumerate((["ann"], ["ann", "bob", "cem"])):
        with hj.Ledger.create(tmp_path / f"{number}", ALGORITHM, fresh()) as ledger:
            host = server.Server(ALGORITHM, fresh(), ledger)
            host.reply("ann", host.open(names), scalars[0], 3.0)
            host.close()
            states.append(host.state)
    assert_same_bits(*states)
    direct = ALGORITHM.advance(fresh(), ALGORITHM.aggregate(scalars, jnp.array([3.0, 0, 0])))
    assert_same_bits(states[0], direct)


@pytest.mark.parametrize("weight", [3e38, 1e39, 1e-46, 0, -1, float("nan"), float("inf")])
def test_weights_that_float32_would_lose_are_refused(weight: float):
    """One that drowns the others' scalars, or cannot be added up when the round is closed."""
    host = server.Server(ALGORITHM, fresh(), hj.Ledger.create(":memory:", ALGORITHM, fresh()))
    number = host.open(["ann", "bob"])
    scalars = np.ones(ALGORITHM.spec.sent, np.float32)
    with pytest.raises(ValueError, match="weight: expected a finite number"):
        host.reply("ann", number, scalars, weight)
    assert host.reply("bob", number, scalars, 2.0)
    np.testing.assert_array_equal(host.close(), scalars)


def test_a_wrong_state_is_named(tmp_path: Path):
    with hj.Ledger.create(tmp_path / "a", ALGORITHM, fresh()) as ledger:
        host = server.Server(ALGORITHM, fresh(), ledger)
        for _ in range(2):
            host.reply("ann", host.open(["ann"]), np.ones((2, 2)))
            host.close()
        other = ALGORITHM.init({"w": jnp.ones(33)}, jax.random.key(4))
        with pytest.raises(hj.LedgerMismatch, match="another base model"):
            server.Server(ALGORITHM, other, ledger)
        with pytest.raises(hj.LedgerMismatch, match="round 0: the digest is .* here"):
            server.catch_up(ALGORITHM, other, ledger.records())
        with pytest.raises(ValueError, match="state: expected round 1 to 2, got 0"):
            server.catch_up(ALGORITHM, fresh(), ledger.records(1))


def test_excluded_replies_leave_an_empty_round(tmp_path: Path):
    alg = hj.decomfl(quadratic_loss, 0.1, nonfinite="exclude")
    state = alg.init({"w": jnp.ones(33)}, jax.random.key(0))
    with hj.Ledger.create(tmp_path / "a", alg, state) as ledger:
        host = server.Server(alg, state, ledger)
        assert not host.reply("ann", host.open(["ann"]), np.full((1, 5), np.nan))
        assert np.isnan(host.close()).all()
        assert ledger.records().reported == [{}]
        assert_same_bits(host.state.params, state.params)
        with pytest.raises(RuntimeError, match="no round is open"):
            host.close()


def test_a_kill_in_the_midst_of_a_snapshot_leaves_nothing_for_ever(tmp_path: Path):
    """Of this version or an earlier one; only what is older than the snapshot goes."""
    state = fresh()._replace(round=jnp.int32(7))
    left = [".round-00000018-tdk8qsop.safetensors", ".round-00000006-part-tdk8qsop.safetensors",
            ".tmpOR2oDY", "notes.txt"]  # fmt: skip
    for name in left:
        (tmp_path / name).write_bytes(bytes(99))
        os.utime(tmp_path / name, (1e9, 1e9))
    young = tmp_path / ".tmpabcdef"
    young.write_bytes(b"")
    os.utime(young, (4e9, 4e9))
    path = snapshots.save(tmp_path, ALGORITHM, state)
    assert {*tmp_path.iterdir()} == {path, young, tmp_path / "notes.txt"}
    assert_same_bits(snapshots.read(path, ALGORITHM, fresh()), state)


def test_snapshots_are_pruned_and_never_trusted(tmp_path: Path):
    with hj.Ledger.create(tmp_path / "a", ALGORITHM, fresh()) as ledger:
        host = server.Server(ALGORITHM, fresh(), ledger)
        states = []
        for _ in range(4):
            host.reply("ann", host.open(["ann"]), np.ones((2, 2)))
            host.close()
            states.append(host.state)
            snapshots.save(tmp_path / "s", ALGORITHM, host.state)
        paths = sorted((tmp_path / "s").iterdir())
        assert [p.name for p in paths] == [f"round-0000000{n}.safetensors" for n in (3, 4)]
        restore = lambda: snapshots.restore(tmp_path / "s", ALGORITHM, fresh(), ledger)  # noqa: E731
        assert_same_bits(restore(), states[3])
        content = bytearray(paths[1].read_bytes())
        content[-5] ^= 1  # a bit of a weight
        paths[1].write_bytes(content)
        assert_same_bits(restore(), states[2])
        paths[0].write_bytes(b"garbage")
        assert_same_bits(restore(), fresh())
        assert_same_bits(server.catch_up(ALGORITHM, restore(), ledger.records()), states[3])


def test_a_snapshot_of_an_earlier_round_replaces_those_of_later_ones(tmp_path: Path):
    """They are of rounds that were lost: what is written now is kept."""
    states = [ALGORITHM.init({"w": jnp.ones(33)}, jax.random.key(4))]
    states = [states[0]._replace(round=jnp.int32(n)) for n in (3, 5, 7, 2)]
    for state in states:
        path = snapshots.save(tmp_path, ALGORITHM, state)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["round-00000002.safetensors"]
