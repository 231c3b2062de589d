"""A whole federated round against the bare forward passes of the same tokens.

python -m benchmarks.round --shape opt-125m --clients 2 --batch 32 --length 32 --json
"""

import dataclasses
import json
import resource
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from benchmarks import timing
from hiso_jax import directions, models
from hiso_jax._engine import trees
from hiso_jax.models import subsets
from hiso_jax.train.work import multiplications

SHAPES: dict[str, dict[str, int]] = {  # of OPT; vocabulary 50,272 except where it is given
    "opt-1m": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048),
    "opt-10m": dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=8, vocab_size=12288),
    "opt-30m": dict(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, vocab_size=40000),
    "opt-125m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "opt-350m": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "opt-1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32),
}
REAL: dict[str, tuple[str, dict[str, int]]] = {
    "smollm2-135m": ("Llama", dict(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152)),
    "gemma3-270m": ("Gemma3Text", dict(
        hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, vocab_size=262144, sliding_window=512)),
}  # fmt: skip
"""Models as they are published: their kind, and what their transformers config says."""
WORDS = (3, 4)
"""Tokens of the two labels."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Time and memory of a round, on a decoder of random weights and random tokens."""

    shape: Literal["opt-1m", "opt-10m", "opt-30m", "opt-125m", "opt-350m", "opt-1.3b",
                   "smollm2-135m", "gemma3-270m"] = "opt-125m"  # fmt: skip
    """Size of the model."""
    clients: int = 2
    """C."""
    local_steps: int = 1
    """K."""
    num_perturbations: int = 5
    """P."""
    batch: int = 32
    """Examples of a client in a local step."""
    length: int = 32
    """Tokens of an example."""
    method: Literal["hiso", "decomfl"] = "hiso"
    """The rule."""
    distribution: directions.Distribution = "rademacher"
    """Noise."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters."""
    lazy: bool = True
    """Whether layers are perturbed as they are used."""
    repeats: int = 3
    """Times that each is timed, in turns."""
    json: bool = False
    """Print one JSON line last."""


def config(shape: str) -> Any:
    """The transformers config of a shape."""
    import transformers

    if shape in REAL:
        kind, own = REAL[shape]
        return getattr(transformers, f"{kind}Config")(**own, tie_word_embeddings=True)
    own: dict[str, Any] = dict(vocab_size=50272) | SHAPES[shape]
    width = own["hidden_size"]
    return transformers.OPTConfig(**own, ffn_dim=4 * width, word_embed_proj_dim=width)


def batches(options: Options) -> dict[str, np.ndarray]:
    """Random tokens [C, K, B, T] and labels [C, K, B]."""
    shape = (options.clients, options.local_steps, options.batch)
    random, vocabulary = np.random.default_rng(0), config(options.shape).vocab_size
    tokens = random.integers(5, vocabulary, (*shape, options.length), dtype=np.int32)
    return {"input_ids": tokens, "label": random.integers(0, 2, shape, dtype=np.int32)}


def loss_of(model: models.Model) -> Any:
    """Cross-entropy of the label's word at the last position: what prompted tasks compute."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        ids = batch["input_ids"]
        x = model.hidden(params, ids, jnp.ones_like(ids))[:, -1]
        logits = model.head(params, x, jnp.array(WORDS))
        picked = jnp.take_along_axis(logits, batch["label"][:, None], -1)[:, 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    return loss_fn


def peak_rss() -> int:
    """Most bytes that this process ever had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def shapes(options: Options) -> tuple[Any, Any]:
    """Loss and parameters of a model, of which nothing is computed."""
    loss = []

    def make() -> Any:
        made = models.from_config(
            config(options.shape), jax.random.key(0), jnp.dtype(options.dtype)
        )
        loss.append(loss_of(made))
        return made.params

    params = jax.eval_shape(make)
    return loss[0], params


def flops(options: Options) -> float:
    """Floating-point operations of the matrix products of a round's forward passes."""
    loss_fn, params = shapes(options)
    one = jax.tree.map(lambda x: x[0, 0], batches(options))
    passes = (options.num_perturbations + 1) * options.clients * options.local_steps
    return 2.0 * passes * multiplications(loss_fn, params, one)


def moved_bytes(options: Options) -> float:
    """Bytes a round cannot help to move, with a normalizing rule.

    Every perturbed pass reads the layers and their curvature; the update reads and writes
    all parameters and their curvature.
    """
    leaves, steps = trees.named(shapes(options)[1]), options.local_steps
    rule = 4 if options.method == "hiso" else 0
    moved = {name: x.size * (x.dtype.itemsize + rule) for name, x in leaves.items()}
    layers = sum(size for name, size in moved.items() if subsets.stacked(name))
    passes = options.num_perturbations * steps * (options.clients if steps > 1 else 1)
    return float(passes * layers + 2 * sum(moved.values()))


COPIED = 2**28
"""Bytes whose copying is timed: more than any cache holds."""


def ceilings(options: Options) -> tuple[float, float]:
    """The machine's matmul rate (operations a second) and copy bandwidth (bytes a second)."""
    width, dtype = config(options.shape).hidden_size, jnp.dtype(options.dtype)
    rows = options.batch * options.length * (options.clients if options.local_steps == 1 else 1)
    many = 10
    # Random numbers, since an accelerator draws less power, and is faster, on zeros and ones; and
    # two products, up and down, so that no part of either can be left out.
    shapes = [(rows, width), (width, 4 * width), (4 * width, width)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, up, down = (
        (jax.random.normal(key, shape) * shape[0] ** -0.5).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )

    @jax.jit
    def product(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, many, lambda _, x: (x @ up) @ down, x)

    copied = [jnp.ones(COPIED // dtype.itemsize, dtype)]
    step = jax.jit(lambda x: jax.lax.fori_loop(0, many, lambda i, x: x + 1, x), donate_argnums=0)

    def copy() -> jax.Array:
        copied[0] = step(copied[0])
        return copied[0]

    seconds = timing.interleaved({"product": lambda: product(x, up, down), "copy": copy}, 5)
    rate = many * 2 * 2 * rows * 4 * width**2 / seconds["product"]
    return rate, many * 2 * COPIED / seconds["copy"]


def algorithm(model: models.Model, options: Options) -> hj.Algorithm:
    """The algorithm that is measured."""
    make = {"hiso": hj.federated_hiso, "decomfl": hj.decomfl}[options.method]
    return make(
        loss_of(model),
        1e-6,
        local_steps=options.local_steps,
        num_perturbations=options.num_perturbations,
        distribution=options.distribution,
        lazy=options.lazy,
    )


def start(model: models.Model, options: Options) -> hj.State:
    """A state of its own, that a round may be given to keep."""
    params = jax.tree.map(jnp.copy, model.params)
    return algorithm(model, options).init(params, jax.random.key(0))


def program(model: models.Model, options: Options) -> Any:
    """A round, compiled."""
    alg = algorithm(model, options)
    state = jax.eval_shape(alg.init, model.params, jax.random.key(0))
    compiler: Any = hj.compiler_options()
    return jax.jit(alg.round, donate_argnums=0).lower(state, batches(options)).compile(compiler)


def measure(options: Options) -> dict[str, Any]:
    """All figures of one configuration."""
    model = models.from_config(config(options.shape), jax.random.key(0), jnp.dtype(options.dtype))
    loss_fn = loss_of(model)
    data = jax.device_put(batches(options))
    steps, passes = options.local_steps, options.num_perturbations + 1
    own = [jax.tree.map(lambda x, k=k: x[:, k], data) for k in range(steps)]
    size = sum(x.size for x in jax.tree.leaves(model.params))
    held = sum(x.nbytes for x in jax.tree.leaves(model.params))

    every = jax.jit(lambda params, batch: jax.vmap(loss_fn, (None, 0))(params, batch))
    forward = every.lower(model.params, own[0]).compile()
    jax.block_until_ready(forward(model.params, own[0]))
    bare_rss = peak_rss()

    began = time.perf_counter()
    step = program(model, options)
    compile_seconds = time.perf_counter() - began
    states = [algorithm(model, options).init(model.params, jax.random.key(0))]
    del model  # its buffers are the state's, which every round reuses

    def bare() -> list[jax.Array]:
        return [forward(states[0].params, batch) for batch in own for _ in range(passes)]

    def round() -> jax.Array:
        states[0], metrics = step(states[0], data)
        return metrics.record

    seconds = timing.interleaved({"bare": bare, "round": round}, options.repeats)
    programs: list[Any] = [step, forward]
    temp, bare_temp = (each.memory_analysis().temp_size_in_bytes for each in programs)
    rate, bandwidth = ceilings(options)
    work = flops(options)
    floor = work / rate + moved_bytes(options) / bandwidth
    scalars = steps * options.num_perturbations
    rule = sum(x.nbytes for x in jax.tree.leaves(states[0].rule))
    return dict(
        dataclasses.asdict(options),
        machine=timing.machine(),
        parameters=size,
        overhead=seconds["round"] / seconds["bare"],
        temp_memory=(temp - bare_temp) / held,
        rule_memory=rule / held,
        compile_seconds=compile_seconds,
        round_seconds=seconds["round"],
        bare_seconds=seconds["bare"],
        floor_seconds=floor,
        matmul_gflops=rate / 1e9,
        bandwidth_gbytes=bandwidth / 1e9,
        round_gflops=work / seconds["round"] / 1e9,
        matmul_share=work / seconds["round"] / rate,
        peak_rss_bytes=peak_rss(),
        bare_peak_rss_bytes=bare_rss,
        scalars_per_client=scalars,
        bytes_per_client=4 * scalars,
    )


def table(found: dict[str, Any]) -> Any:
    """The figures as a table of rich's."""
    from rich.table import Table

    shown = Table(
        title=f"{found['shape']}, {found['clients']} clients x {found['batch']} x "
        f"{found['length']} tokens, K = {found['local_steps']}, P = "
        f"{found['num_perturbations']}, {found['distribution']}, {found['dtype']}"
    )
    shown.add_column("")
    shown.add_column("", justify="right")
    rows = {
        "round": f"{found['round_seconds']:.3f} s",
        "bare forward passes": f"{found['bare_seconds']:.3f} s",
        "floor": f"{found['floor_seconds']:.3f} s",
        "overhead (round / bare)": f"{found['overhead']:.2f}",
        "temporary memory beyond a forward pass": f"{found['temp_memory']:.2f} copies",
        "the rule's state": f"{found['rule_memory']:.2f} copies",
        "peak resident memory": f"{found['peak_rss_bytes'] / 2**30:.2f} GiB",
        "compilation": f"{found['compile_seconds']:.1f} s",
        "matrix products alone": f"{found['matmul_gflops']:.0f} GFLOP/s",
        "the round's": f"{found['round_gflops']:.0f} GFLOP/s",
        "a client sends": f"{found['scalars_per_client']} scalars, {found['bytes_per_client']} B",
    }
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def main(options: Options) -> None:
    """Measure and print."""
    from rich.console import Console

    console = Console()
    found = measure(options)
    console.print(found["machine"])
    console.print(table(found))
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
