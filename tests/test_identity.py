"""Who and what is meant: names of leaves, clients and places, copies of a ledger, digests."""

import contextlib
import itertools
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax import federation, rules
from hiso_jax._engine import packing, trees
from hiso_jax.federation import server
from hiso_jax.ledger import digests
from tests.helpers import assert_same_bits, quadratic_loss

# Names of leaves: few letters, so that they meet; the separator, and what packs begin with.
KEYS = st.text("ab/\0", max_size=3)
TREES = st.recursive(
    st.just(0.5) | st.just(1),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(TREES)
def test_every_leaf_has_a_name_of_its_own_or_the_tree_is_refused(tree: Any):
    paths = [trees.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if len(set(paths)) < len(paths) or "\0" in "".join(paths):
        for refuse in (trees.named, trees.select, hj.digest):
            with pytest.raises(ValueError, match="params: .*rename"):
                refuse(tree)
    else:
        assert list(trees.named(tree)) == paths
        assert list(trees.named(tree).values()) == jax.tree.leaves(tree)


@pytest.mark.parametrize("frozen", [False, True])
def test_two_leaves_of_one_name_are_refused_at_the_door(frozen: bool):
    """Frozen or not: merging a trained one would replace both."""
    params = {"a": {"b": jnp.zeros(2)}, "a/b": jnp.ones(2), "c": jnp.zeros(1)}
    mask = {"a": True, "a/b": not frozen, "c": True}
    alg = hj.decomfl(quadratic_loss, 0.1, trainable=mask)
    both = r"\['a'\]\['b'\] and \['a/b'\] have the same name 'a/b'"
    with pytest.raises(ValueError, match=both):
        alg.init(params, jax.random.key(0))
    with pytest.raises(ValueError, match=both):
        hj.hiso(0.1, trainable=mask).init(params)
    with pytest.raises(ValueError, match=r"'\\x000' has a NUL"):
        alg.init({"\0000": jnp.zeros(2), "b": jnp.zeros(2)}, jax.random.key(0))


def as_dict(rule: rules.Rule) -> rules.Rule:
    """Adam with a state of plain dicts, whose keys a leaf may have for a name."""
    fields = rules.AdamState._fields
    wrap = lambda state: dict(zip(fields, state, strict=True))  # noqa: E731

    def update(state: Any, *rest: Any) -> Any:
        step, new = rule.update(rules.AdamState(**state), *rest)
        return step, wrap(new)

    # Its config would be that of a rule of the library, which a ledger would build.
    return rule._replace(init=lambda leaves: wrap(rule.init(leaves)), update=update, config=None)


RULES = {name: build() for name, build in rules.RULES.items()} | {"dict": as_dict(rules.adam())}


@pytest.mark.parametrize("rule", RULES)
def test_a_leaf_may_be_called_as_a_field_of_the_rules_state(rule: str):
    """What a rule keeps for every leaf is told from what it keeps once, whatever their names."""
    state = RULES[rule].init({"w": jnp.zeros(3)})
    fields = list(state) if isinstance(state, dict) else list(getattr(state, "_fields", ()))
    expected = [isinstance(x, dict) for x in trees.nodes(state, {"w": jnp.zeros(3)})[0]]
    groups = [group for n in (1, 2, 3) for group in itertools.combinations(fields, n)]
    for group in groups:
        leaves = {name: jnp.ones(size + 2) for size, name in enumerate(group)}
        own = RULES[rule].init(leaves)
        nodes, tree = trees.nodes(own, leaves)
        assert [isinstance(x, dict) for x in nodes] == expected, group
        assert_same_bits(tree.unflatten(nodes), own)
        packs = packing.plan(leaves)
        packed = packing.pack_state(own, leaves, packs)
        back = packing.unpack_state(packed, packing.pack(leaves, packs), packs)
        assert jax.tree.structure(back) == jax.tree.structure(own)
        assert_same_bits(back, own)


def test_a_state_of_dicts_moves_leaves_as_one_of_tuples():
    names = rules.AdamState._fields
    params = {name: jnp.arange(3.0) + i for i, name in enumerate(names)}
    ends = []
    for rule in (rules.adam(), as_dict(rules.adam())):
        alg = hj.scalar_algorithm(quadratic_loss, 0.1, rule=rule, num_perturbations=2)
        start = alg.init(params, jax.random.key(0))
        ends.append(jax.jit(alg.advance)(start, jnp.float32([[0.5, -1.0]])))
    assert_same_bits(ends[0].params, ends[1].params)
    assert_same_bits(ends[0].rule._asdict(), ends[1].rule)


# What may stand where a client's name should.
NAMES = st.one_of(
    st.text("a1", max_size=2), st.integers(0, 12), st.none(), st.just(float("nan")),
    st.just(np.float32("nan")), st.integers(0, 3).map(np.int64), st.just(np.datetime64("NaT")),
)  # fmt: skip


def are_names(names: list[Any]) -> bool:
    """Whether all of them are there, and different as text."""
    missing = [n for n in names if n is None or str(n) in ("", "nan", "NaT")]
    return bool(names) and not missing and len({str(n) for n in names}) == len(names)


ALGORITHM = hj.decomfl(quadratic_loss, 0.1, num_perturbations=1)


def fresh(algorithm: hj.Algorithm) -> hj.State:
    return algorithm.init({"w": jnp.zeros(4)}, jax.random.key(0))


def served(algorithm: hj.Algorithm, path: str | Path = ":memory:") -> server.Server:
    there = path != ":memory:" and Path(path).exists()
    ledger = hj.Ledger.open(path) if there else hj.Ledger.create(path, algorithm, fresh(algorithm))
    return server.Server(algorithm, fresh(algorithm), ledger)


HOST = served(ALGORITHM)


@settings(deadline=None, max_examples=200)
@given(st.lists(NAMES, max_size=4))
def test_clients_are_called_by_text_or_refused(names: list[Any]):
    HOST._asked = []
    columns = {"x": np.arange(float(len(names)))}
    mapping = {name: {"x": columns["x"][i : i + 1]} for i, name in enumerate(names)}
    if not are_names(list(mapping)):
        with pytest.raises(ValueError, match="data: expected"):
            federation.Clients(mapping)
    if not are_names(names):
        with pytest.raises(ValueError, match="names: expected|sizes: expected"):
            federation.Clients.joined(names, [1] * len(names), columns)
        with pytest.raises(ValueError, match="names: expected"):
            HOST.open(names)
        return
    for clients in (
        federation.Clients(mapping),
        federation.Clients.joined(names, [1] * len(names), columns),
    ):
        assert clients.names == [str(n) for n in names] == list(clients.sizes)
        for i, name in enumerate(names):
            assert clients[name]["x"].tolist() == clients[str(name)]["x"].tolist() == [i]
            assert clients.batches([name], 0, 1)["x"].tolist() == [[[i]]]
    number = HOST.open(names)
    for name in names:
        assert HOST.reply(name, number, np.ones((1, 1)))
        assert not HOST.reply(str(name), number, np.ones((1, 1)))
    HOST.close()
    assert HOST.ledger.records(HOST.round - 1).reported == [{str(n): 1.0 for n in names}]


def test_a_text_is_no_list_of_names():
    for call in (lambda: HOST.open("ab"), lambda: federation.Clients.joined("ab", [1, 1], {})):
        HOST._asked = []
        with pytest.raises(ValueError, match="names: expected a list|sizes"):
            call()
    with pytest.raises(ValueError, match="reported: expected different names"):
        HOST.ledger.append(np.ones((1, 1)), "0" * 16, reported={1: 1.0, "1": 2.0})
    with pytest.raises(ValueError, match="reported: expected a finite number"):
        HOST.ledger.append(np.ones((1, 1)), "0" * 16, reported={"a": float("nan")})


PLACED = hj.decomfl(quadratic_loss, 0.1, num_perturbations=1, per_client_directions=3)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True), min_size=1))
def test_only_who_was_always_asked_in_one_place_counts(openings: list[list[str]]):
    """One round, opened anew by a server that was started again each time."""
    ledger = hj.Ledger.create(":memory:", PLACED, fresh(PLACED))
    for names in openings:
        host = server.Server(PLACED, fresh(PLACED), ledger)
        assert host.open(names) == 0
    places = {n: {names.index(n) for names in openings if n in names} for n in "abcd"}
    for name in openings[-1]:
        assert host.reply(name, 0, np.ones((1, 1))) == (len(places[name]) == 1)
    for name in set("abcd") - set(openings[-1]):
        with pytest.raises(ValueError, match="was not asked"):
            host.reply(name, 0, np.ones((1, 1)))


def test_places_outlive_the_server_and_end_with_the_round(tmp_path: Path):
    path = tmp_path / "a.sqlite"
    with served(PLACED, path).ledger as ledger:
        assert ledger.open_round(["a", "b"]) == {"a": [0], "b": [1]}
        size = ledger.export(tmp_path / "a.safetensors")
    shutil.copy(path, tmp_path / "killed.sqlite")
    host = served(PLACED, tmp_path / "killed.sqlite")
    host.open(["b", "a"])
    assert not host.reply("a", 0, np.ones((1, 1))) and np.isnan(host.close()).all()
    host.open(["b", "a"])  # the next round begins anew
    assert host.reply("a", 1, np.ones((1, 1)))
    host.ledger.close()
    with hj.Ledger.open(path, PLACED, fresh(PLACED), read_only=True) as ledger:
        assert ledger.rounds == 0 and ledger.export(tmp_path / "b.safetensors") == size
    for wrong in ("places = '{}'", "round = 7", "sha256 = x'00'"):
        shutil.copy(path, tmp_path / "edited.sqlite")
        with contextlib.closing(sqlite3.connect(tmp_path / "edited.sqlite")) as connection:
            connection.execute(f"UPDATE open_round SET {wrong}")
            connection.commit()
        with pytest.raises(hj.CorruptLedger, match="the round that is open: .* places"):
            hj.Ledger.open(tmp_path / "edited.sqlite")
    with served(ALGORITHM, tmp_path / "b.sqlite").ledger as ledger:  # places are nobody's there
        server.Server(ALGORITHM, fresh(ALGORITHM), ledger).open(["a"])
        tables = ledger._connection.execute("SELECT name FROM sqlite_schema").fetchall()
    assert ("open_round",) not in tables


def record_of(round: int) -> np.ndarray:
    return np.full((1, 1), round, np.float32)


def pages(content: bytes) -> list[bytes]:
    return [content[i : i + 4096] for i in range(0, len(content), 4096)]


def test_a_copy_taken_inside_a_commit_is_whole_or_refused(tmp_path: Path):
    """Any of the pages that a commit writes may be in the copy already, and any may not."""
    path, copy, alg, seen = tmp_path / "a.sqlite", tmp_path / "copy.sqlite", ALGORITHM, set()
    with hj.Ledger.create(path, alg, fresh(alg)) as ledger:
        for round in range(40):
            before = pages(path.read_bytes())
            ledger.append(record_of(round), f"{round:016x}", None, {"a" * 60: 1.0})
            after = pages(path.read_bytes())
            assert [p.name for p in tmp_path.iterdir() if p != copy] == [path.name]
            before += [bytes(4096)] * (len(after) - len(before))
            differ = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
            for chosen in itertools.product((before, after), repeat=len(differ)):
                mixed = after.copy()
                for i, source in zip(differ, chosen, strict=True):
                    mixed[i] = source[i]
                copy.write_bytes(b"".join(mixed))
                try:
                    with hj.Ledger.open(copy, read_only=True) as found:
                        seen.add(found.rounds - round)
                        assert found.rounds - round in (0, 1)
                        for number, scalars in enumerate(found.records().scalars):
                            assert scalars.tobytes() == record_of(number).tobytes()
                except hj.CorruptLedger:
                    seen.add("refused")
    assert seen == {0, 1, "refused"}


def test_a_copy_taken_at_any_moment_has_what_was_committed_or_is_refused(tmp_path: Path):
    path, alg, done = tmp_path / "a.sqlite", ALGORITHM, threading.Event()
    with hj.Ledger.create(path, alg, fresh(alg)) as ledger:

        def run() -> None:
            while not done.is_set():
                ledger.append(record_of(ledger.rounds), "0" * 16)

        writer = threading.Thread(target=run)
        writer.start()
        whole = 0
        while whole < 20:
            least = ledger.rounds
            shutil.copyfile(path, tmp_path / "copy.sqlite")
            with contextlib.suppress(hj.CorruptLedger):
                with hj.Ledger.open(tmp_path / "copy.sqlite", read_only=True) as copy:
                    assert least <= copy.rounds <= ledger.rounds + 1
                    whole += 1
        done.set()
        writer.join()


def test_a_log_of_earlier_versions_is_read_and_then_done_without(tmp_path: Path):
    """They kept the last rounds in a second file, which is still there after a kill."""
    path, alg = tmp_path / "a.sqlite", ALGORITHM
    with hj.Ledger.create(path, alg, fresh(alg)) as ledger:
        ledger._connection.execute("PRAGMA journal_mode=WAL")
        for round in range(3):
            ledger.append(record_of(round), "0" * 16)
        for number in range(2):
            (tmp_path / str(number)).mkdir()
            for name in ("a.sqlite", "a.sqlite-wal"):
                shutil.copy(tmp_path / name, tmp_path / str(number))
        with pytest.raises(hj.LedgerWriteError, match="an earlier version left it in two files"):
            hj.Ledger.open(path)
    with hj.Ledger.open(tmp_path / "0" / "a.sqlite", read_only=True) as ledger:
        assert ledger.rounds == 3
    for folder in ("0", "1"):
        with hj.Ledger.open(tmp_path / folder / "a.sqlite", alg, fresh(alg)) as ledger:
            assert ledger.rounds == 3
            assert [p.name for p in (tmp_path / folder).iterdir()] == ["a.sqlite"]
            ledger.append(record_of(3), "0" * 16)


def test_what_was_trained_goes_along_and_nothing_else(tmp_path: Path):
    train = {"kind": "lora", "alpha": 16.0, "rank": 8, "targets": ["q_proj", "v_proj"]}
    sizes = []
    for number, about in enumerate(({}, {"task": "x" * 5000}, {"task": "t", "train": train})):
        path = tmp_path / f"{number}.safetensors"
        with hj.Ledger.create(":memory:", ALGORITHM, fresh(ALGORITHM), about) as ledger:
            for _ in range(5):
                ledger.append(np.ones((1, 1)), "0" * 16)
            sizes.append(ledger.export(path))
            payload = ledger.records().nbytes
        with hj.Ledger.import_(path) as again:
            again.match(ALGORITHM, fresh(ALGORITHM))
            assert again.header["about"] == {k: v for k, v in about.items() if k == "train"}
            assert again.export(tmp_path / "again.safetensors") == sizes[-1]
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    # As earlier versions wrote it, who knew of no `about`.
    assert sizes[0] == sizes[1] < sizes[2] < payload + 1024
    with pytest.raises(ValueError, match="about: expected plain data"):
        hj.Ledger.create(":memory:", ALGORITHM, fresh(ALGORITHM), {"train": float("nan")})


def test_a_later_state_must_be_of_the_same_leaves(tmp_path: Path):
    """Its digest says nothing of leaves without elements, nor of which are trained."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    alg, other = (
        hj.decomfl(quadratic_loss, 0.1, trainable={"a": True, "b": b}) for b in (True, False)
    )
    state = alg.init(params, jax.random.key(0))
    with hj.Ledger.create(":memory:", alg, state) as ledger:
        state = alg.advance(state, jnp.full((1, 5), jnp.nan))
        ledger.append(np.full((1, 5), np.nan), hj.digest(state))
        ledger.match(alg, state)
        with pytest.raises(hj.LedgerMismatch, match="other leaves are trainable there: b"):
            ledger.match(other, state)
        more = state._replace(params=params | {"none": jnp.zeros((0, 3))})
        with pytest.raises(hj.LedgerMismatch, match="other leaves: .*only here none"):
            ledger.match(alg, more)


def test_a_digest_covers_what_a_model_is_made_of():
    """Names, types, shapes, signs of zero, order, narrow integers and keys: all are different."""
    x = np.zeros(4, np.float32)
    models = [
        {"w": x}, {"v": x}, {"w": -x}, {"w": x.reshape(2, 2)}, {"w": x[:3]}, {"w": x, "v": x},
        {"w": x.astype(np.int32)}, {"w": x.astype(np.uint32)}, {"w": jnp.zeros(4, jnp.int4)},
        {"w": jnp.zeros(4, jnp.uint4)}, {"w": jnp.ones(4, jnp.int4)}, {"w": jnp.float32(0)},
        {"w": x.astype(bool)}, {"w": jnp.zeros(4, jnp.bfloat16)}, {"w": jnp.zeros(4, jnp.float16)},
        {"w": jax.random.key(0)}, {"w": jax.random.key(0, impl="rbg")}, {"a": {"w": x}},
        {"w": x.astype(np.complex64)}, {"w": np.float32([0, 0, 0, np.nan])}, {"w/": x},
    ]  # fmt: skip
    found = [digests.text(hj.digest(model)) for model in models]
    assert len(set(found)) == len(models)
    # The same names are the same model: a flat file of tensors holds what a nested dict does.
    assert digests.text(hj.digest({"a/w": x})) == found[-4]


@pytest.mark.parametrize("dtype", ["float64", "int64", "float32", "bfloat16", "complex64"])
def test_parts_of_wide_leaves_add_up(dtype: str):
    with jax.enable_x64(True):
        x = np.arange(50).astype(jnp.dtype(dtype))
        salts, total = digests.salts("w", x), np.zeros(2, np.uint32)
        part = jax.jit(digests.part)
        for start in range(0, 50, 20):
            own = np.concatenate([x[:3], x[start : start + 20], x[:17]])[:40]
            place = np.uint32((start - 3) % 2**32)
            total += np.asarray(part(own, salts, place, len(x[start : start + 20]), 3))
        assert digests.text(total) == digests.text(hj.digest({"w": x}))


def test_modules_are_attributes_and_come_when_they_are_asked_for():
    code = (
        "import sys, hiso_jax as hj\n"
        "assert not {'flax', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert 'hiso_jax.simulation' not in sys.modules and hj.simulation.Clients\n"
        "assert not {'flax', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    folder = Path(hj.__file__).parent
    names = {p.stem for p in folder.glob("[a-z]*.py")} | {"models", "tasks"}
    for name in names:
        assert getattr(hj, name).__name__ == f"hiso_jax.{name}" and name in dir(hj)
    assert callable(hj.digest) and hj.Ledger is hj.ledger.Ledger
    for name in ("nothing", "_nothing", "a.b"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(hj, name)
