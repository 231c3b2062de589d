"""What a job trains: parameters, a loss, clients and the data to evaluate on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax import selection
from hiso_jax.federation import Arrays, Clients


class Cut(NamedTuple):
    """The last layers of a model, as of a `hiso_jax.Split`."""

    trunk: Callable[[Any, Any], Any]  # (params, batch) -> kept
    head: Callable[[Any, Any], jax.Array]  # (params, kept) -> loss
    leaves: dict[str, int]  # that lie above -> first row
    between: Callable[[Any, Any], Any] | None = None  # (params, kept below) -> kept


class Answer(NamedTuple):
    """What a model writes after a prompt."""

    prompt: str
    wanted: str
    written: str


class Problem(NamedTuple):
    """A problem over simulated clients."""

    name: str
    params: Any
    loss_fn: Callable[[Any, Any], jax.Array]  # (params, batch) -> loss
    score: Callable[[Any, Any], dict[str, jax.Array]]  # (params, batch) -> sums, for `metric_value`
    clients: Clients  # columns of the batch
    dev: Arrays  # chosen on
    test: Arrays  # reported
    save: Callable[[Path, Any], None]  # (run folder, params)
    metric: str = "accuracy"  # "accuracy", "f1" or "perplexity"
    prepare: Callable[[Arrays], Arrays] = lambda batch: batch  # before a batch is computed with
    trainable: Any = None  # as in `hiso_jax.trees.select`
    lazy: bool = False  # the loss takes lazy leaves, see `hiso_jax.lazy`
    # (layers above, layers above the cut before it or None) -> where they begin
    upper: Callable[..., "Cut"] | None = None
    answers: Callable[[Any], list["Answer"]] = lambda params: []  # to a few test examples
    measure: Callable[[Any], dict[str, float]] = lambda params: {}  # more, of the test split
    classes: tuple[tuple[str, str], ...] = ()  # label and word of each, in the order of numbers
    notes: tuple[str, ...] = ()  # what was left out of the data, or done otherwise
    adapter: dict[str, Any] | None = None  # how what is trained becomes a model, for replay
    # (params, batch) -> what `hiso_jax.federation.Select` looks at; the loss of such a problem
    # multiplies each example's by the column ``importance``, where there is one
    examples: Callable[[Any, Any], dict[str, jax.Array]] | None = None
    # of texts with classes: rows -> columns of a batch, and (params, batch) -> [B, labels]
    columns: Callable[[list[dict[str, Any]]], Arrays] | None = None
    logits: Callable[[Any, Any], jax.Array] | None = None

    def at_most(self, count: int) -> "Problem":
        """The problem with so many examples of dev and of test, drawn at random; 0: with all."""
        cut, notes = {}, []
        for split, data in (("dev", self.dev), ("test", self.test)):
            size = len(next(iter(data.values())))
            if not 0 < count < size:
                continue
            picks = np.sort(np.random.default_rng([size, 5]).permutation(size)[:count])
            cut[split] = {name: column[picks] for name, column in data.items()}
            notes.append(f"{split}: measured on {count:,} of {size:,} examples, --eval-examples")
        return self._replace(**cut, notes=(*self.notes, *notes))

    def metric_value(self, sums: dict[str, Any]) -> tuple[float, float]:
        """Mean loss, and the metric, of sums over a split; NaN where a logit was."""
        loss = float(sums["loss"] / sums["count"])
        if self.metric == "perplexity":
            with np.errstate(over="ignore"):
                return loss, float(np.exp(loss))
        confusion = np.asarray(sums["confusion"], float)  # [label, prediction]
        if not np.isfinite(confusion).all():
            return loss, float("nan")
        if self.metric == "accuracy":
            return loss, float(np.trace(confusion) / confusion.sum())
        both = confusion.sum(0) + confusion.sum(1)
        present = both > 0
        return loss, float((2 * np.diag(confusion)[present] / both[present]).mean())


def counted(batch: Any) -> jax.Array:
    """What each example's loss is multiplied by, [B]: 0 for padding, else its importance or 1."""
    weight = batch["weight"]
    return weight * batch["importance"] if "importance" in batch else weight


def looked_at(
    features: jax.Array, logits: jax.Array, batch: Any, texts: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What `Problem.examples` gives of a classification.

    Args:
      features: [B, D].
      logits: [B, labels].
      batch: with column ``label``.
      texts: [labels, D], of each label in the space of the features.
    """
    found = {"features": features.astype(jnp.float32), **selection.scores(logits, batch["label"])}
    return found if texts is None else found | {"texts": texts[batch["label"]]}


def classification(logits_fn: Callable[[Any, Any], jax.Array]) -> tuple[Any, Any]:
    """Loss and score of logits [B, labels] against column ``label``."""

    def losses(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits = logits_fn(params, batch).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, batch["label"][..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - picked, logits

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        """Mean cross-entropy over the examples of a batch that are not padding."""
        weight = batch["weight"]
        return (losses(params, batch)[0] * counted(batch)).sum() / weight.sum()

    def score(params: Any, batch: Any) -> dict[str, jax.Array]:
        """Sums over a batch: ``loss``, ``count`` and ``confusion`` [label, prediction]."""
        each, logits = losses(params, batch)
        weight, size = batch["weight"], logits.shape[-1]
        label = jax.nn.one_hot(batch["label"], size) * weight[:, None]
        # The largest of NaN is none: a broken model must not look like one that guesses class 0.
        broken = jnp.isnan(logits).any(-1, keepdims=True)
        guess = jnp.where(broken, jnp.nan, jax.nn.one_hot(logits.argmax(-1), size))
        confusion = label.T @ guess
        return {"loss": (each * weight).sum(), "count": weight.sum(), "confusion": confusion}

    return loss_fn, score


def by_features(
    features: Callable[[Any, Any], jax.Array], head: Callable[[Any, jax.Array], jax.Array]
) -> tuple[Any, Any, Any, Any]:
    """`classification` of logits that are made of features, with `Problem.examples` and `logits`.

    Args:
      features: ``(params, batch) -> [B, D]``.
      head: ``(params, [B, D]) -> logits [B, labels]``.
    """

    def logits(params: Any, batch: Any) -> jax.Array:
        return head(params, features(params, batch))

    def examples(params: Any, batch: Any) -> dict[str, jax.Array]:
        x = features(params, batch)
        return looked_at(x, head(params, x), batch)

    return *classification(logits), examples, logits


def language(
    hidden: Callable[[Any, Any], jax.Array],
    head: Callable[[Any, jax.Array], jax.Array],
    room: int | None = None,
) -> tuple[Any, Any, Any]:
    """Loss and score of the tokens whose ``target`` is 1, and what `Problem.examples` gives.

    Args:
      hidden: ``(params, batch) -> [B, T, D]``.
      head: ``(params, [B, n, D]) -> logits [B, n, V]``.
      room: all targets are among the last `room` columns: the head is computed there only.
    """

    def losses(params: Any, x: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        ids = batch["input_ids"]
        kept = ids.shape[1] - 1 if room is None else min(room, ids.shape[1] - 1)
        logits = head(params, x[:, -kept - 1 : -1])
        picked = jnp.take_along_axis(logits, ids[:, -kept:, None], -1)[..., 0]
        weight = batch["target"][:, -kept:] * batch["weight"][:, None]
        return (jax.nn.logsumexp(logits, -1) - picked) * weight, weight

    def sums(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        each, weight = losses(params, hidden(params, batch), batch)
        if "importance" in batch:
            each = each * batch["importance"][:, None]
        return each.sum(), weight.sum()

    def examples(params: Any, batch: Any) -> dict[str, jax.Array]:
        """Mean state over a text, and mean loss over its targets."""
        x = hidden(params, batch)
        each, weight = losses(params, x, batch)
        mask = batch["attention_mask"][..., None].astype(x.dtype)
        features = (x * mask).sum(1) / mask.sum(1).clip(1)
        loss = each.sum(1) / weight.sum(1).clip(1)
        return {"features": features.astype(jnp.float32), "loss": loss}

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        """Mean negative log-likelihood of a target."""
        total, count = sums(params, batch)
        return total / jnp.maximum(count, 1)

    def score(params: Any, batch: Any) -> dict[str, jax.Array]:
        """Sums over a batch: ``loss`` and ``count`` of targets."""
        total, count = sums(params, batch)
        return {"loss": total, "count": count}

    return loss_fn, score, examples
