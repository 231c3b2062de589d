"""Images over clients, on any model of images, as a problem."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax._engine import checks, trees
from hiso_jax.federation import Arrays, Clients
from hiso_jax.models import efficientnet, subsets, vision
from hiso_jax.models.adapters import STREAM
from hiso_jax.models.vision import Vision
from hiso_jax.tasks import splits
from hiso_jax.tasks.problem import Cut, Problem, classification, looked_at

KINDS = r"all|head|norms|biases|lora|last-[1-9]\d*"
"""What can be trained, as a pattern."""
_NORMS = r"norm|(^|/)_bn\d/"


class Trained(NamedTuple):
    """A model, and what of it is trained."""

    model: Vision
    mask: Any  # as in `hiso_jax.trees.select`
    frozen: int  # stages that stay as they are
    adapter: dict[str, Any] | None  # how what is trained becomes a model, for replay


def trained(
    model: Vision,
    train: str,
    classes: Sequence[str],
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = ("query", "value"),
) -> Trained:
    """A model with a classifier for the classes, its own if it is for them.

    Args:
      model: pretrained.
      train: ``"all"``, ``"head"``, ``"norms"``, ``"biases"``, ``"lora"``, ``"last-N"`` stages,
        of which the classifier is one.
      classes: their names.
      rank, alpha, targets: of LoRA, whose base must have layers (a ViT).

    Raises:
      ValueError: the model has nothing of that kind, by ``--train``.
    """
    kind, _, count = train.partition("-")
    number, new = int(count or 1), model.classes != tuple(classes)
    if kind == "last" and number > model.stages:
        raise ValueError(f"--train: expected last-1 to last-{model.stages}, got {train}")
    model = vision.without_head(model) if new else model
    layered = any(map(subsets.stacked, trees.named(model.params)))
    adapter: dict[str, Any] = {"kind": kind, "classes": list(classes)}
    if kind == "lora":
        try:
            zeros = subsets.lora_zeros(model.params, rank, targets)
        except ValueError as error:
            raise ValueError(f"--train lora: {error}") from None
        model, adapter["alpha"] = vision.beside(model, kind, zeros, alpha), alpha
    elif kind == "last" and layered and number > 1:
        zeros = subsets.last_zeros(model.params, min(number - 1, model.stages - 1))
        model = vision.beside(model, kind, zeros)
    grown = "base" in model.params
    model = vision.with_head(model, len(classes)) if new else model
    head = set(model.rows(1))
    moves = {
        "all": lambda n: True,
        "norms": lambda n: n in head or bool(re.search(_NORMS, n.lower())),
        "biases": lambda n: n in head or n.endswith("bias"),
        "last": lambda n: n in model.rows(number),
    }.get(kind, lambda n: n in head)
    if grown:
        moves = lambda n: n in head or (f"{kind}/" in n and "base/" not in n)  # noqa: E731
    still = efficientnet.MOMENTS
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: moves(name := trees.leaf_name(path)) and not name.endswith(still),
        model.params,
    )
    frozen = model.stages - number if kind in ("head", "last") else 0
    return Trained(model, mask, frozen, adapter if new or grown else None)


def pixels(model: Vision, image: Any) -> jax.Array:
    """Images [B, h, w, C], bytes or floats, as the model takes them.

    Bytes are scaled to its size, normalized, and made gray or colored; floats pass as they are.
    """
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image
    x = jnp.asarray(image).astype(jnp.float32) / 255
    if model.channels == 1 and x.shape[-1] == 3:
        x = x @ jnp.array([[0.299], [0.587], [0.114]])
    elif model.channels == 3 and x.shape[-1] == 1:
        x = jnp.concatenate([x] * 3, -1)
    if model.size is not None and x.shape[1:3] != model.size:
        x = jax.image.resize(x, (len(x), *model.size, x.shape[-1]), "bilinear")
    mean, std = (jnp.array(values)[None, None, None] for values in (model.mean, model.std))
    return (x - mean) / std


BATCH = 64
"""Images whose frozen stages are computed at a time."""


def features(found: Trained) -> Callable[[np.ndarray], np.ndarray]:
    """What the frozen stages make of images [N, ...]: computed once, for no round changes it."""
    params = found.model.params

    @jax.jit
    def below(params: Any, image: jax.Array) -> jax.Array:
        return found.model.run(params, pixels(found.model, image), 0, found.frozen)

    def compute(images: np.ndarray) -> np.ndarray:
        out = []
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            fill = [(0, BATCH - len(some))] + [(0, 0)] * (some.ndim - 1)  # one program for all
            out.append(np.asarray(below(params, np.pad(some, fill)))[: len(some)])
        return np.concatenate(out)

    return compute


def problem(
    name: str,
    found: Trained,
    parts: dict[str, Arrays],
    clients: Sequence[np.ndarray],
    classes: Sequence[tuple[str, str]],
    most: int = 0,
) -> Problem:
    """Images over clients.

    Args:
      name: of the problem.
      found: the model.
      parts: ``train``, ``dev`` and ``test``, each with columns ``image`` and ``label``.
      clients: numbers of each client's examples; those without one are left out.
      classes: label and word of each, in the order of numbers.
      most: examples of dev, and of test, that are measured on; 0 for all.
    """
    model, frozen = found.model, found.frozen

    def below(params: Any, batch: Any, end: int | None = None) -> jax.Array:
        x = batch[STREAM] if frozen else pixels(model, batch["image"])
        return model.run(params, x, frozen, end)

    def upper(layers: int, before: int | None = None) -> Cut:
        if not 1 <= layers < model.stages - frozen:
            raise ValueError(
                f"--upper-layers: expected 1 to {model.stages - frozen - 1}, got {layers}"
            )
        end = model.stages - layers

        def trunk(params: Any, batch: Any) -> Any:
            rest = {k: v for k, v in batch.items() if k not in ("image", STREAM)}
            return rest | {STREAM: below(params, batch, end)}

        def between(params: Any, kept: Any) -> Any:
            begin = model.stages - (before or layers)
            return kept | {STREAM: model.run(params, kept[STREAM], begin, end)}

        head, _ = classification(lambda p, kept: model.run(p, kept[STREAM], end))
        return Cut(trunk, head, model.rows(layers), None if before is None else between)

    def examples(params: Any, batch: Any) -> dict[str, jax.Array]:
        kept = below(params, batch, model.stages - 1)
        logits = model.run(params, kept, model.stages - 1, None)
        return looked_at(kept.reshape(kept.shape[0], -1), logits, batch)

    def save(folder: Path, params: Any) -> None:
        model.save(folder, params, [word or label for label, word in classes])

    loss_fn, score = classification(below)
    whole = found.adapter is None or found.adapter["kind"] == "all"
    made = Problem(
        name=name,
        params=model.params,
        loss_fn=loss_fn,
        score=score,
        clients=Clients(
            {
                f"client {i}": {k: v[own] for k, v in parts["train"].items()}
                for i, own in enumerate(clients)
                if len(own)
            }
        ),
        dev=parts["dev"],
        test=parts["test"],
        save=save,
        trainable=found.mask,
        lazy=model.lazy,
        upper=upper if whole else None,
        classes=tuple(classes),
        adapter=found.adapter,
        examples=examples,
    ).at_most(most)
    if not frozen:
        return made
    compute, every = features(found), made.clients
    kept = lambda columns: columns | {STREAM: compute(columns["image"])}  # noqa: E731
    return made._replace(
        clients=Clients.joined(every.names, [*every.sizes.values()], kept(every.columns)),
        dev=kept(made.dev),
        test=kept(made.test),
    )


def scratch(
    name: str, model: Vision, parts: dict[str, Arrays], num_clients: int, alpha: float, seed: int,
    spread: float = 0.0,
) -> Problem:  # fmt: skip
    """A small network from scratch on images of ten classes.

    Args:
      name: of the problem.
      model: as of `hiso_jax.models.vision.of_network`.
      parts: as of `problem`.
      num_clients: of whom those without an example are left out.
      alpha: of the Dirichlet shares of labels; infinity for equal ones.
      seed: of the split.
      spread: of the clients' sizes.
    """
    own = over(parts["train"]["label"], num_clients, alpha, seed, spread)
    classes = [(str(label), "") for label in range(10)]
    return problem(name, Trained(model, None, 0, None), parts, own, classes)


def over(
    labels: np.ndarray, num_clients: int, alpha: float, seed: int, spread: float = 0.0
) -> list[np.ndarray]:
    """Numbers of each client's examples, with label shares from Dirichlet(alpha).

    Raises:
      ValueError: options that are out of range, by name.
    """
    checks.count("--clients", num_clients)
    if not np.isinf(alpha):
        checks.number("--alpha", alpha, 0, above=True)
    return splits.dirichlet_draws(labels, num_clients, alpha, seed, spread)
