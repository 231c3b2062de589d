"""The ledger on real disks: what goes in comes out, and nothing else ever does."""

import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax as hj
from hiso_jax import aggregators, rules
from hiso_jax.ledger import compact, digests
from hiso_jax.ledger.store import Records
from tests.helpers import assert_same_bits, odd_loss, odd_tree, quadratic_loss


def make(rounds: int = 20, **options: Any) -> hj.Algorithm:
    options = dict(local_steps=2, num_perturbations=3) | options
    return hj.federated_hiso(quadratic_loss, optax.linear_schedule(0.1, 0, rounds), **options)


def start(alg: hj.Algorithm, seed: int = 0, value: float = 0.0) -> hj.State:
    return alg.init({"w": jnp.full(5, value)}, jax.random.key(seed))


def record_of(round: int, shape: tuple[int, int] = (2, 3)) -> np.ndarray:
    if round % 7 == 5:  # nobody answered
        return np.full(shape, np.nan, np.float32)
    return np.random.default_rng(round).normal(size=shape).astype(np.float32)


def fill(ledger: hj.Ledger, alg: hj.Algorithm, state: hj.State, rounds: int) -> hj.State:
    advance = jax.jit(alg.advance)
    for round in range(rounds):
        record, rate = record_of(round), alg.learning_rate(state.round)
        state = advance(state, record, rate)
        ledger.append(record, hj.digest(state), rate, {"ann": 1.0, "bob": round / 2})
    return state


def same(first: Records, second: Records) -> bool:
    return (
        first.scalars.tobytes() == second.scalars.tobytes()
        and np.array_equal(np.asarray(first.learning_rates), np.asarray(second.learning_rates))
        and (first.first, first.digests, first.reported)
        == (second.first, second.digests, second.reported)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> dict[str, Any]:
    path, alg = tmp_path_factory.mktemp("ledger") / "ledger.sqlite", make()
    with hj.Ledger.create(path, alg, start(alg), about={"task": "test"}) as ledger:
        end = fill(ledger, alg, start(alg), 20)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # one file, nothing beside it
    return dict(path=path, alg=alg, end=end)


def test_what_went_in_comes_out(written: dict[str, Any]):
    alg = written["alg"]
    with hj.Ledger.open(written["path"], alg, start(alg)) as ledger:
        records = ledger.records()
        assert ledger.rounds == 20 and ledger.header["about"] == {"task": "test"}
    for round in range(20):
        assert records.scalars[round].tobytes() == record_of(round).tobytes()
        assert records.reported[round] == {"ann": 1.0, "bob": round / 2}
    end = jax.jit(alg.replay)(start(alg), records.scalars, records.learning_rates)
    assert_same_bits(end, written["end"])
    assert records.digests[-1] == digests.text(hj.digest(end))


def test_since_is_a_tail_and_its_bytes_are_counted(written: dict[str, Any]):
    with hj.Ledger.open(written["path"], read_only=True) as ledger:
        whole, tail = ledger.records(), ledger.records(since=13)
        assert same(tail, Records(13, whole.scalars[13:], whole.learning_rates[13:],
                                  whole.digests[13:], whole.reported[13:]))  # fmt: skip
        assert tail.nbytes == 7 * (2 * 3 * 4 + 4)  # scalars, and the rate: it has a schedule
        assert ledger.records(since=20).nbytes == 0
        for wrong in (-1, 21):
            with pytest.raises(ValueError, match="since: expected 0 to 20"):
                ledger.records(wrong)


def test_the_header_says_what_the_run_was_made_of(written: dict[str, Any]):
    with hj.Ledger.open(written["path"]) as ledger:
        header = ledger.header
    assert header["algorithm"] == dict(
        rule=dict(rule="hiso", decay=0.95, epsilon=1e-8, update_steps="last"),
        learning_rate="schedule", local_steps=2, num_perturbations=3, smoothing=1e-3,
        estimator="forward", aggregator="mean()", distribution="near_normal", nonfinite="raise",
    )  # fmt: skip
    assert header["key"] == {"implementation": "threefry2x32", "data": [0, 0]}
    assert header["software"]["jax"] == jax.__version__
    assert header["software"]["backend"] == jax.default_backend()
    assert header["leaves"][0][:4] == ["w", "float32", [5], True]
    assert header["base"] == digests.text(hj.digest({"w": jnp.zeros(5)}))
    built = rules.from_config(header["algorithm"]["rule"])
    assert built.config == header["algorithm"]["rule"]


def test_other_tools_can_read_it(written: dict[str, Any]):
    connection = sqlite3.connect(written["path"])
    rows = connection.execute("SELECT round, digest, reported FROM records").fetchall()
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
    assert rows[3][0] == 3 and json.loads(rows[3][2]) == {"ann": 1.0, "bob": 1.5}


MISMATCHES = [
    (dict(smoothing=2e-3), {}, "smoothing is 0.001 there and 0.002 here"),
    (dict(decay=0.9), {}, "rule is .*0.95.* there and .*0.9.* here"),
    (dict(distribution="rademacher"), {}, "distribution"),
    (dict(aggregator=aggregators.trimmed_mean(0.2)), {}, r"aggregator is 'mean\(\)'.*mean\(0.2\)"),
    ({}, dict(seed=1), "another root key"),
    ({}, dict(value=1e-7), "another base model.*leaves with other values: w"),
]


@pytest.mark.parametrize("options, other, message", MISMATCHES)
def test_another_run_is_refused(written: dict[str, Any], options: Any, other: Any, message: str):
    alg = make(**options)
    with pytest.raises(hj.LedgerMismatch, match=message):
        hj.Ledger.open(written["path"], alg, start(alg, **other))


def test_other_leaves_are_refused(written: dict[str, Any]):
    alg, key = written["alg"], jax.random.key(0)
    cases = [
        ({"v": jnp.zeros(5)}, "other leaves: only there w, only here v"),
        ({"w": jnp.zeros(6)}, r"leaf 'w' is \['float32', \[5\]\] there"),
        ({"w": jnp.zeros(5, jnp.bfloat16)}, "bfloat16"),
    ]
    for params, message in cases:
        with pytest.raises(hj.LedgerMismatch, match=message):
            hj.Ledger.open(written["path"], alg, alg.init(params, key))
    state = written["end"]
    hj.Ledger.open(written["path"], alg, state).close()
    with pytest.raises(hj.LedgerMismatch, match="digest after 20 rounds"):
        hj.Ledger.open(written["path"], alg, state._replace(params={"w": jnp.ones(5)}))
    with pytest.raises(hj.LedgerMismatch, match="it has 20 rounds, the state 21"):
        hj.Ledger.open(written["path"], alg, state._replace(round=jnp.int32(21)))


def test_trainable_mask_is_compared(tmp_path: Path):
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    loss = lambda p, b: ((p["a"] - b) ** 2).mean() + (p["b"] ** 2).mean()  # noqa: E731
    algs = [hj.decomfl(loss, 0.1, trainable=mask) for mask in (None, {"a": True, "b": False})]
    first, second = (alg.init(params, jax.random.key(0)) for alg in algs)
    hj.Ledger.create(tmp_path / "a", algs[0], first).close()
    with pytest.raises(hj.LedgerMismatch, match="trainable there: b"):
        hj.Ledger.open(tmp_path / "a", algs[1], second)


def test_bad_input_at_the_door(tmp_path: Path):
    alg = make()
    state = start(alg)
    with pytest.raises(ValueError, match="state: expected one fresh from init"):
        hj.Ledger.create(tmp_path / "a", alg, state._replace(round=jnp.int32(1)))
    with pytest.raises(ValueError, match="about: expected plain data"):
        hj.Ledger.create(tmp_path / "a", alg, state, about={"x": object()})
    unnamed = rules.identity()._replace(config=None)
    plain = hj.scalar_algorithm(quadratic_loss, 0.1, rule=unnamed)
    with pytest.raises(ValueError, match="its rule has no config"):
        hj.Ledger.create(tmp_path / "a", plain, start(plain))
    with pytest.raises(FileNotFoundError, match="no such ledger"):
        hj.Ledger.open(tmp_path / "a", alg, state)
    assert list(tmp_path.iterdir()) == []
    with hj.Ledger.create(tmp_path / "a", alg, state) as ledger:
        record, digest = record_of(0), hj.digest(state)
        for wrong, message in [
            ((record[:1], digest, 0.1), r"record: expected shape \(2, 3\)"),
            ((np.where(record > 0, record, np.nan), digest, 0.1), "record: expected finite"),
            ((record, "abc", 0.1), "digest: expected sixteen"),
            ((record, digest), "learning_rate: needed"),
            ((record, digest, -1.0), "learning_rate: expected a finite number >= 0"),
        ]:
            with pytest.raises(ValueError, match=message):
                ledger.append(*wrong)
        assert ledger.rounds == 0
    with pytest.raises(FileExistsError, match="never written over"):
        hj.Ledger.create(tmp_path / "a", alg, state)
    constant = hj.decomfl(quadratic_loss, 0.1)
    with hj.Ledger.create(tmp_path / "b", constant, start(constant)) as ledger:
        with pytest.raises(ValueError, match="learning_rate: the ledger's is 0.1"):
            ledger.append(np.ones((1, 5)), digest, 0.2)
        ledger.append(np.ones((1, 5)), digest, np.float32(0.1))
        assert ledger.records().learning_rates is None and ledger.records().nbytes == 20


def test_a_second_writer_is_refused(tmp_path: Path):
    alg = make()
    state = start(alg)
    digest = hj.digest(state)
    with hj.Ledger.create(tmp_path / "a", alg, state) as first:
        with hj.Ledger.open(tmp_path / "a") as second:
            first.append(record_of(0), digest, 0.1)
            with pytest.raises(hj.LedgerWriteError, match="round 0 is not recorded: another"):
                second.append(record_of(1), digest, 0.1)
        assert first.append(record_of(1), digest, 0.1) == 1
    with hj.Ledger.open(tmp_path / "a") as ledger:
        assert ledger.rounds == 2


def test_export_and_back(written: dict[str, Any], tmp_path: Path):
    with hj.Ledger.open(written["path"]) as ledger:
        size = ledger.export(tmp_path / "run.safetensors")
        records = ledger.records()
    assert size == (tmp_path / "run.safetensors").stat().st_size
    assert records.nbytes < size < records.nbytes + 4096
    alg = written["alg"]
    for to in (":memory:", tmp_path / "again.sqlite"):
        with hj.Ledger.import_(tmp_path / "run.safetensors", to) as again:
            again.match(alg, start(alg))
            back = again.records()
            assert back.scalars.tobytes() == records.scalars.tobytes()
            np.testing.assert_array_equal(back.learning_rates, records.learning_rates)
            assert back.digests == [None] * 19 + [records.digests[-1]]
            with pytest.raises(hj.LedgerMismatch, match="another base model"):
                again.match(alg, start(alg, value=1.0))
    with hj.Ledger.open(tmp_path / "again.sqlite") as ledger:  # and it goes on
        ledger.append(record_of(20), hj.digest(written["end"]), 0.0)
        assert ledger.export(tmp_path / "longer.safetensors") > size


def test_export_of_many_leaves_stays_small(tmp_path: Path):
    """Three hundred leaves, as in a large model whose layers are not stacked."""
    params = {
        f"model.layers.{i}.{name}": jnp.zeros(3)
        for i in range(32)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "ln1", "ln2", "bias")
    }
    alg = hj.decomfl(odd_loss, 0.1)
    for tree in (params, odd_tree()):
        with hj.Ledger.create(":memory:", alg, alg.init(tree, jax.random.key(0))) as ledger:
            assert ledger.export(tmp_path / "a") < 4096


def edits(content: bytes, count: int) -> Any:
    """Byte edits of all kinds: flips, changes, losses, insertions, truncations."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place, kind = int(rng.integers(len(content))), i % 5
        if kind == 0:
            new = bytes([content[place] ^ 1 << int(rng.integers(8))])
        elif kind == 1:
            new = bytes([(content[place] + int(rng.integers(1, 256))) % 256])
        else:
            new = (b"", bytes([content[place], int(rng.integers(256))]), None)[kind - 2]
        yield content[:place] if new is None else content[:place] + new + content[place + 1 :]


def test_no_edit_of_the_compact_file_goes_unnoticed(written: dict[str, Any], tmp_path: Path):
    with hj.Ledger.open(written["path"]) as ledger:
        ledger.export(tmp_path / "run.safetensors")
    content = (tmp_path / "run.safetensors").read_bytes()
    for edited in edits(content, 1000):
        (tmp_path / "edited").write_bytes(edited)
        if edited != content:
            with pytest.raises(hj.CorruptLedger, match="edited"):
                hj.Ledger.import_(tmp_path / "edited")


def test_edits_of_the_file_never_make_another_run(written: dict[str, Any], tmp_path: Path):
    """A named error, or, where SQLite has no use for the byte, the very same contents."""
    content = Path(written["path"]).read_bytes()
    with hj.Ledger.open(written["path"]) as ledger:
        header, records = ledger.header, ledger.records()
    harmless = 0
    for number, edited in enumerate(edits(content, 1000)):
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(edited)
        try:
            with hj.Ledger.open(path, read_only=bool(number % 2)) as ledger:
                assert ledger.header == header and same(ledger.records(), records), number
                harmless += 1
        except hj.CorruptLedger as error:
            assert str(path) in str(error)
        for leftover in tmp_path.glob(f"{number}.sqlite*"):
            leftover.unlink()
    print(f"{harmless} of {number + 1} edits fell on bytes that SQLite does not use")
    assert harmless < 400


def test_every_byte_of_every_record_is_found(written: dict[str, Any], tmp_path: Path):
    """Edits through SQLite itself, which keep the file well formed; the round is named."""
    path = tmp_path / "edited.sqlite"
    for column, values in dict(
        scalars=[b"", b"\1" * 24, b"\1" * 23, "text", 3],
        learning_rate=[0.5, "0.1", -1.0],
        digest=["0" * 16, "z" * 16, None, b"\0"],
        reported=["{}", '{"eve": 1.0}', "nonsense"],
        chain=[b"", b"\0" * 32, "text"],
        round=[100, -1],
    ).items():
        for value in values:
            shutil.copy(written["path"], path)
            with sqlite3.connect(path) as connection:
                connection.execute(f"UPDATE records SET {column} = ? WHERE round = 8", (value,))
            connection.close()
            with pytest.raises(hj.CorruptLedger, match="round [08]"):
                hj.Ledger.open(path)
    for statement, message in [
        ("DELETE FROM records WHERE round = 4", "round 4: it is missing"),
        ("DELETE FROM records WHERE round = 19", "the end: 20 records were written, 19 are left"),
        ("UPDATE head SET rounds = 19", "the end"),
        ("UPDATE header SET json = replace(json, '0.95', '0.96')", "the header"),
        ("DROP TABLE records", "the header: the tables"),
        ("PRAGMA user_version = 2", "expected a ledger of format 1"),
    ]:
        shutil.copy(written["path"], path)
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()
        with pytest.raises(hj.CorruptLedger, match=message):
            hj.Ledger.open(path)


def test_a_file_that_is_no_ledger(written: dict[str, Any], tmp_path: Path):
    """An error that names the path, and says what the file is where that is known."""
    whole = Path(written["path"]).read_bytes()
    kinds: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "the file is empty"),
        "text": (b"hello" * 1000, "text: "),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    } | {f"cut{n}": (whole[:n], f"cut{n}: ") for n in range(100, len(whole), 1111)}
    for name, (content, message) in kinds.items():
        (tmp_path / name).write_bytes(content)
        for door in (hj.Ledger.open, hj.Ledger.import_):
            with pytest.raises(hj.CorruptLedger, match=f"{name}: .*{message}|{message}"):
                door(tmp_path / name)
    compact.write(tmp_path / "other", {"a": 1}, np.zeros((1, 1, 1)), None, None)
    with pytest.raises(hj.CorruptLedger, match="lacks"):
        hj.Ledger.import_(tmp_path / "other")
    with pytest.raises(hj.CorruptLedger, match="opened with Ledger.import_"):
        hj.Ledger.open(tmp_path / "other")
    with pytest.raises(hj.CorruptLedger, match="opened with Ledger.open"):
        hj.Ledger.import_(written["path"])
    for door in (hj.Ledger.open, hj.Ledger.import_):
        with pytest.raises(IsADirectoryError, match=f"path: {tmp_path} is a folder"):
            door(tmp_path)


def test_a_commit_that_a_kill_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its journal puts the file right where that can be written to; elsewhere it is named."""
    path, left, alg = tmp_path / "a.sqlite", tmp_path / "left.sqlite", make()
    with hj.Ledger.create(path, alg, start(alg)) as ledger:
        fill(ledger, alg, start(alg), 3)
        write = ledger._connection.execute
        write("PRAGMA cache_size=1")  # so that pages are written before the commit
        write("BEGIN IMMEDIATE")
        for round in range(3, 99):
            write("INSERT INTO records VALUES (?, ?, 0.1, NULL, '', x'')", (round, bytes(3000)))
        for end in ("", "-journal"):
            shutil.copy(f"{path}{end}", f"{left}{end}")
        write("ROLLBACK")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with hj.Ledger.open(path, read_only=True) as ledger:
            assert ledger.rounds == 3
        with pytest.raises(hj.LedgerError, match="copy it with left.sqlite-journal"):
            hj.Ledger.open(left, read_only=True)
        with pytest.raises(hj.LedgerWriteError, match="cannot be written to"):
            hj.Ledger.open(path)
    left.rename(tmp_path / "moved.sqlite")
    with pytest.raises(FileExistsError, match="left.sqlite-journal is there"):
        hj.Ledger.create(left, alg, start(alg))
    (tmp_path / "moved.sqlite").rename(left)
    with hj.Ledger.open(left, read_only=True) as ledger:
        assert ledger.rounds == 3 and not Path(f"{left}-journal").exists()


FILL_UP = """
import resource, sys
import numpy as np
import hiso_jax as hj
ledger = hj.Ledger.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for _ in range(5000):
    try:
        ledger.append(np.ones((2, 3)), "0" * 16, 0.1, {"a" * 500: 1.0})
    except hj.LedgerWriteError as error:
        print(ledger.rounds, error)
        break
"""


def test_no_room_left(tmp_path: Path):
    """A limit on file sizes stops appending; what was committed is there, and it goes on later."""
    path, alg = tmp_path / "a.sqlite", make()
    hj.Ledger.create(path, alg, start(alg)).close()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", FILL_UP, str(path), "200000"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rounds, message = output.split(" ", 1)
    assert f"round {rounds} is not recorded, the ledger is as it was" in message
    with hj.Ledger.open(path) as ledger:
        assert ledger.rounds == int(rounds) > 10
        ledger.append(np.ones((2, 3)), "0" * 16, 0.1)
