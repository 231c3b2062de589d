"""Models of images under one face: stages from pixels to logits, heads for other classes.

A stage is what a model can be cut before: a layer of a ViT or of a small network, a block of
EfficientNet. The last one is always the classifier, so the input of the last stage are the
features of an image, [B, D].
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from safetensors.numpy import save as as_bytes

from hiso_jax._engine import files, trees
from hiso_jax.models import cnn, efficientnet, folders, huggingface, names, subsets, vit

LITE0 = "efficientnet-lite0"
"""What the convolutional backbone is called, as a model and in its config.json."""
HEADS = ("classifier", "_fc")


class Vision(NamedTuple):
    """A model of images as data and pure functions.

    Attributes:
      params: nested dict of arrays.
      run: ``(params, x, begin=0, end=None) -> x``, the stages `begin` to `end`, by default from
        normalized pixels [B, H, W, C] to logits [B, labels].
      stages: how many; the last is the classifier.
      rows: how many stages, from the classifier down -> name of each of their leaves that
        training may move -> its first row, as of `hiso_jax.Split`.
      save: ``(folder, params, classes)``.
      head: a new classifier's kernel [D, labels] and bias -> the leaves it has in this model.
      size: height and width of its images; None takes any.
      channels: of its images.
      mean, std: of pixels from 0 to 1, that its images are normalized with.
      classes: what its own classifier tells apart; none if it came without one.
      lazy: it takes lazy leaves.
    """

    params: trees.Params
    run: Callable[..., jax.Array]
    stages: int
    rows: Callable[[int], dict[str, int]]
    save: Callable[[Path, Any, Sequence[str]], None]
    head: Callable[[Any, Any], dict[str, Any]]
    size: tuple[int, int] | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    lazy: bool = False


def of_network(
    model: cnn.Network, size: int, channels: int = 1, mean: float = 0.0, std: float = 1.0
) -> Vision:
    """A small network, whose stages are its layers.

    Args:
      model: with its first weights.
      size, channels: of its images.
      mean, std: as of `Vision`, for all channels.
    """
    graph, state = nnx.split(model)
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))

    def run(params: Any, x: jax.Array, begin: int = 0, end: int | None = None) -> jax.Array:
        return nnx.merge(graph, params)(x, begin, end)

    def rows(count: int) -> dict[str, int]:
        above = tuple(f"{name}/" for name in model.names[-count:])
        return {n: 0 for n in trees.named(params) if n.startswith(above)}

    def save(folder: Path, params: Any, classes: Sequence[str]) -> None:
        del classes
        with files.atomic_write(folder / "model.safetensors", sweeps=True) as part:
            part.write_bytes(as_bytes({n: np.asarray(x) for n, x in trees.named(params).items()}))

    return Vision(
        params, run, len(model.names), rows, save, lambda kernel, bias: {}, (size, size), channels,
        (mean,) * channels, (std,) * channels,
    )  # fmt: skip


def of_lite0(params: trees.Params, classes: Sequence[str] = ()) -> Vision:
    """EfficientNet-Lite0 with such weights, as of `hiso_jax.models.efficientnet.load`."""

    def rows(count: int) -> dict[str, int]:
        first = efficientnet.STAGES - count
        return {
            n: 0 for n in trees.named(params)
            if efficientnet.stage_of(n) >= first and not n.endswith(efficientnet.MOMENTS)
        }  # fmt: skip

    return Vision(
        params, efficientnet.run, efficientnet.STAGES, rows, _save_lite0,
        lambda kernel, bias: {"_fc": {"weight": kernel.T, "bias": bias}}, None, 3,
        (efficientnet.MEAN,) * 3, (efficientnet.STD,) * 3, tuple(classes),
    )  # fmt: skip


def _save_lite0(folder: Path, params: Any, classes: Sequence[str]) -> None:
    tensors = {
        names.tensor_names(n, 0)[0]: np.ascontiguousarray(x) for n, x in trees.named(params).items()
    }
    with files.atomic_write(folder / "model.safetensors", sweeps=True) as part:
        part.write_bytes(as_bytes(tensors, {"format": "pt"}))
    with files.atomic_write(folder / "config.json") as part:
        part.write_text(json.dumps({"model_type": LITE0, "classes": list(classes)}, indent=2))


def of_vit(model: huggingface.Model) -> Vision:
    """A ViT, whose stages are its layers and its classifier.

    The embeddings are part of the first stage, the last norm of the last layer.
    """
    config, body = model.config, huggingface.headless(model)
    layers = config.num_hidden_layers

    def run(params: Any, x: jax.Array, begin: int = 0, end: int | None = None) -> jax.Array:
        own, end = {"vit": params["vit"]}, layers + 1 if end is None else end
        pixels, stream = (None, x) if begin else (x, None)
        if end < layers:
            return body.lower(own, pixels, end, stream, begin)
        if begin < layers:
            x = body.hidden(own, pixels, stream, begin)[:, 0]
        if end > layers:
            kernel, bias = (jnp.asarray(params["classifier"][n]) for n in ("kernel", "bias"))
            x = (x @ kernel + bias[None]).astype(jnp.float32)
        return x

    def rows(count: int) -> dict[str, int]:
        if count > 1:
            return subsets.upper_rows(model.params, count - 1)
        return {n: 0 for n in trees.named(model.params) if n.startswith("classifier/")}

    def save(folder: Path, params: Any, classes: Sequence[str]) -> None:
        own = model
        if tuple(classes) != labels:
            config = copy.deepcopy(model.config)
            config.id2label = dict(enumerate(classes))
            config.label2id = {name: i for i, name in enumerate(classes)}
            config.architectures = ["ViTForImageClassification"]
            own = model._replace(config=config, params=params, untouched={}, renamed={})
        huggingface.save_pretrained(own, folder, params)

    labels: tuple[str, ...] = ()
    if model.has_head:
        labels = tuple(config.id2label[i] for i in range(config.num_labels))
    mean, std = _normalization(model.source, config.num_channels)
    return Vision(
        model.params, run, layers + 1, rows, save,
        lambda kernel, bias: {"classifier": {"kernel": kernel, "bias": bias}},
        vit.sides(config.image_size), config.num_channels, mean, std, labels, True,
    )  # fmt: skip


def _normalization(source: Path | None, channels: int) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation that a folder's preprocessor_config.json names; ViT's are 0.5.

    Raises:
      ValueError: they are not one number a channel, or a deviation is not above 0.
    """
    path = None if source is None else source / "preprocessor_config.json"
    given = folders.read_json(path) if path is not None and path.is_file() else {}
    # Ours are of pixels from 0 to 1, the file's of pixels times its factor.
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"{path}: rescale_factor: expected a number above 0, got {factor!r:.80}")
    scale = 255 * factor
    if not given.get("do_normalize", True):
        return (0.0,) * channels, (1 / scale,) * channels
    found = []
    for name in ("image_mean", "image_std"):
        value = given.get(name, [0.5] * channels)
        numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
        if not numbers or len(value) != channels or (name == "image_std" and min(value) <= 0):
            raise ValueError(f"{path}: {name}: expected {channels} numbers, one a channel, "
                             f"deviations above 0; got {value!r:.80}")  # fmt: skip
        found.append(tuple(float(x) if scale == 1 else x / scale for x in value))
    return tuple(found)


def load(model: str) -> Vision:
    """The model of a name, file or folder.

    Args:
      model: ``"efficientnet-lite0"``, a file of its weights, a folder of either kind of model, or
        the hub id of a ViT.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no model of images.
    """
    if model == LITE0:
        return of_lite0(efficientnet.load(efficientnet.bundled()))
    path = Path(model)
    if path.suffix in (".pth", ".pt", ".safetensors") and path.is_file():
        return of_lite0(efficientnet.load(path))
    folder = folders.folder_of(model)
    config = folders.read_config(folder)
    if config["model_type"] == LITE0:
        return of_lite0(efficientnet.load(folder / "model.safetensors"), config.get("classes", ()))
    if config["model_type"] != "vit":
        raise ValueError(f"{folder}: model type {config['model_type']!r} reads no images; expected "
                         f"'vit' or {LITE0!r}")  # fmt: skip
    return of_vit(huggingface.from_pretrained(folder))


def without_head(vision: Vision) -> Vision:
    """The model up to its features; a new head is put on by `with_head`."""
    kept = {name: tree for name, tree in vision.params.items() if name not in HEADS}
    return vision._replace(params=kept, classes=())


def beside(vision: Vision, kind: str, zeros: trees.Leaves, alpha: float = 1.0) -> Vision:
    """The model with what is trained beside it, which begins as zeros and joins it when it runs.

    Args:
      vision: stays as it is, below ``base/``.
      kind: ``"lora"`` or ``"last"``.
      zeros: as of `hiso_jax.models.subsets`, below the kind's name.
      alpha: of LoRA.
    """
    joined = lambda params: merged(params["base"], kind, params[kind], alpha)  # noqa: E731
    return vision._replace(
        params={"base": vision.params, kind: zeros},
        run=lambda params, x, begin=0, end=None: vision.run(joined(params), x, begin, end),
        rows=lambda count: {f"base/{n}": row for n, row in vision.rows(count).items()},
        save=lambda folder, params, classes: vision.save(
            folder, joined(params) | {k: v for k, v in params.items() if k in HEADS}, classes
        ),
        lazy=False,
    )


def merged(params: trees.Params, kind: str, own: trees.Leaves, alpha: float) -> trees.Params:
    """Parameters with what was trained beside them in them."""
    if kind == "last":
        return subsets.merge_last(params, own)
    return subsets.merge_lora(params, own, alpha)


def with_head(vision: Vision, labels: int) -> Vision:
    """A model, from `without_head`, with a classifier of zeros for other classes.

    It begins at equal chances for all. Whoever has the published weights can make it again.
    """
    last = vision.stages - 1
    width = jax.eval_shape(
        lambda p: vision.run(
            p, jnp.zeros((1, *(vision.size or (64, 64)), vision.channels)), 0, last
        ),
        vision.params,
    ).shape[-1]
    zeros = {"kernel": jnp.zeros((width, labels)), "bias": jnp.zeros(labels)}

    def run(params: Any, x: jax.Array, begin: int = 0, end: int | None = None) -> jax.Array:
        end = last + 1 if end is None else end
        x = vision.run(params["model"], x, begin, min(end, last)) if begin < last else x
        if end > last:
            kernel, bias = (jnp.asarray(params["classifier"][n]) for n in ("kernel", "bias"))
            x = x @ kernel + bias[None]
        return x

    def rows(count: int) -> dict[str, int]:
        below = {f"model/{n}": row for n, row in vision.rows(count).items()
                 if not any(f"{head}/" in n for head in HEADS)}  # fmt: skip
        return {f"classifier/{n}": 0 for n in zeros} | below

    def save(folder: Path, params: Any, classes: Sequence[str]) -> None:
        head = vision.head(*(params["classifier"][n] for n in ("kernel", "bias")))
        vision.save(folder, params["model"] | head, classes)

    return vision._replace(
        params={"model": vision.params, "classifier": zeros}, run=run, rows=rows, save=save,
        lazy=vision.lazy,
    )  # fmt: skip


def finish(adapter: dict[str, Any], made: Path) -> str:
    """Put a run's classifier, and what was trained beside the weights, into replayed weights.

    Args:
      adapter: the run's `hiso_jax.tasks.problem.Problem.adapter`.
      made: folder of the replayed weights and of ``extra.safetensors``, which goes.

    Returns:
      What was done, for people.
    """
    extra = {n: jnp.asarray(x) for n, x in load_file(made / "extra.safetensors").items()}
    vision, kind = load(str(made)), adapter["kind"]
    params, parts = vision.params, []
    if own := {n.partition(f"{kind}/")[2]: x for n, x in extra.items() if f"{kind}/" in n}:
        params = merged(params, kind, own, adapter.get("alpha", 1.0))
        parts.append(f"the {kind} adapter")
    head = [extra.get(f"classifier/{name}") for name in ("kernel", "bias")]
    if head[0] is not None:
        params = {k: v for k, v in params.items() if k not in HEADS} | vision.head(*head)
        parts.append(f"the classifier of {len(adapter['classes'])} classes")
    vision.save(made, params, adapter["classes"])
    (made / "extra.safetensors").unlink()
    return f"{' and '.join(parts)} {'are' if len(parts) > 1 else 'is'} in the weights"
