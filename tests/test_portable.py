"""The same bits on other machines: what of that can be tested on one.

`tests/data` holds ledgers written once and for all. Whatever replays them (this process,
one thread, one device, a CPU without fused multiply-add, another Python with another jax)
must find the digests in them; they are also the promise that old ledgers go on working.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import directions
from hiso_jax._engine import exact, trees
from hiso_jax.federation import server
from hiso_jax.ledger import digests
from tests.helpers import CONTROL, CORRECT, equations

DATA = Path(__file__).parent / "data"
ROUNDS, SHAPES = 30, [(33, 65), (129,), (4, 31, 17), (), (0, 3)]
CASES: dict[str, Any] = {
    "normal-float32": dict(
        make=hj.federated_hiso, distribution="normal", local_steps=2, update_steps="all"
    ),
    "near_normal-float32": dict(make=hj.federated_hiso, distribution="near_normal"),
    "rademacher-bfloat16": dict(make=hj.federated_hiso, distribution="rademacher"),
}


def make(case: str) -> tuple[hj.Algorithm, hj.State]:
    """An algorithm and its base, in numbers that need no rounding."""
    options = dict(CASES[case])
    build, dtype = options.pop("make"), jnp.dtype(case.split("-")[1])
    alg = build(lambda params, batch: jnp.float32(0), 2**-7, num_perturbations=3, **options)
    place = [(np.arange(np.prod(s, dtype=int)) * 7 % 17 - 8).reshape(s) / 16 for s in SHAPES]
    params = {f"leaf{i}": jnp.asarray(x, dtype) for i, x in enumerate(place)}
    return alg, alg.init(params, jax.random.key(2025))


def replayed(case: str) -> None:
    """Replay a committed ledger and compare digests."""
    alg, state = make(case)
    with hj.Ledger.import_(DATA / f"{case}.safetensors") as ledger:
        ledger.match(alg, state)
        records = ledger.records()
    assert records.digests[-1] is not None and len(records.scalars) == ROUNDS
    end = server.catch_up(alg, state, records)
    assert digests.text(hj.digest(end)) == records.digests[-1]


@pytest.mark.parametrize("case", CASES)
def test_this_process(case: str):
    replayed(case)


FLAGS = {
    "one device, one thread, no fused multiply-add": "--xla_cpu_multi_thread_eigen=false --xla_cpu_max_isa=AVX",
    "128-bit vectors": "--xla_cpu_max_isa=SSE4_2",
    "all optimizations": "",
}


# Quick tests have a differently compiled program of every row in `test_programs`, and optimized
# ones in `test_resume`; the first of these has all optimizations, and every CI runs it.
SLOW = {name: [pytest.mark.slow] for name in FLAGS}
SLOW["one device, one thread, no fused multiply-add"].append(pytest.mark.ci)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW[n]) for n in FLAGS])
def test_other_programs(name: str):
    environment = os.environ | {"XLA_FLAGS": FLAGS[name], "JAX_PLATFORMS": "cpu"}
    run = "import os, runpy; runpy.run_module('tests.test_portable', run_name='__main__')"
    if "thread" in name:
        run = run.replace("; ", "; os.sched_setaffinity(0, {0}); ")
    done = subprocess.run(
        [sys.executable, "-c", run], env=environment, cwd=DATA.parents[1], text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for case in CASES for word in (case, "equal", "bits")]


@pytest.mark.parametrize("distribution", get_args(directions.Distribution))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_only_correctly_rounded_operations(distribution: str, dtype: Any):
    """No division, root or transcendental of floats anywhere in `advance`, and no float sum
    whose order is the compiler's choice."""
    alg = hj.federated_hiso(
        lambda params, batch: jnp.float32(0), 0.1, local_steps=2, distribution=distribution
    )
    state = alg.init({"w": jnp.ones((7, 9), dtype)}, jax.random.key(0))
    seen = set()
    for equation in equations(jax.make_jaxpr(alg.advance)(state, jnp.ones((2, 5))).jaxpr):
        name = equation.primitive.name
        seen.add(name)
        assert name in CORRECT | CONTROL, name
        if name in ("div", "rem", "reduce_sum"):
            types = {str(v.aval.dtype) for v in equation.invars}
            assert not any("float" in t for t in types), (name, types)
    assert {"scan", "mul", "shift_left"} <= seen  # it has looked inside


# A transcription in NumPy, whose operations are IEEE 754's, one at a time.
F = np.float32


def np_threefry(key: np.ndarray, counter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = [np.uint32(key[0]), np.uint32(key[1])]
    k.append(k[0] ^ k[1] ^ np.uint32(0x1BD11BDA))
    x, y = np.zeros_like(counter) + k[0], counter + k[1]
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn)))
        x = x + k[(block + 1) % 3]
        y = y + k[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def np_flush(x: Any) -> Any:
    return np.where(np.abs(x) < F(2.0**-126), np.copysign(F(0), x), x).astype(F)


def np_rsqrt(x: np.ndarray) -> np.ndarray:
    y = (np.int32(0x5F3759DF) - (x.view(np.int32) >> 1)).view(F)
    half = F(0.5) * x
    for _ in range(3):
        y = y + y * (F(0.5) - (half * y) * y)
    return y


def np_horner(x: np.ndarray, coefficients: Any) -> np.ndarray:
    total = np.full_like(x, F(coefficients[0]))
    for c in coefficients[1:]:
        total = total * x + np.asarray(c, F)
    return total


def np_log(x: np.ndarray) -> np.ndarray:
    pattern = x.view(np.int32)
    exponent = (pattern - np.int32(0x3F3504F3)) >> 23
    t = (pattern - (exponent << 23)).view(F) - F(1)
    square, e = t * t, exponent.astype(F)
    tail = np_horner(t, exact._LOG) * t * square - F(0.5) * square
    return (t + (tail - e * F(2.12194440e-4))) + e * F(0.693359375)


def np_normal(words: np.ndarray) -> np.ndarray:
    x = ((words.view(np.int32) >> 8).astype(F) + F(0.5)) * F(2**-23)
    w = -np_log((F(1) - x) * (F(1) + x))
    near = w < 5
    t = np.where(near, w - F(2.5), w * np_rsqrt(w) - F(3))
    pairs = [np.where(near, F(a), F(b)) for a, b in zip(exact._CENTRE, exact._TAIL, strict=True)]
    return np_horner(t, pairs) * x * F(2**0.5)


def np_noise(key: np.ndarray, size: int, distribution: str) -> np.ndarray:
    count = -(-size // 32) if distribution == "rademacher" else size
    words, others = np_threefry(key, np.arange(count, dtype=np.uint32))
    if distribution == "normal":
        return np_normal(words)
    if distribution == "near_normal":
        ones = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1).sum(1, dtype=np.int32)
        halves = others.view(np.uint16).reshape(-1, 2).astype(np.int32)  # low, high
        y = ((ones - 16) * 2**16 + halves[:, 1] - halves[:, 0]).astype(F)
        return y * F(exact._LINE) + y * y * (y * F(exact._CUBE))
    bits = (words[:, None] >> (np.uint32(31) - np.arange(32, dtype=np.uint32))) & np.uint32(1)
    return np.where(bits.reshape(-1)[:size] == 1, F(-1), F(1))


@pytest.mark.parametrize("distribution", get_args(directions.Distribution))
def test_a_transcription_in_numpy_finds_the_same_bits(distribution: str):
    size, rounds, decay, rate, epsilon = 5001, 8, 0.95, F(0.01), F(1e-8)
    alg = hj.federated_hiso(
        lambda params, batch: jnp.float32(0), 0.01, num_perturbations=4,
        distribution=distribution, decay=decay,
    )  # fmt: skip
    start = np.linspace(-1, 1, size, dtype=F)
    state = alg.init({"w": jnp.asarray(start)}, jax.random.key(9))
    records = np.random.default_rng(0).normal(size=(rounds, 1, 4)).astype(F)
    records[3] *= F(1e-30)  # products that are subnormal
    x, h, advance = start, np.ones(size, F), jax.jit(alg.advance)
    for round in range(rounds):
        state = advance(state, records[round])
        weights = np_flush(records[round, 0] * F(0.25))
        weights = np.where(np.abs(weights) < 2**-60, F(0), weights)
        delta = np.zeros(size, F)
        for p in range(4):
            key = directions.direction_key(jax.random.key(9), round, 0, p)
            key = jax.random.key_data(jax.random.fold_in(key, np.uint32(trees.leaf_hash("w"))))
            delta = delta + weights[p] * np_noise(np.asarray(key), size, distribution)
        delta = np_flush(delta * np_rsqrt(h))
        x = np_flush(np_flush(x) - np_flush(rate * delta))
        h = np_flush(
            np_flush(F(decay) * h) + np_flush(F(1 - decay) * (np_flush(delta * delta) + epsilon))
        )
        assert np.asarray(state.params["w"]).tobytes() == x.tobytes(), round
        assert np.asarray(state.rule.curvature["w"]).tobytes() == h.tobytes(), round


def write() -> None:
    """How the committed ledgers were made; an existing one is never replaced."""
    for case in (c for c in CASES if not (DATA / f"{c}.safetensors").exists()):
        alg, state = make(case)
        with hj.Ledger.create(":memory:", alg, state) as ledger:
            for round in range(ROUNDS):
                scalars = np.random.default_rng(round).normal(size=ledger.shape).astype(F)
                record = np.full_like(scalars, np.nan) if round == 4 else scalars
                state = jax.jit(alg.advance)(state, record)
                ledger.append(record, hj.digest(state))
            ledger.export(DATA / f"{case}.safetensors")


if __name__ == "__main__":
    write()
    for case in CASES:
        replayed(case)
        print(case, "equal bits")
