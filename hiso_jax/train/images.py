"""Train a model of images over clients that send a few bytes per round."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from hiso_jax._engine import checks, exact
from hiso_jax.models import cnn, vision
from hiso_jax.tasks import image_problem, images
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import job, report

MEAN, STD = 0.1307, 0.3081
"""Of MNIST's pixels; the small network's images are normalized with them."""


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    """Train a model of images over clients with unequal shares of labels.

    Without a model: a small CNN from scratch. With --model efficientnet-lite0: a network of
    4.65 M parameters that has seen ImageNet, and gets a new classifier; with a folder: a ViT.
    """

    data: Path | None = None
    """Folder with the four IDX files of MNIST or Fashion-MNIST, the files of CIFAR-10, or a folder
    of images for each class; by default MNIST comes from the hub."""
    model: str = "cnn"
    """cnn, efficientnet-lite0, or the folder or hub id of a ViT, or a folder that a run wrote."""
    train: str = "all"
    """What is trained: all, head (the classifier), last-N stages, norms, biases, or lora (ViT)."""
    size: int | None = None
    """Height and width that images are scaled to, where the model takes any; by default those of
    the data, and for EfficientNet 64, or 224 if the data are folders of images."""
    lora_rank: int = 8
    """Rank of LoRA."""
    lora_alpha: float = 16.0
    """LoRA's change is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("query", "value")
    """Modules that LoRA adapts."""
    alpha: float = 1.0
    """Dirichlet parameter of the label shares; inf for equal ones."""
    clients: int = 100
    """Clients (M)."""
    rounds: int = 1000
    """Communication rounds."""
    out: Path = Path("runs/images")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    clients_per_round: int = 10
    """Clients sampled a round (C)."""
    batch_size: int = 16
    """Examples of a client in a local step."""
    num_perturbations: int = 20
    """Scalars a local step (P)."""
    estimator: Literal["forward", "central"] = "forward"
    """Differences: forward costs P + 1 forward passes, central 2 P."""
    eval_every: int = 50
    """Rounds between evaluations on the dev split."""


LEARNING_RATES: dict[str, float] = {}
"""The best of a grid, by method."""


def check(options: Options) -> None:
    """Raise unless the options fit together; the message names the option."""
    if not re.fullmatch(image_problem.KINDS, options.train):
        raise ValueError(f"--train: expected all, head, norms, biases, lora or last-N, got "
                         f"{options.train!r}")  # fmt: skip
    if not options.model:
        raise ValueError("--model: expected cnn, efficientnet-lite0 or a folder, got nothing")
    for name, value in (("--clients", options.clients), ("--lora-rank", options.lora_rank)):
        checks.count(name, value)
    if options.size is not None and checks.count("--size", options.size) < 8:
        raise ValueError(f"--size: expected at least 8 pixels, got {options.size}")
    if not np.isinf(options.alpha):
        checks.number("--alpha", options.alpha, 0, above=True)
    checks.number("--lora-alpha", options.lora_alpha, 0, above=True)
    if not options.lora_targets:
        raise ValueError("--lora-targets: expected at least one module, got none")
    if options.model == "cnn" and options.train != "all":
        raise ValueError(f"--train: the small network has nothing pretrained, expected all, got "
                         f"{options.train!r}")  # fmt: skip


def network(size: int = 28, channels: int = 1, labels: int = 10) -> vision.Vision:
    """The small CNN with its first weights, the same in every run."""
    with exact.usual_types():
        model = cnn.Cnn(nnx.Rngs(0), size, channels, labels)
    return vision.of_network(model, size, channels, MEAN, STD)


def build(options: Options) -> Problem:
    """Read data and model; give the images to clients.

    Raises:
      OSError, ValueError: what is wrong with options, files or checkpoint, in one line.
    """
    check(options)
    small = options.model == "cnn"
    pretrained = None if small else vision.load(options.model)
    own = pretrained.size[0] if pretrained and pretrained.size else None
    if own is not None and options.size not in (None, own):
        raise ValueError(f"--size: {options.model} takes images of {own} pixels, got "
                         f"{options.size}")  # fmt: skip
    if options.data is None:
        found = images.of_hub()
    else:
        found = images.read(options.data, options.size or own or (32 if small else 224))
    stored = found.parts["train"]["image"].shape
    size = options.size or own or (64 if pretrained and stored[1] < 64 else stored[1])
    if pretrained is None:
        used = image_problem.Trained(network(size, stored[-1], len(found.classes)), None, 0, None)
        shown = "CNN"
    else:
        if pretrained.size is None:
            pretrained = pretrained._replace(size=(size, size))
        used = image_problem.trained(pretrained, options.train, found.classes, options.lora_rank,
                                     options.lora_alpha, options.lora_targets)  # fmt: skip
        count = sum(x.size for x in jax.tree.leaves(used.model.params))
        shown = f"{Path(options.model).name} ({count / 1e6:.1f} M parameters)"
        if used.frozen:
            report.say(f"Computing what the frozen stages make of the images, once, at {size} x "
                       f"{size} pixels ...")  # fmt: skip
    labels = found.parts["train"]["label"]
    clients = image_problem.over(labels, options.clients, options.alpha, seed=0)
    name = "MNIST" if options.data is None else options.data.resolve().name
    made = image_problem.problem(
        f"{name}, {shown}", used, found.parts, clients, images.names(found.classes),
        options.eval_examples,
    )  # fmt: skip
    if pretrained is not None:
        made = made._replace(save=_saver(made.save, options.model == vision.LITE0))
    return made._replace(notes=(*found.notes, *made.notes))


def _saver(save: Any, packaged: bool) -> Any:
    """Save into the folder ``model``; and what is in a package into ``base``, for `hiso replay`."""

    def both(folder: Path, params: Any) -> None:
        save(folder / "model", params)
        if packaged:
            start = vision.load(vision.LITE0)
            start.save(folder / "base", start.params, ())

    return both


def cli() -> None:
    """Parse the command line and run."""
    job.main(Options, build, LEARNING_RATES)
