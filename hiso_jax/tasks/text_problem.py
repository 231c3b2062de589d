"""Any text task on any supported checkpoint, as a problem over clients."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from hiso_jax import models
from hiso_jax._engine import files
from hiso_jax.federation import Arrays, Clients
from hiso_jax.models import adapters, subsets
from hiso_jax.models.adapters import unit
from hiso_jax.tasks import metrics, problem, text
from hiso_jax.tasks.data import Rows
from hiso_jax.tasks.problem import Answer, Cut, Problem
from hiso_jax.tasks.prompts import Task

SCALE = 10.0
"""Of the cosines: lowest zero-shot loss on the docstrings' training split among 5 to 20."""
MEASURED = 256
"""Test examples that answers are generated for."""


class Material(NamedTuple):
    """What a problem is made of."""

    name: str  # of the problem
    task: Task  # with sentences, or words that stand for them, for encoders
    rows: dict[str, Rows]  # "train", "dev" and "test"
    own: dict[str, np.ndarray]  # numbers of each client's rows in "train"
    model: models.Model
    tokenizer: Any  # the model's
    length: int  # tokens a text is cut to
    tuned: bool = False  # the model is what a run left, with files beside its weights


def upper_of(
    model: models.Model, own: Any, losses: Any, prefix: str = "", above: Any = ()
) -> Callable[..., Cut]:
    """The `upper` of a `Problem`.

    Args:
      model: whose layers it is about.
      own: the problem's parameters -> the model's.
      losses: number of the first layer -> (loss, score) from there on.
      prefix: of the names of the model's leaves in the problem's parameters.
      above: leaves of the problem that are part of any upper part.
    """

    def upper(layers: int, before: int | None = None) -> Cut:
        rows = subsets.upper_rows(model.params, layers)
        end = model.config.num_hidden_layers - layers
        begin = model.config.num_hidden_layers - (before or layers)

        def trunk(params: Any, batch: Any) -> Any:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            return batch | {adapters.STREAM: model.lower(own(params), ids, mask, end)}

        def between(params: Any, kept: Any) -> Any:
            ids, mask, stream = (kept[k] for k in ("input_ids", "attention_mask", adapters.STREAM))
            return kept | {adapters.STREAM: model.lower(own(params), ids, mask, end, stream, begin)}

        leaves = {prefix + name: row for name, row in rows.items()}
        cut = Cut(trunk, losses(end)[0], dict.fromkeys(above, 0) | leaves)
        return cut if before is None else cut._replace(between=between)

    return upper


def encoder_problem(material: Material) -> Problem:
    """Classify by the nearest label sentence.

    ``logits = SCALE * cosine(sentence embedding, label embedding)``; the label embeddings
    start as the embeddings of one sentence a label and are trained with everything else. What
    is trained is their difference to the start, so that the run begins at the published
    weights and zeros: whoever has those needs nothing more to replay it.
    """
    name, task, rows, own, model, tokenizer, length, tuned = material

    def columns(rows: Rows) -> Arrays:
        labels = np.array([task.label_of(row) for row in rows], np.int32)
        texts = [task.read(row) for row in rows]
        return adapters.tokens(tokenizer, texts, length) | {"label": labels}

    embed = functools.partial(adapters.sentence_embedding, model)
    sentences = task.label_descriptions or task.verbalizer or ()
    if tuned:
        labels = adapters.label_embeddings_of(model, len(sentences))
    else:
        labels = adapters.label_embeddings(model, tokenizer, sentences, length)

    def logits_fn(params: Any, batch: Any, begin: int = 0) -> jax.Array:
        return (
            SCALE * unit(embed(params["encoder"], batch, begin)) @ unit(labels + params["labels"]).T
        )

    def save(folder: Path, params: Any) -> None:
        models.save_pretrained(model, folder / "model", params["encoder"])
        with files.atomic_write(folder / "model" / "labels.safetensors") as part:
            save_file({"labels": np.asarray(labels + params["labels"])}, part)

    def examples(params: Any, batch: Any) -> dict[str, jax.Array]:
        features, texts = unit(embed(params["encoder"], batch)), unit(labels + params["labels"])
        return problem.looked_at(features, SCALE * features @ texts.T, batch, texts)

    losses = lambda begin: problem.classification(lambda p, b: logits_fn(p, b, begin))  # noqa: E731
    loss_fn, score = losses(0)
    parts = _tight({name: columns(rows[name]) for name in ("train", "dev", "test")})
    return Problem(
        name=name,
        params={"encoder": model.params, "labels": jnp.zeros_like(labels)},
        loss_fn=loss_fn,
        score=score,
        clients=_clients(parts["train"], own),
        dev=parts["dev"],
        test=parts["test"],
        save=save,
        metric=task.metric,
        lazy=True,
        upper=upper_of(model, lambda params: params["encoder"], losses, "encoder/", ("labels",)),
        adapter={"kind": "labels", "sentences": list(sentences), "length": length},
        examples=examples,
        columns=columns,
        logits=logits_fn,
    )


def _tight(parts: dict[str, Arrays]) -> dict[str, Arrays]:
    """Splits without the columns that are padding in all texts, but for a multiple of eight.

    Encoders compute every column that there is: short texts would cost what long ones do.
    """
    masks = [part["attention_mask"] for part in parts.values()]
    used = np.flatnonzero(np.any([mask.any(0) for mask in masks], 0))
    kept = -(-(int(used[-1]) + 1) // 8) * 8 if used.size else masks[0].shape[1]
    return {name: {k: v[:, :kept] if v.ndim == 2 else v for k, v in part.items()}
            for name, part in parts.items()}  # fmt: skip


def masked_problem(material: Material) -> Problem:
    """Classify by the word that an encoder's own head puts in the place of a mask."""
    name, task, rows, own, model, tokenizer, length, _ = material
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{model.source}: its tokenizer has no mask, whose place the word is told by"
        )
    firsts = [
        tokenizer(f" {word}", add_special_tokens=False)["input_ids"][:1]
        for word in task.verbalizer or ()
    ]
    if lost := [w for w, ids in zip(task.verbalizer or (), firsts, strict=True)
                if not ids or ids[0] == tokenizer.unk_token_id]:  # fmt: skip
        raise ValueError(
            f"verbalizer: {lost} are unknown to the tokenizer; choose others with --verbalizer"
        )
    tokens = jnp.array([ids[0] for ids in firsts], jnp.int32)
    if len(set(tokens.tolist())) != len(firsts):
        raise ValueError(
            f"verbalizer: {task.verbalizer!r:.200} begin with the same token; choose others with "
            "--verbalizer"
        )

    def at_mask(params: Any, batch: Any, begin: int) -> jax.Array:
        x = adapters.hidden_states(model, params, batch, begin)
        return x[jnp.arange(len(x)), batch["place"]]

    losses = lambda begin: problem.by_features(  # noqa: E731
        lambda p, batch: at_mask(p, batch, begin), lambda p, x: model.head(p, x, tokens)
    )
    loss_fn, score, examples, logits = losses(0)
    columns = functools.partial(text.masked, task, tokenizer, length=length)
    return Problem(
        name=name,
        params=model.params,
        loss_fn=loss_fn,
        score=score,
        clients=_clients(columns(rows["train"]), own),
        dev=columns(rows["dev"]),
        test=columns(rows["test"]),
        save=lambda folder, params: models.save_pretrained(model, folder / "model", params),
        metric=task.metric,
        prepare=text.trim,
        lazy=True,
        upper=upper_of(model, lambda params: params, losses),
        examples=examples,
        columns=columns,
        logits=logits,
    )


def check_tokens(built: Problem, model: models.Model) -> None:
    """Raise ValueError if the tokenizer gives a token that the model has no row for."""
    rows = model.config.vocab_size
    for part in (built.clients.columns, built.dev, built.test):
        most = int((part["input_ids"] * part["attention_mask"]).max(initial=0))
        if most >= rows:
            raise ValueError(
                f"{model.source}: its tokenizer gives token {most}, the model has {rows} rows of "
                "embeddings; take the tokenizer that belongs to it"
            )


def _clients(train: Arrays, own: dict[str, np.ndarray]) -> Clients:
    return Clients({name: {k: v[picks] for k, v in train.items()} for name, picks in own.items()})


def _with_text(each: dict[str, Arrays], column: str, notes: list[str]) -> dict[str, Arrays]:
    """The clients that have something to learn from; who has not is noted."""
    filled = {name: arrays for name, arrays in each.items() if len(arrays["input_ids"])}
    if not filled:
        raise ValueError(f"{column}: no client has a text of two tokens to learn from")
    if gone := len(each) - len(filled):
        notes.append(f"{gone} of {len(each)} clients have no text of two tokens, left out")
    return filled


def _of_different_labels(task: Task, rows: Rows, count: int) -> Rows:
    """The first row of every label, and more if those are too few."""
    first: dict[str, Any] = {}
    for row in rows:
        first.setdefault(task.answers(row)[0], row)
    shown = set(map(id, first.values()))
    return [*first.values(), *(row for row in rows if id(row) not in shown)][:count]


def _answers(task: Task, rows: Rows, lines: list[str], best: Any) -> list[Answer]:
    """Answers that were written, each behind the best of the label words if there are some."""
    if best is not None:
        words = [(task.verbalizer or ())[i] for i in best]
        lines = [f"{word} (writes: {line})" for word, line in zip(words, lines, strict=True)]
    return [Answer(task.read(row), task.answers(row)[0], line)
            for row, line in zip(rows, lines, strict=True)]  # fmt: skip


def decoder_problem(
    material: Material,
    room: int = 32,
    train: str = "all",
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    shown: int = 0,
) -> Problem:
    """Fine-tune a decoder by label words, by whole answers or on plain text.

    Args:
      material: its length is that of prompt and answer.
      room: tokens an answer is cut to.
      train: ``"all"``, ``"norms"``, ``"biases"``, ``"lora"``, ``"last-N"`` layers or a prefix
        of N tokens, ``"prefix-N"``.
      rank, alpha, targets: of LoRA.
      shown: test examples that answers are written for, to be looked at.
    """
    name, task, rows, own, model, tokenizer, length, tuned = material
    subset = adapters.subset_of(model, train, rank, alpha, targets, tuned)
    whole, prefix, notes = subset.whole, subset.prefix, []

    def hidden(params: Any, batch: Any, begin: int) -> jax.Array:
        return adapters.hidden_states(model, whole(params), batch, begin, prefix(params))

    def head(params: Any, x: jax.Array, rows: Any = None) -> jax.Array:
        return model.head(subset.base(params), x, rows)  # which is never adapted

    def columns(rows: Rows) -> Arrays:
        if task.verbalizer is not None:
            return text.words(task, tokenizer, rows, length, shared)
        if task.metric == "perplexity":
            return text.chunks([str(row[task.label]) for row in rows], tokenizer, length)
        return text.answers(task, tokenizer, rows, length, room)

    @jax.jit
    def generate(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        fill = tokenizer.pad_token_id or 0
        return model.generate(whole(params), ids, mask, room, stop, fill, prefix(params))

    def write(params: Any, asked: Rows, many: int) -> list[str]:
        """The first line that the model writes after each prompt, `many` rows at a time."""
        # Answers to be classified by take a word or two, and no room of the prompt.
        batch = text.prompts(task, tokenizer, asked, length - room * (task.verbalizer is None))
        guesses = []
        for i in range(0, len(asked), many):
            ids, mask = (batch[k][i : i + many] for k in ("input_ids", "attention_mask"))
            fill = [(0, many - len(ids)), (0, 0)]
            tokens = generate(params, np.pad(ids, fill), np.pad(mask, fill))
            guesses += tokenizer.batch_decode(np.asarray(tokens)[: len(ids)], True)
        return [guess.strip().split("\n")[0] for guess in guesses]

    def measure(params: Any) -> dict[str, float]:
        """Scores of the answers generated for the first test examples."""
        asked = rows["test"][:MEASURED]
        lines = write(params, asked, 32)
        return metrics.METRICS[task.metric](lines, [task.answers(row) for row in asked])

    def answers(params: Any) -> list[Answer]:
        """What the model writes after some prompts, and the word that it is measured by."""
        asked, best = _of_different_labels(task, rows["test"], shown), None
        if task.verbalizer is not None:
            best = head(params, hidden(params, columns(asked), 0)[:, -1], tokens).argmax(-1)
        return _answers(task, asked, write(params, asked, shown), best)

    stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    if task.verbalizer is not None:
        shared, firsts = text.word_tokens(task, tokenizer)
        tokens = jnp.asarray(firsts)

        def losses(begin: int) -> tuple[Any, Any, Any, Any]:
            states = lambda p, b: hidden(p, b, begin)[:, -1]  # noqa: E731
            return problem.by_features(states, lambda p, x: head(p, x, tokens))

        own_columns = _clients(columns(rows["train"]), own)
    else:
        last = None if task.metric == "perplexity" else room

        def losses(begin: int) -> tuple[Any, Any, Any, Any]:
            return *problem.language(lambda p, b: hidden(p, b, begin), head, last), None

        each = {n: columns([rows["train"][i] for i in picks]) for n, picks in own.items()}
        own_columns = Clients(_with_text(each, task.label, notes))
    loss_fn, score, examples, logits = losses(0)
    held = {name: columns(rows[name]) for name in ("dev", "test")}
    if empty := [name for name, arrays in held.items() if not len(arrays["input_ids"])]:
        raise ValueError(f"{task.label}: {empty[0]} has no text of two tokens to measure on")
    return Problem(
        name=name,
        params=subset.params,
        loss_fn=loss_fn,
        score=score,
        clients=own_columns,
        dev=held["dev"],
        test=held["test"],
        save=functools.partial(adapters.save, model, subset),
        metric=task.metric if task.verbalizer is not None else "perplexity",
        prepare=text.trim,
        trainable=subset.trainable,
        lazy=subset.adapter is None,
        upper=upper_of(model, whole, losses) if train == "all" else None,
        answers=answers if shown else lambda params: [],
        measure=measure if task.metric in metrics.METRICS else lambda params: {},
        notes=tuple(notes),
        adapter=subset.adapter,
        examples=examples,
        columns=columns,
        logits=logits,
    )
