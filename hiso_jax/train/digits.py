"""A small network on scikit-learn's handwritten digits: non-IID clients, twenty seconds."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from hiso_jax._engine import exact
from hiso_jax.models import vision
from hiso_jax.models.cnn import Network, lecun_normal
from hiso_jax.tasks import image_problem, splits
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import job


class Cnn(Network):
    """Two convolutions and a dense layer for 8 x 8 images, 4,610 parameters."""

    names = ("first", "second", "dense")

    def __init__(self, rngs: nnx.Rngs):
        own: Any = dict(kernel_init=lecun_normal, rngs=rngs)
        self.first = nnx.Conv(1, 16, (3, 3), strides=2, **own)
        self.second = nnx.Conv(16, 24, (3, 3), strides=2, **own)
        self.dense = nnx.Linear(96, 10, **own)


def table() -> np.ndarray:
    """scikit-learn's file: a row a digit, 64 pixels from 0 to 16 and the label."""
    # Not by load_digits: importing scikit-learn takes a quarter of a short job's time.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the digits are a file of scikit-learn: pip install scikit-learn")
    return np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")


def digits(num_clients: int = 40, alpha: float = 1.0, seed: int = 0) -> Problem:
    """The 1,797 digits, split over clients with label shares from Dirichlet(alpha)."""
    pixels, label = np.split(table(), [64], axis=1)
    columns = {
        "image": (pixels.reshape(-1, 8, 8, 1) / 16 - 0.3).astype(np.float32),
        "label": label[:, 0].astype(np.int32),
    }
    names, picks = ("train", "dev", "test"), splits.train_dev_test(len(label), seed=0)
    parts = {
        n: {k: v[own] for k, v in columns.items()} for n, own in zip(names, picks, strict=True)
    }
    with exact.usual_types():
        model = Cnn(nnx.Rngs(seed))
    own = vision.of_network(model, 8)
    return image_problem.scratch("handwritten digits, CNN", own, parts, num_clients, alpha, seed)


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    """Train a small CNN from scratch on digits, over clients with unequal shares of labels."""

    clients: int = 40
    """Clients (M)."""
    alpha: float = 1.0
    """Dirichlet parameter of the label shares; inf for equal ones."""
    rounds: int = 600
    """Communication rounds."""
    out: Path = Path("runs/digits")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    batch_size: int = 16
    """Examples of a client in a local step."""
    num_perturbations: int = 10
    """Scalars a local step (P); an update costs P + 1 forward passes."""
    eval_every: int = 50
    """Rounds between evaluations on the dev split."""


LEARNING_RATES = {"hiso": 2e-2, "decomfl": 4e-2}
"""The best of the grid in `hiso compare`, by method."""


def build(options: Options) -> Problem:
    """The digits as the options ask for them."""
    return digits(options.clients, options.alpha)


def cli() -> None:
    """Parse the command line and run."""
    job.main(Options, build, LEARNING_RATES)
