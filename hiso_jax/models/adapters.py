"""What is trained beside a model (adapters, a prefix, label embeddings), and how it joins it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from hiso_jax import models
from hiso_jax._engine import files, trees
from hiso_jax.models import subsets, vision

STREAM = "stream"
"""Column of a batch with its activations between two layers."""


def hidden_states(
    model: models.Model, params: Any, batch: Any, begin: int = 0, *prefix: Any
) -> jax.Array:
    """Hidden states [B, T, D] of a batch; from layer `begin` on, of the activations in it."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    stream = batch[STREAM] if begin else None
    return model.hidden(params, ids, mask, *prefix, stream=stream, begin=begin)


def sentence_embedding(model: models.Model, params: Any, batch: Any, begin: int = 0) -> jax.Array:
    """Mean of the hidden states over the tokens of each text, [B, D]."""
    hidden = hidden_states(model, params, batch, begin)
    mask = batch["attention_mask"][..., None].astype(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clip(1)


def unit(x: jax.Array) -> jax.Array:
    """Scale the rows of `x` to length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-9)


def tokens(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Texts for an encoder: int32 ``input_ids`` and ``attention_mask`` [N, length]."""
    batch = tokenizer(
        list(texts), truncation=True, padding="max_length", max_length=length, return_tensors="np"
    )
    return {k: batch[k].astype(np.int32) for k in ("input_ids", "attention_mask")}


def label_embeddings(
    model: models.Model, tokenizer: Any, sentences: Sequence[str], length: int
) -> jax.Array:
    """Unit vectors [labels, D] that label embeddings start as: one sentence each."""
    embed = jax.jit(lambda params, batch: sentence_embedding(model, params, batch))
    return unit(embed(model.params, tokens(tokenizer, sentences, length)))


def trained_beside(model: models.Model, kind: str) -> dict[str, np.ndarray]:
    """What a run left beside the weights of its model: the arrays of a file called after the kind.

    Raises:
      FileNotFoundError: the file is not there.
    """
    path = Path(model.source or "") / f"{kind}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, which the run trained beside the weights")
    return load_file(path)


def label_embeddings_of(model: models.Model, count: int) -> jax.Array:
    """The label embeddings [labels, D] that a run left beside its model.

    Raises:
      ValueError: they are not of so many labels.
    """
    labels = trained_beside(model, "labels")["labels"]
    if len(labels) != count:
        raise ValueError(f"{model.source}: labels.safetensors has {len(labels)} labels, expected "
                         f"{count}")  # fmt: skip
    return jnp.asarray(labels)


class Subset(NamedTuple):
    """What of a decoder is trained."""

    params: Any  # the model's, or {"base": the model's, kind: what is trained beside them}
    trainable: Any  # as in `hiso_jax.trees.select`
    whole: Callable[[Any], Any]  # params -> the model's, with what was trained in them
    prefix: Callable[[Any], Any]  # params -> keys and values, or None
    base: Callable[[Any], Any]  # params -> the model's as they were
    adapter: dict[str, Any] | None  # what `finish` has to know


def subset_of(
    model: models.Model,
    train: str,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    tuned: bool = False,
) -> Subset:
    """The subset that ``--train`` names.

    Args:
      model: a decoder.
      train: ``"all"``, ``"norms"``, ``"biases"``, ``"lora"``, ``"last-N"`` or ``"prefix-N"``.
      rank, alpha, targets: of LoRA.
      tuned: the model is what a run left: a prefix lies beside it, all else is in its weights.
    """
    kind, _, count = train.partition("-")
    kind = "all" if tuned and kind != "prefix" else kind
    none = lambda params: None  # noqa: E731
    if kind in subsets.MASKS:
        same = lambda params: params  # noqa: E731
        mask = subsets.mask(model.params, kind)
        return Subset(model.params, mask, same, none, same, None)
    base = lambda params: params["base"]  # noqa: E731
    whole, prefix = base, none
    adapter: dict[str, Any] = {"kind": kind}
    # What is trained begins as zeros beside the base, which stays as it is.
    if kind == "lora":
        zeros: Any = subsets.lora_zeros(model.params, rank, targets)
        whole = lambda p: subsets.merge_lora(p["base"], p["lora"], alpha)  # noqa: E731
        adapter["alpha"] = alpha
    elif kind == "last":
        zeros = subsets.last_zeros(model.params, int(count))
        whole = lambda p: subsets.merge_last(p["base"], p["last"])  # noqa: E731
    else:
        adapter["tokens"] = prefix_tokens(model, int(count))
        if tuned:
            left = trained_beside(model, "prefix")
            start = jnp.asarray(left["keys"]), jnp.asarray(left["values"])
        else:
            start = jax.jit(model.prefix)(model.params, jnp.array(adapter["tokens"], jnp.int32))
        zeros = dict(zip(("keys", "values"), map(jnp.zeros_like, start), strict=True))
        prefix = lambda p: (start[0] + p["prefix"]["keys"], start[1] + p["prefix"]["values"])  # noqa: E731
    params, trainable = {"base": model.params, kind: zeros}, {"base": False, kind: True}
    return Subset(params, trainable, whole, prefix, base, adapter)


def save(model: models.Model, subset: Subset, folder: Path, params: Any) -> None:
    """Write the model with what was trained in it, and what was trained beside it."""
    models.save_pretrained(model, folder / "model", subset.whole(params))
    if subset.adapter is not None:
        kind = subset.adapter["kind"]
        own = {n: np.asarray(x) for n, x in trees.named(params[kind]).items()}
        if (found := subset.prefix(params)) is not None:
            own = dict(zip(own, map(np.asarray, found), strict=True))
        with files.atomic_write(folder / "model" / f"{kind}.safetensors") as part:
            save_file(own, part)


def prefix_tokens(model: models.Model, count: int) -> list[int]:
    """Tokens whose keys and values a prefix begins as: drawn at random, as MeZO's (appendix E.5).

    Not those of a text of a client's: whoever has the ledger can make them again.
    """
    return np.random.default_rng(0).integers(0, model.config.vocab_size, count).tolist()


def finish(adapter: dict[str, Any], base: Path, made: Path) -> str:
    """Make a run's model of its base's weights and what was trained beside them.

    Args:
      adapter: the run's `Problem.adapter`.
      base: folder that the run started from.
      made: folder of the replayed weights, and of ``extra.safetensors``, which is replaced by
        what the run saved: a file called after the adapter's kind.

    Returns:
      What was done, for people.
    """
    if "classes" in adapter:
        return vision.finish(adapter, made)
    kind = adapter["kind"]
    extra = load_file(made / "extra.safetensors")
    own = {n.removeprefix(f"{kind}/"): x for n, x in extra.items()}
    dtype = next(iter(own.values())).dtype
    if kind in ("lora", "last"):
        model = models.from_pretrained(made, dtype, progress=False)
        changes = {n: jnp.asarray(x) for n, x in own.items()}
        if kind == "last":
            merged = subsets.merge_last(model.params, changes)
        else:
            merged = subsets.merge_lora(model.params, changes, adapter["alpha"])
        models.save_pretrained(model, made, merged)
        said = f"the {kind} adapter is merged into the weights, and is in {kind}.safetensors"
    else:
        source = models.from_pretrained(base, dtype, progress=False)
        said = f"extra.safetensors, which was trained, is added to its start in {kind}.safetensors"
        if kind == "prefix":
            tokens = jnp.array(adapter["tokens"], jnp.int32)
            start = jax.jit(source.prefix)(source.params, tokens)
            begun: dict[str, Any] = dict(zip(("keys", "values"), start, strict=True))
        else:
            try:
                tokenizer, sentences = models.load_tokenizer(base), adapter["sentences"]
            except ValueError as error:
                return f"extra.safetensors has the labels' difference to their start, for {error}"
            begun = {kind: label_embeddings(source, tokenizer, sentences, adapter["length"])}
        own = {n: np.asarray(begun[n] + x) for n, x in own.items()}
    with files.atomic_write(made / f"{kind}.safetensors") as part:
        save_file(own, part)
    (made / "extra.safetensors").unlink()
    return said
