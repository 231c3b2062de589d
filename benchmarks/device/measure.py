"""The measurements, a function a part: options of a case in, plain data out.

JAX and the library are imported by the process that measures, never by the one that plans: a TPU
serves one process at a time.
"""

import functools
import gc
import time
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from benchmarks import digest as digests
from benchmarks import noise as noises
from benchmarks import round as rounds
from benchmarks import timing
from hiso_jax import directions, models


def device() -> dict[str, Any]:
    """What the figures are taken on."""
    own = jax.devices()[0]
    return {"platform": own.platform, "kind": own.device_kind, "count": jax.device_count()}


def memory() -> dict[str, int]:
    """Bytes in use, the most there were, and the limit, where the device says."""
    stats = jax.devices()[0].memory_stats() or {}
    names = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    return {name: int(stats[name]) for name in names if name in stats}


def machine(tiny: bool = False) -> dict[str, Any]:
    """Matmul rate by dtype, at large square products, and bandwidth of a copy in place."""
    size, many = (256, 2) if tiny or jax.default_backend() == "cpu" else (8192, 10)
    found: dict[str, Any] = {"matmul_tflops": {}}
    for dtype in ("bfloat16", "float32"):
        key = jax.random.key(0)
        x = (jax.random.normal(key, (size, size)) * size**-0.5).astype(dtype)

        @jax.jit
        def product(x: jax.Array, y: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, many, lambda _, x: x @ y, x)

        seconds = timing.interleaved({"product": lambda x=x, f=product: f(x, x)}, 5)["product"]
        found["matmul_tflops"][dtype] = many * 2 * size**3 / seconds / 1e12
    found["bandwidth_gbytes"] = bandwidth(2**20 if tiny else 2**30) / 1e9
    precision = jax.config.values["jax_default_matmul_precision"]
    return found | {
        "machine": timing.machine(),
        "matmul_precision": str(precision or "JAX's default"),
        "memory": memory(),
    }  # fmt: skip


def bandwidth(size: int) -> float:
    """Bytes a second, read and written, of adding one to as many bytes of float32 in place."""
    held, many = [jnp.ones(size // 4)], 10
    step = jax.jit(lambda x: jax.lax.fori_loop(0, many, lambda i, x: x + 1, x), donate_argnums=0)

    def copy() -> jax.Array:
        held[0] = step(held[0])
        return held[0]

    return many * 2 * size / timing.interleaved({"copy": copy}, 5)["copy"]


def exactness(program: str | None = None, stages: Any = None) -> dict[str, Any]:
    """Digests against the CPU's."""
    from benchmarks.device import exactness as own

    return own.check_stages(stages) if program is None else own.check_program(program)


def overhead(**options: Any) -> dict[str, Any]:
    """A round against its bare forward passes."""
    before = memory()
    found = rounds.measure(rounds.Options(**options))
    after = memory()
    # A process remembers the most it ever had: of this case it is only if it has grown.
    most = after.get("peak_bytes_in_use", 0)
    grown = most > before.get("peak_bytes_in_use", 0)
    tokens = options["clients"] * options["batch"] * options["length"]
    return found | {"tokens": tokens, "peak_device_bytes": most if grown else None}


def throughput(of: str, **options: Any) -> dict[str, Any]:
    """Noise, digest or replay alone."""
    each = {"noise": _noise, "digest": _digest, "replay": _replay, "blocks": _blocks}
    return each[of](**options)


def _noise(**options: Any) -> dict[str, Any]:
    """Numbers a second of each law, drawn and added to weights in memory."""
    own = noises.Options(**options)
    width = jnp.dtype(own.dtype).itemsize
    rate = bandwidth(own.numbers * 4)
    return {
        "numbers_per_second": {law: 1e9 / ns for law, ns in noises.measure(own).items()},
        # What reading and writing the weights allows, if noise costs nothing.
        "memory_numbers_per_second": rate / (2 * width),
        "bandwidth_gbytes": rate / 1e9,
        "dtype": own.dtype,
    }


def _digest(**options: Any) -> dict[str, Any]:
    """Bytes a second of a state's digest, and its share of `advance`."""
    found = digests.measure(digests.Options(**options))
    rate = found["bytes"] / found["digest"]
    # It only reads, where a copy reads and writes.
    return found | {"gbytes": rate / 1e9, "bandwidth_gbytes": bandwidth(2**28) / 1e9,
                    "share_of_advance": found["digest"] / found["advance"]}  # fmt: skip


def _replayed(law: str, size: int, rounds: int) -> tuple[hj.Algorithm, hj.State, np.ndarray]:
    alg = hj.federated_hiso(lambda params, batch: jnp.float32(0), 1e-3, distribution=law)
    state = alg.init({"w": jnp.zeros((size // 2**10, 2**10))}, jax.random.key(0))
    records = np.random.default_rng(0).normal(size=(rounds, 1, 5)).astype(np.float32)
    return alg, state, records


def _replay(size: int, rounds: int) -> dict[str, Any]:
    """Numbers of noise a second in `alg.replay`, a program for all rounds, and in its noise."""
    found = {}
    for law in get_args(directions.Distribution):
        alg, state, records = _replayed(law, size, rounds)
        replay = jax.jit(alg.replay, compiler_options=hj.compiler_options())

        def bare(key: jax.Array, law: Any = law) -> jax.Array:
            def add(i: jax.Array, x: jax.Array) -> jax.Array:
                return x + directions.draw(directions.fold_in(key, i), x.shape, law)

            return jax.lax.fori_loop(0, 5 * rounds, add, jnp.zeros((size // 2**10, 2**10)))

        drawn = jax.jit(bare, compiler_options=hj.compiler_options())
        seconds = timing.interleaved(
            {"noise": lambda f=drawn: f(jax.random.key(0)),
             "replay": lambda f=replay, s=state, r=records: f(s, r).params}, 3,
        )  # fmt: skip
        numbers = 5 * rounds * size
        found[law] = {f"{k}_numbers_per_second": numbers / v for k, v in seconds.items()}
        found[law]["ratio"] = seconds["replay"] / seconds["noise"]
    return {"laws": found, "rounds": rounds, "size": size}


def _blocks(size: int, rounds: int) -> dict[str, Any]:
    """The same through a ledger and `hiso_jax.replay`, block by block, as a file is replayed."""
    from hiso_jax.ledger.replay import Replay

    found = {}
    for law in ("normal", "rademacher"):
        alg, state, records = _replayed(law, size, rounds)
        with hj.Ledger.create(":memory:", alg, state) as ledger:
            for record in records:
                ledger.append(record, np.zeros(2, np.uint32))  # the digest of no state
            replay = Replay(ledger)
        base = np.zeros(size, np.float32)

        def run(replay: Any = replay, base: np.ndarray = base) -> Any:
            step = min(2**24, size)
            return [replay.advance("w", i, base[i : i + step]) for i in range(0, size, step)]

        seconds = timing.interleaved({"replay": run}, 2)["replay"]
        found[law] = {"replay_numbers_per_second": 5 * rounds * size / seconds}
    return {"laws": found, "rounds": rounds, "size": size}


def chunk_options(shape: str, dtype: str, tokens: int, perturbations: int) -> rounds.Options:
    """One client's batch of so many tokens, in texts of 32 at most."""
    return rounds.Options(
        shape=shape,  # pyright: ignore
        dtype=dtype,  # pyright: ignore
        clients=1,
        batch=max(tokens // 32, 1),
        length=min(tokens, 32),
        num_perturbations=perturbations,
        method="decomfl",
        lazy=True,
    )


def chunk_losses(model: models.Model, chunk: int, count: int) -> Any:
    """(params, key, batch) -> losses of `count` perturbations, `chunk` of them in one batch."""
    loss_fn = rounds.loss_of(model)

    def moved(params: Any, key: jax.Array, batch: Any, p: jax.Array) -> jax.Array:
        direction, leaves = directions.direction_key(key, 0, 0, p), hj.trees.select(params)
        own = directions.noise(direction, leaves, "rademacher")
        return loss_fn(directions.perturb(params, own, 1e-3), batch)

    def losses(params: Any, key: jax.Array, batch: Any) -> jax.Array:
        one = functools.partial(moved, params, key, batch)
        if chunk == 1:
            return jax.lax.map(one, jnp.arange(count))
        return jax.lax.map(jax.vmap(one), jnp.arange(count).reshape(-1, chunk))

    return losses


def chunks(
    shape: str, dtype: str, tokens: int, perturbations: int, chunks: list[int], repeats: int
) -> dict[str, Any]:
    """Milliseconds a perturbation when so many are evaluated in one batch, by `vmap`.

    Each chunk holds as many perturbed copies of the parameters. Beside it `lazy`, the library's
    own probe, which perturbs a layer as it is used, one perturbation after another.
    """
    options = chunk_options(shape, dtype, tokens, perturbations)
    model = models.from_config(rounds.config(shape), jax.random.key(0), jnp.dtype(dtype))
    data = jax.device_put(rounds.batches(options))
    alg, compiler = rounds.algorithm(model, options), hj.compiler_options()
    key = jax.random.key(0)
    programs: dict[str, tuple[Any, ...]] = {"lazy": (alg.probe, alg.init(model.params, key), data)}
    for chunk in chunks:
        own = chunk_losses(model, chunk, perturbations)
        batch = jax.tree.map(lambda x: x[0, 0], data)
        programs[str(chunk)] = (own, model.params, key, batch)
    milliseconds, failed = {}, {}
    for name, (function, *given) in programs.items():
        call = functools.partial(jax.jit(function, compiler_options=compiler), *given)
        try:
            seconds = timing.interleaved({name: call}, repeats)[name]
            milliseconds[name] = 1e3 * seconds / perturbations
        except Exception as error:  # too large a chunk runs out of memory; the others are figures
            failed[name] = (str(error).splitlines() or [repr(error)])[0][:200]
    ours = {k: v for k, v in milliseconds.items() if k != "lazy"}
    if not ours:
        raise RuntimeError(f"no chunk could be evaluated: {failed}")
    fastest = min(ours, key=lambda k: ours[k])
    return {"shape": shape, "tokens": options.batch * options.length, "dtype": dtype,
            "perturbations": perturbations, "milliseconds": milliseconds, "failed": failed,
            "fastest": int(fastest)}  # fmt: skip


def jobs(of: str, **options: Any) -> dict[str, Any]:
    """Seconds a round of a job."""
    from benchmarks.device import jobs as own

    return own.measure(of, **options)


def peers(**options: Any) -> dict[str, Any]:
    """Ours and PyTorch's, each in a process of its own."""
    from benchmarks.device import torchside as own

    return own.measure(**options)


def run(part: str, options: dict[str, Any]) -> dict[str, Any]:
    """Measure a case, and leave no memory behind."""
    began = time.monotonic()
    try:
        return globals()[part](**options) | {"case_seconds": time.monotonic() - began}
    finally:
        if part not in ("exactness", "peers"):  # small programs that others use again; no JAX
            jax.clear_caches()
            gc.collect()
