"""A small OPT of your own, for machines without a hub: trained from scratch, saved as a folder.

python -m experiments.pretrain
python -m experiments.finetune --model runs/pretrain
"""

import ast
import contextlib
import dataclasses
import os
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.progress import track

from hiso_jax import models
from hiso_jax._engine import checks
from hiso_jax.tasks import data, problem, text
from hiso_jax.train import report
from hiso_jax.train.report import console


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a byte-level BPE and a small OPT on a text, with AdamW."""

    data: Path | None = None
    """Text, or a table with a column `text`; by default docstrings, of this Python's library and of
    the packages that are installed with this one."""
    out: Path = Path("runs/pretrain")
    """Hugging Face folder to write."""
    steps: int = 450
    """Steps of AdamW."""
    batch_size: int = 32
    """Pieces a step."""
    length: int = 96
    """Tokens of a piece."""
    learning_rate: float = 1e-3
    """Peak, after a tenth of the steps; then a cosine to 0."""
    vocabulary: int = 4096
    """Tokens of the BPE."""
    width: int = 256
    """Hidden width; inner layers are four times as wide, heads 64."""
    layers: int = 5
    """Layers."""
    seed: int = 0
    """Of weights and batches."""


PACKAGES = ("numpy", "scipy", "sklearn", "flax", "optax", "matplotlib")
"""Whose docstrings are read after the standard library's; those not installed are left out."""
ENOUGH = 4_000_000
"""Characters, about a million tokens, after which no more is read."""


def corpus() -> list[str]:
    """Whole docstrings of a sentence and more, each once; nothing is imported or executed."""
    places = sysconfig.get_paths()
    library = Path(places["stdlib"])
    folders = [Path(places["purelib"]) / name for name in PACKAGES]
    paths = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts]
    paths += [p for folder in folders for p in sorted(folder.rglob("*.py"))]
    found: dict[str, None] = {}
    size = 0
    for path in track(paths, "reading docstrings", console=console, transient=True):
        if size > ENOUGH or {"test", "tests"} & set(path.parts):
            continue
        with contextlib.suppress(SyntaxError, ValueError):  # templates, and files of other Pythons
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    whole = ast.get_docstring(node) or ""
                    if len(whole) > 60 and whole not in found:
                        found[whole] = None
                        size += len(whole)
    texts = list(found)  # held out is the end: let it be of all packages
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def tokenizer_of(texts: list[str], vocabulary: int, length: int) -> Any:
    """Train a byte-level BPE that begins every text with ``<s>``."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>"]
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=specials)
    bpe._tokenizer.post_processor = TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        model_max_length=length,
    )  # fmt: skip


def check(options: Options) -> None:
    """Raise unless the options make a model and there is a place for it, before it is trained."""
    for name in ("steps", "layers", "width", "batch_size"):
        checks.count(f"--{name.replace('_', '-')}", getattr(options, name))
    for name, least, most in (
        ("length", 2, 512),
        ("vocabulary", 260, 2**20),
        ("seed", 0, 2**32 - 1),
    ):
        checks.number(f"--{name}", getattr(options, name), least, most)
    checks.number("--learning-rate", options.learning_rate, 0, 1e38, above=True)
    if options.width % max(options.width // 64, 1):
        raise ValueError(
            f"--width: expected less than 128 or a multiple of 64, got {options.width}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    if not os.access(options.out, os.W_OK):
        raise ValueError(f"--out: {options.out} cannot be written to")


def run(options: Options) -> dict[str, float]:
    """Train, save, and return the perplexity on held-out pieces before and after."""
    from transformers import OPTConfig

    check(options)
    if options.data is None:
        texts = corpus()
    else:
        rows = data.read_file(options.data)
        if not rows or "text" not in rows[0]:
            raise ValueError(f"--data: {options.data} has no column 'text', or no rows")
        for i, row in enumerate(rows):
            data.check_text(f"--data: {options.data}, row {i + 1}", row["text"])
        texts = [str(row["text"]) for row in rows if row["text"] not in (None, "")]
    tokenizer = tokenizer_of(texts, options.vocabulary, 512)
    # One long text, documents apart: short ones would be mostly padding.
    ids = np.concatenate([[*tokenizer(t, verbose=False)["input_ids"], 2] for t in texts]).astype(
        np.int32
    )
    count = len(ids) // options.length
    if count < 20:
        raise ValueError(f"--data: expected at least {20 * options.length} tokens, got {len(ids)}")
    pieces = ids[: count * options.length].reshape(count, options.length)
    train, held = pieces[: -max(count // 20, 1)], pieces[-max(count // 20, 1) :]
    config = OPTConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, ffn_dim=4 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=max(options.width // 64, 1),
        word_embed_proj_dim=options.width, max_position_embeddings=512,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = models.from_config(config, jax.random.key(options.seed))
    hidden = lambda p, b: model.hidden(p, b["input_ids"], b["attention_mask"])  # noqa: E731
    loss_fn, score, _ = problem.language(hidden, model.head)
    warm = max(options.steps // 10, 1)
    rate = optax.warmup_cosine_decay_schedule(0, options.learning_rate, warm, options.steps + 1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))

    def batch(rows: np.ndarray) -> text.Arrays:
        ones, target = np.ones(rows.shape, np.int32), np.ones(rows.shape, np.int32)
        target[:, 0] = 0
        return {"input_ids": rows, "attention_mask": ones, "target": target,
                "weight": np.ones(len(rows), np.float32)}  # fmt: skip

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    score = jax.jit(score)

    def perplexity(params: Any) -> float:
        sums = [score(params, batch(held[i : i + 1])) for i in range(min(len(held), 64))]
        total = jax.tree.map(lambda *x: sum(x), *sums)
        return float(jnp.exp(total["loss"] / total["count"]))

    params, state = model.params, tx.init(model.params)
    rng, before, begin = np.random.default_rng(options.seed), perplexity(params), time.time()
    with report.progress() as bar:
        task = bar.add_task("AdamW", total=options.steps, status="compiling")
        for done in range(1, options.steps + 1):
            rows = train[rng.integers(0, len(train), options.batch_size)]
            params, state, loss = step(params, state, batch(rows))
            bar.update(task, completed=done, status=f"loss {float(loss):.3f}")
    models.save_pretrained(model, options.out, params)  # before it is measured
    tokenizer.save_pretrained(options.out)
    result = dict(
        parameters=sum(x.size for x in jax.tree.leaves(params)), tokens=len(ids),
        perplexity_before=before, perplexity=perplexity(params), seconds=time.time() - begin,
    )  # fmt: skip
    report.write_json(options.out / "pretrain.json", result)
    report.say(report.dumps(result, 2))
    report.say("Written to ", f"{options.out}/")
    return result


if __name__ == "__main__":
    with report.door():
        run(tyro.cli(Options))
