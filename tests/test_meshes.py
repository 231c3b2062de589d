"""Clients over devices and over processes: same bits, and only scalars cross."""

import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import OPTConfig

import hiso_jax as hj
from hiso_jax import federation, models
from hiso_jax._engine import meshes
from tests.helpers import ENVIRONMENT, assert_same_bits, finish, start

C, K, P = 8, 2, 3
OPT = OPTConfig(vocab_size=640, hidden_size=128, num_hidden_layers=3, ffn_dim=512,
                num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=128)  # fmt: skip
COLLECTIVE = re.compile(
    r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|"
    r"reduce-scatter)(?:-start)?\((.*)"
)


def numbers(shapes: str) -> int:
    """Numbers in the arrays of an HLO type."""
    found = re.findall(r"[a-z]+\d+\[([\d,]*)\]", shapes)
    return sum(math.prod(int(n) for n in dims.split(",") if n) for dims in found)


def groups(text: str, devices: int) -> np.ndarray:
    """Groups of devices [groups, members] of a collective."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
        return np.array(
            [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
        )
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else range(len(dims))
        grid = np.arange(devices).reshape(dims).transpose(order)
        return grid.reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        dims = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        across = re.findall(r"'(\w+)'", found[2])
        order = [i for i, n in enumerate(dims) if n not in across]
        order += [i for i, n in enumerate(dims) if n in across]
        members = math.prod(dims[n] for n in across)
        return np.arange(devices).reshape(*dims.values()).transpose(order).reshape(-1, members)
    raise AssertionError(f"no groups in {text}")


@pytest.fixture(scope="module")
def problem() -> dict[str, Any]:
    model = models.from_config(OPT, jax.random.key(0))

    def loss_fn(params: Any, ids: jax.Array) -> jax.Array:
        x = model.hidden(params, ids, jnp.ones_like(ids))[:, -1]
        return jax.nn.logsumexp(model.head(params, x, jnp.array([5, 6])), -1).mean()

    alg = hj.federated_hiso(loss_fn, 0.01, local_steps=K, num_perturbations=P,
                            distribution="rademacher", lazy=True)  # fmt: skip
    ids = np.random.default_rng(0).integers(3, 640, (C, K, 2, 8), dtype=np.int32)
    state = alg.init(model.params, jax.random.key(1))
    return dict(alg=alg, ids=ids, state=state, plain=jax.jit(alg.round)(state, ids))


@pytest.mark.parametrize("rows,width", [
    pytest.param(8, 1, marks=pytest.mark.slow),
    pytest.param(4, 2, marks=[pytest.mark.slow, pytest.mark.ci]),
])  # fmt: skip
def test_only_scalars_cross_between_rows(problem: dict[str, Any], rows: int, width: int):
    alg, mesh = problem["alg"], meshes.make(rows, width)
    state = meshes.place_state(mesh, problem["state"])
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert bool(split) == (width > 1)
    with jax.set_mesh(mesh):
        batches = meshes.place_batches(mesh, problem["ids"])
        program = jax.jit(alg.round).lower(state, batches).compile()
        after, metrics = program(state, batches)
    crossing = 0
    for shapes, rest in COLLECTIVE.findall(program.as_text()):
        row = groups(rest, rows * width) // width
        if (row != row[:, :1]).any():
            crossing += 1
            assert numbers(shapes) <= C * K * P, rest
    assert crossing >= 1  # the scalars do
    np.testing.assert_allclose(metrics.scalars, problem["plain"][1].scalars, atol=0.02)
    # The same record moves everybody alike, mesh or none.
    alone = jax.jit(alg.advance)(problem["state"], np.asarray(metrics.record))
    assert_same_bits(after, alone)


def test_a_simulation_on_a_mesh():
    loss_fn = lambda params, batch: (params["w"].sum() - batch["x"].mean()) ** 2  # noqa: E731
    alg = hj.decomfl(loss_fn, 1e-3, num_perturbations=P)
    clients = federation.Clients({str(i): {"x": np.full(3, i, np.float32)} for i in range(6)})
    ends = []
    for mesh in (None, meshes.make(2)):
        state = alg.init({"w": jnp.ones(4)}, jax.random.key(0))
        *_, last = federation.run(alg, state, clients, rounds=4, clients_per_round=4,
                                  batch_size=2, mesh=mesh)  # fmt: skip
        ends.append(np.asarray(last.state.params["w"]))
        assert len(last.state.params["w"].sharding.device_set) == (1 if mesh is None else 2)
    np.testing.assert_allclose(*ends, rtol=1e-4)
    state = alg.init({"w": jnp.ones(4)}, jax.random.key(0))
    with pytest.raises(ValueError, match="5 clients cannot be dealt out to 2 rows"):
        next(federation.run(alg, state, clients, rounds=1, clients_per_round=5, batch_size=2,
                            mesh=meshes.make(2)))  # fmt: skip


def test_probes_without_jit_on_a_mesh():
    loss_fn = lambda params, batch: (params["w"].sum() - batch["x"].mean()) ** 2  # noqa: E731
    alg = hj.decomfl(loss_fn, 1e-3, num_perturbations=P)
    state = alg.init({"w": jnp.ones(4)}, jax.random.key(0))
    batches = {"x": jnp.arange(12.0).reshape(4, 1, 3)}
    with jax.set_mesh(meshes.make(2)):
        found = alg.probe(state, batches)
    np.testing.assert_allclose(found, alg.probe(state, batches), rtol=1e-4)


def test_bad_meshes():
    with pytest.raises(ValueError, match="8 x 2 devices wanted, 8 are there"):
        meshes.make(8, 2)
    with pytest.raises(ValueError, match="clients: .*0"):
        meshes.make(0)


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_train_together(tmp_path: Path):
    """Two processes of two devices: each its own clients, both the same digest."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    assert "device_count=2" in flags
    environment = ENVIRONMENT | {"XLA_FLAGS": flags}
    processes = [
        start("digits", "--rounds", "5", "--mesh", "4", "1", "--out", str(tmp_path / "run"),
              "--distributed", f"localhost:{port},2,{i}", environment=environment)
        for i in range(2)
    ]  # fmt: skip
    texts = [finish(process) for process in processes]
    assert "HiSo" in texts[0]
    found = [
        json.loads((tmp_path / n / "summary.json").read_text()) for n in ("run", "run.process1")
    ]
    assert found[0]["rounds"] == 5 and found[0]["digest"] == found[1]["digest"]
    ledgers = [(tmp_path / n / "ledger.safetensors").read_bytes() for n in ("run", "run.process1")]
    assert ledgers[0] == ledgers[1]
