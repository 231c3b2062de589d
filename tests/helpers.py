"""Small problems, comparisons and real processes shared by the tests."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import hiso_jax as hj
from hiso_jax._engine import trees
from hiso_jax.algorithm import algorithm
from hiso_jax.ledger import replay

# Odd shapes on purpose: widths around a word of 32 signs, empty, scalar, long and flat.
SHAPES = [(), (1,), (7,), (33,), (3, 5), (64,), (0, 3), (5, 3, 2, 2), (129, 257), (301, 97),
          (1000, 43), (512, 256), (2, 100, 11), (31, 32), (8, 1), (40, 320)]  # fmt: skip


def odd_tree(seed: int = 0) -> dict[str, Any]:
    """A tree of more than 250 thousand parameters in odd shapes."""
    rng = np.random.default_rng(seed)
    leaves = {
        f"leaf{i}": jax.device_put(np.float32(rng.normal(size=s))) for i, s in enumerate(SHAPES)
    }
    return {"first": leaves, "second": [jnp.ones((16, 17)), {"deep": jnp.full((3, 3), 0.5)}]}


def odd_loss(params: Any, batch: Any) -> jax.Array:
    """Loss on any tree, of any dtypes and lazy, that depends on every leaf and on the batch."""
    angle = batch.mean()
    wide = [jnp.asarray(x).astype(jnp.float32) for x in jax.tree.leaves(params)]
    terms = [(jnp.tanh(x) * jnp.cos(x * angle + angle)).sum() for x in wide]
    return sum(terms, jnp.float32(0)) / 1000


def quadratic_loss(params: Any, batch: Any) -> jax.Array:
    """Mean squared distance of ``params["w"]`` to the rows of the batch."""
    return ((params["w"] - batch) ** 2).mean()


def trunk(params: Any, batch: Any) -> Any:
    """The lower layer of a small network."""
    return {"kept": jnp.tanh(batch["x"] @ params["w"]), "y": batch["y"]}


def head(params: Any, kept: Any) -> jax.Array:
    """Its upper layer, and the loss."""
    return ((kept["kept"] @ params["v"] - kept["y"]) ** 2).mean()


def network_loss(params: Any, batch: Any) -> jax.Array:
    """Loss of the small network."""
    return head(params, trunk(params, batch))


class Problem(NamedTuple):
    """A loss and parameters of it."""

    loss_fn: Any
    params: Any


def _mixed() -> dict[str, Any]:
    """A scalar, an empty leaf, rows, layers, a number that is no parameter."""
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "empty": (0, 3), "odd": (33,), "rows": (61, 97), "stack": (4, 32, 48)}
    leaves = {n: jax.device_put(np.float32(rng.normal(size=s))) for n, s in shapes.items()}
    return leaves | {"frozen": jnp.ones(77), "step": jnp.int32(3)}


# Programs of the same loss and shapes are compiled once for all files: use these before others.
PROBLEMS = {
    "quadratic": Problem(quadratic_loss, {"w": jnp.arange(33.0) / 10}),
    "network": Problem(
        network_loss, {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "v": jnp.linspace(0, 1, 4)}
    ),
    "odd": Problem(odd_loss, _mixed()),
}


def nothing(params: Any, batch: Any) -> Any:
    """A trunk that keeps the batch: what is above is all of the model."""
    return batch


def laid_out(alg: hj.Algorithm, **options: Any) -> hj.Algorithm:
    """The same algorithm, with leaves cut in another way; what is large, here, is small."""
    layout = alg.spec.layout._replace(**{"large": 2**11, **options})
    return algorithm(alg.spec._replace(layout=layout))


def refuse_with(number: int) -> Any:
    """What a file system does that cannot do something, or will not now."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def replay_in_blocks(ledger: hj.Ledger, params: Any, rule: Any = None, most: int = 10**9) -> Any:
    """The model after a ledger, in parts of at most so many numbers; the digest is the ledger's."""
    parts = replay.Replay(ledger, rule)
    flat = {n: np.asarray(x).reshape(-1) for n, x in trees.named(params).items()}
    cuts = {n: [(i, x[i : i + most]) for i in range(0, x.size, most)] for n, x in flat.items()}
    for name, own in cuts.items():
        for place, x in own:
            parts.read(name, place, x)
    parts.check_base()
    moved = dict(flat)
    for name, own in cuts.items():
        if parts.leaves[name].trainable and own:
            moved[name] = np.concatenate([parts.advance(name, *part) for part in own])
    assert parts.digest == parts.wanted
    shaped = {n: moved[n].reshape(np.shape(x)) for n, x in trees.named(params).items()}
    return trees.merge(params, shaped)


def bits(tree: Any) -> list[bytes]:
    """The bit patterns of all leaves."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(tree)]


def assert_same_bits(first: Any, second: Any) -> None:
    """Compare two pytrees bit by bit and name the leaves that differ."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(first)]
    pairs = zip(names, bits(first), bits(second), strict=True)
    assert [name for name, a, b in pairs if a != b] == []


CORRECT = {  # integers, choices and copies; and the float operations that IEEE 754 rounds
    "add", "sub", "mul", "neg", "abs", "sign", "max", "min", "clamp", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "xor", "not", "shift_left", "shift_right_logical", "rem", "div",
    "shift_right_arithmetic", "select_n", "convert_element_type", "bitcast_convert_type", "iota",
    "is_finite", "reduce_and", "reduce_or", "broadcast_in_dim", "reshape", "squeeze", "slice",
    "dynamic_slice", "dynamic_update_slice", "gather", "concatenate", "pad", "expand_dims",
    "transpose", "copy", "stack", "optimization_barrier", "random_wrap", "random_unwrap",
    "nextafter", "platform_index", "reduce_sum", "stop_gradient",
    "split", "unstack", "population_count",
}  # fmt: skip
CONTROL = {"jit", "pjit", "scan", "while", "cond", "custom_jvp_call", "custom_vjp_call",
           "closed_call", "core_call", "random_seed"}  # fmt: skip


def equations(jaxpr: Any) -> Any:
    """All operations of a program, also of those inside others."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from equations(inner)


REVIEWS = [
    {"review": f"{'good fine lovely' if i % 3 else 'bad awful poor'} film number {i}",
     "mood": "up" if i % 3 else "down", "who": f"w{i % 4}"}
    for i in range(120)
]  # fmt: skip


"""Rows with a text, a label and a client."""


def small_config(kind: str) -> Any:
    """A config of transformers, of a model of three narrow layers."""
    import transformers

    small = dict(vocab_size=640, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    wide = dict(intermediate_size=96)
    opt = dict(ffn_dim=128, max_position_embeddings=32)
    return {
        "opt": lambda: transformers.OPTConfig(**small, **opt, word_embed_proj_dim=64),
        "opt-350m": lambda: transformers.OPTConfig(
            **small, **opt, word_embed_proj_dim=32, do_layer_norm_before=False
        ),
        "llama": lambda: transformers.LlamaConfig(
            **small, **wide, num_key_value_heads=2, tie_word_embeddings=False
        ),
        "bert": lambda: transformers.BertConfig(**small, **wide, max_position_embeddings=32),
    }[kind]()


def tiny_model(path: Path) -> Path:
    """Write a small random OPT with a byte-level BPE of its own, as a Hugging Face folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import OPTConfig, PreTrainedTokenizerFast

    from hiso_jax import models

    bpe = ByteLevelBPETokenizer()
    corpus = [json.dumps(row) + " up down great terrible" for row in REVIEWS]
    bpe.train_from_iterator(corpus, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.save_pretrained(path)
    config = OPTConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=80, word_embed_proj_dim=32, init_std=0.2,
    )  # fmt: skip
    models.save_pretrained(models.from_config(config, jax.random.key(0)), path)
    return path


def tiny_bert(path: Path) -> Path:
    """A small random encoder without a head, with a tokenizer of its own."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, PreTrainedTokenizerFast

    from hiso_jax import models

    made = BertWordPieceTokenizer()
    made.train_from_iterator([json.dumps(row) for row in REVIEWS], vocab_size=200)
    PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        unk_token="[UNK]", mask_token="[MASK]",
    ).save_pretrained(path)  # fmt: skip
    config = BertConfig(
        vocab_size=made.get_vocab_size(), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=48, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    models.save_pretrained(models.from_config(config, jax.random.key(0)), path)
    return path


def tiny_roberta(path: Path) -> Path:
    """The same with a masked-language-model head."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig

    from hiso_jax import models

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    corpus = [json.dumps(row) + " bad good" for row in REVIEWS]
    bpe.train_from_iterator(corpus, vocab_size=400, special_tokens=special)
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))  # pyright: ignore
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>",
        sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    ).save_pretrained(path)  # fmt: skip
    config = RobertaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=60, type_vocab_size=1,
        initializer_range=0.2, architectures=["RobertaForMaskedLM"],
    )  # fmt: skip
    models.save_pretrained(models.from_config(config, jax.random.key(0)), path)
    return path


RANDOM_BERT = dict(
    vocab_size=99, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=36,
    max_position_embeddings=20, type_vocab_size=2, layer_norm_eps=1e-12,
)  # fmt: skip


def random_folder(folder: Path) -> Path:
    """A Hugging Face folder of a small random BERT, made without torch."""
    from transformers import BertConfig

    config = BertConfig(**RANDOM_BERT)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json_string())
    rng, width, inner = np.random.default_rng(0), 24, 36
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (99, width),
        "embeddings.position_embeddings.weight": (20, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(3):
        layer = f"encoder.layer.{i}"
        dense = {f"attention.self.{n}": (width, width) for n in ("query", "key", "value")}
        dense |= {"attention.output.dense": (width, width), "intermediate.dense": (inner, width),
                  "output.dense": (width, inner)}  # fmt: skip
        for name, shape in dense.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    tensors = {n: rng.normal(size=s).astype(np.float32) * 0.3 for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 440449768\n"


def load(folder: Path, **options: Any) -> Any:
    """Read a model's folder."""
    from hiso_jax import models

    return models.from_pretrained(folder, progress=False, **options)


def refused(folder: Path, text: str, kind: Any = ValueError) -> None:
    """One line, which names the folder and what is wrong; and nothing is written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(kind, match=text) as caught:
        load(folder)
    said = str(caught.value)
    assert str(folder) in said and "\n" not in said and len(said) < 1000
    assert sorted(folder.rglob("*")) == before


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let jobs make no pictures, which take longer than a short run."""
    from hiso_jax.train import page, report

    for name in ("draw", "draw_split"):
        patch.setattr(report, name, lambda *_: None)
    patch.setattr(page, "svg", lambda *_: "")


ROOT = Path(__file__).parents[1]
# A job sees the machine as it is, without the host devices of the tests; jobs compile the same
# small programs over and over, so even those are kept.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
    "COLUMNS": "300",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def start(
    job: str, *arguments: str, environment: dict[str, str] = ENVIRONMENT, **options: Any
) -> subprocess.Popen[str]:
    """Start ``python -m experiments.<job>`` as a process of its own."""
    command = [sys.executable, "-m", f"experiments.{job}", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def here(job: str, *arguments: str, code: int = 0) -> str:
    """``python -m experiments.<job>`` without a process; return what it says."""
    said, found = _here(job, *arguments)
    assert found == code, said
    return said


def refuse(job: str, *arguments: str) -> str:
    """As `here`, of what exits at once; return also how."""
    said, code = _here(job, *arguments)
    return f"{said} exit {code}"


def _here(job: str, *arguments: str) -> tuple[str, int]:
    output, argv, code = io.StringIO(), sys.argv, 0
    sys.argv = ["", *arguments]
    try:
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # imported twice
        ):
            runpy.run_module(f"experiments.{job}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        output.write(end.code if isinstance(end.code, str) else "")
    finally:
        sys.argv = argv
    return " ".join(output.getvalue().split()), code


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the process; return what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def remount(disk: Path, *options: str) -> None:
    """Change the fixture `disk`: its size, or whether it may be written to."""
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(disk)], check=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on what happened to it."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = {k: v for k, v in summary.items() if "seconds" not in k}
    weights = (folder / "model.safetensors").read_bytes()
    return kept | {"rows": rows(folder), "weights": weights}
