"""Replay against the bare generation of the same noise, and its memory.

python -m benchmarks.replay --rounds 1000
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from benchmarks import timing
from hiso_jax import directions
from hiso_jax._engine import trees
from hiso_jax._engine.tensorfile import Tensor, TensorFile
from hiso_jax.ledger import digests
from hiso_jax.ledger.replay import Replay, large


@dataclasses.dataclass(frozen=True)
class Options:
    """Time and memory of replay."""

    rounds: int = 1000
    """Rounds in the ledger."""
    blocks: int = 4
    """Size of the leaf, in blocks of the replay."""
    num_perturbations: int = 5
    """P."""
    repeats: int = 3
    """Times that each is timed, in turns."""
    model_megabytes: int = 1024
    """Size of the float32 model whose replay is watched for memory; 0: not at all."""
    json: bool = False
    """Print one JSON line last."""


def ledger_of(options: Options, distribution: str, size: int, rounds: int) -> hj.Ledger:
    """A ledger of random scalars for one leaf; its digests are not those of any state."""
    alg = hj.federated_hiso(
        lambda params, batch: jnp.float32(0), 1e-3,
        num_perturbations=options.num_perturbations, distribution=distribution,
    )  # fmt: skip
    start = alg.init({"w": jnp.zeros(size)}, jax.random.key(0))
    ledger, digest = hj.Ledger.create(":memory:", alg, start), digests.text(hj.digest(start))
    for round in range(rounds):
        ledger.append(np.random.default_rng(round).normal(size=ledger.shape), digest)
    return ledger


def bare(distribution: Any, keys: jax.Array) -> Any:
    """Draw all noise of a block, and add it up so that it is not optimized away."""

    @functools.partial(jax.jit, compiler_options=hj.compiler_options())
    def block(keys: jax.Array, start: jax.Array) -> jax.Array:
        def add(p: Any, total: jax.Array, own: jax.Array) -> jax.Array:
            return total + directions.draw(own[p], (large(),), distribution, start)

        def round(total: jax.Array, own: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.fori_loop(0, own.shape[0], lambda p, t: add(p, t, own), total), None

        return jax.lax.scan(round, jnp.zeros(large()), keys)[0]

    return lambda start: np.asarray(block(keys, np.uint32(start)))


def speed(options: Options, distribution: Any) -> dict[str, float]:
    """Seconds of replay and of the bare noise, both on all cores."""
    size = options.blocks * large()
    replay = Replay(ledger_of(options, distribution, size, options.rounds))
    keys = replay._keys(np.uint32(trees.leaf_hash("w")))[0][:, 0]
    draw, base = bare(distribution, keys), np.zeros(size, np.float32)
    starts = range(0, size, large())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seconds = timing.interleaved(
            {
                "bare": lambda: list(pool.map(draw, starts)),
                "replay": lambda: list(
                    pool.map(lambda i: replay.advance("w", i, base[i : i + large()]), starts)
                ),
            },
            options.repeats,
        )
    numbers = size * options.rounds * options.num_perturbations
    return {
        "bare_seconds": seconds["bare"],
        "replay_seconds": seconds["replay"],
        "ratio": seconds["replay"] / seconds["bare"],
        "bare_numbers_per_second": numbers / seconds["bare"],
        "replay_numbers_per_second": numbers / seconds["replay"],
    }


def peak(arguments: list[str]) -> int:
    """Most bytes that a process of its own ever had in memory."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "line = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0]\n"
        "print('PEAK', int(line.split()[1]) * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.rsplit("PEAK", 1)[1])


def memory(options: Options) -> dict[str, float]:
    """Peak of `experiments.replay` on a large and on a tiny model, two rounds each."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in dict(tiny=large(), large=options.model_megabytes * 2**18).items():
            base, ledger_path = Path(folder) / f"{name}.safetensors", Path(folder) / f"{name}.l"
            TensorFile.create(base, {"w": Tensor(np.dtype(np.float32), (size,))}).__exit__()
            with ledger_of(options, "rademacher", size, 2) as ledger:
                ledger.export(ledger_path)
            out = Path(folder) / f"{name}.out"
            peaks[name] = peak(["experiments.replay", str(ledger_path), str(base), str(out)])
            out.unlink()
            base.unlink()
    return {
        "model_bytes": options.model_megabytes * 2**20,
        "peak_bytes": peaks["large"],
        "peak_bytes_of_a_tiny_model": peaks["tiny"],
        "memory_ratio": (peaks["large"] - peaks["tiny"]) / (options.model_megabytes * 2**20),
    }


def main(options: Options) -> None:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    result: dict[str, Any] = {"machine": timing.machine()}
    table = Table(title=f"{options.rounds} rounds, P = {options.num_perturbations}")
    for column in ("noise", "bare, M numbers/s", "replay, M numbers/s", "replay / bare"):
        table.add_column(column, justify="right")
    for distribution in ("normal", "rademacher"):
        found = result[distribution] = speed(options, distribution)
        table.add_row(
            distribution,
            f"{found['bare_numbers_per_second'] / 1e6:.0f}",
            f"{found['replay_numbers_per_second'] / 1e6:.0f}",
            f"{found['ratio']:.2f}",
        )
    console.print(result["machine"])
    console.print(table)
    if options.model_megabytes:
        found = result["memory"] = memory(options)
        console.print(
            f"peak memory of replaying a model of {options.model_megabytes} MiB: "
            f"{found['peak_bytes'] / 2**20:.0f} MiB, of a tiny one "
            f"{found['peak_bytes_of_a_tiny_model'] / 2**20:.0f} MiB: "
            f"{found['memory_ratio']:.1%} of the model"
        )
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
