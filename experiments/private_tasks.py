"""Small problems over many clients, for `experiments.private`: what is trained is linear."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax import models
from hiso_jax._engine import files
from hiso_jax.federation import Arrays, Clients
from hiso_jax.models import adapters
from hiso_jax.tasks import images, problem, splits
from hiso_jax.train import finetune

ALPHA = 1.0
"""Dirichlet parameter of the clients' label shares on MNIST."""
FEATURES = Path("runs/sst2-minilm.npz")
"""Sentence embeddings, computed once."""


def linear(name: str, parts: dict[str, Arrays], own: list[np.ndarray]) -> problem.Problem:
    """Softmax regression from zeros on column ``x`` [N, D] to ``label`` [N]."""
    train = parts["train"]
    width, labels = train["x"].shape[1], int(train["label"].max()) + 1
    params = {"weight": jnp.zeros((width, labels)), "bias": jnp.zeros(labels)}
    logits = lambda params, batch: batch["x"] @ params["weight"] + params["bias"]  # noqa: E731
    loss_fn, score = problem.classification(logits)
    picks = np.concatenate(own)
    return problem.Problem(
        name=name,
        params=params,
        loss_fn=loss_fn,
        score=score,
        clients=Clients.joined(
            [f"client {i}" for i in range(len(own))],
            [len(part) for part in own],
            {k: v[picks] for k, v in train.items()},
        ),
        dev=parts["dev"],
        test=parts["test"],
        save=lambda folder, params: None,
    )


def pooled(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels: float32 [N, 196] of bytes [N, 28, 28, 1]."""
    normal = (pixels / 255 - 0.1307).astype(np.float32) / 0.3081
    return normal.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)


@functools.lru_cache(1)
def _digits(data: Path | None) -> dict[str, Arrays]:
    parts = (images.of_hub() if data is None else images.of_idx(data)).parts
    return {n: {"x": pooled(c["image"]), "label": c["label"]} for n, c in parts.items()}


@functools.lru_cache(1)
def _sentences(data: Path) -> dict[str, Arrays]:
    """Embeddings of unit length times sqrt(384), by all-MiniLM-L6-v2, which stays as it is."""
    text = {n: (data / f"{n}.tsv").read_text("utf-8") for n in ("train", "dev", "test")}
    mark = hashlib.sha256("\n".join(text.values()).encode()).hexdigest()
    lines = {n: [line.rsplit("\t", 1) for line in t.splitlines()] for n, t in text.items()}
    labels = {n: np.array([int(label) for _, label in own], np.int32) for n, own in lines.items()}
    if FEATURES.is_file() and str((found := np.load(FEATURES))["mark"]) == mark:
        return {n: {"x": found[n], "label": labels[n]} for n in lines}
    folder = finetune.bundled_model()
    model, tokenizer = models.from_pretrained(folder), models.load_tokenizer(folder)
    embed = jax.jit(functools.partial(adapters.sentence_embedding, model))
    made = {n: _embedded(embed, model, tokenizer, [s for s, _ in own]) for n, own in lines.items()}
    FEATURES.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(FEATURES) as part, open(part, "wb") as file:
        every: dict[str, Any] = {"mark": np.array(mark), **made}
        np.savez(file, **every)
    return {n: {"x": made[n], "label": labels[n]} for n in lines}


def _embedded(embed: Any, model: Any, tokenizer: Any, sentences: list[str]) -> np.ndarray:
    """float32 [N, D]; sentences of like length go together."""
    order = np.argsort([len(s) for s in sentences], kind="stable")
    out = np.zeros((len(sentences), model.config.hidden_size), np.float32)
    for start in range(0, len(order), 64):
        own = order[start : start + 64]
        own = np.append(own, np.repeat(own[-1:], 64 - len(own)))  # one shape
        longest = max(len(tokenizer(sentences[i])["input_ids"]) for i in own)
        length = next(n for n in (16, 32, 64, 128) if n >= longest)
        batch = adapters.tokens(tokenizer, [sentences[i] for i in own], length)
        out[own] = adapters.unit(embed(model.params, batch)) * np.sqrt(out.shape[1])
    return out


def build(task: str, data: dict[str, Path | None], clients: int) -> problem.Problem:
    """A task over so many clients.

    Args:
      task: ``"mnist"``: 14 x 14 pixels, 1,970 parameters, unequal shares of labels; ``"sst2"``:
        384 numbers a sentence, 770 parameters, sentences at random.
      data: folder of each task.
      clients: M.

    Raises:
      SystemExit: MNIST's files are not there.
      FileNotFoundError: SST-2's, or the encoder, are not.
      ValueError: no folder of SST-2 is given.
    """
    if task == "mnist":
        parts = _digits(data[task])
        own = splits.dirichlet(parts["train"]["label"], clients, ALPHA)
    elif (folder := data[task]) is None:
        raise ValueError("--sst2: needed, the folder with train.tsv, dev.tsv and test.tsv")
    else:
        parts = _sentences(folder)
        own = splits.iid(len(parts["train"]["label"]), clients)
    return linear(task, parts, own)
