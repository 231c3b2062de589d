"""MNIST from scratch over a hundred clients with unequal shares of labels, as DeComFL's paper."""

import dataclasses
import gzip
import sys
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from hiso_jax._engine import exact
from hiso_jax.federation import Arrays
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import job
from hiso_jax.train.digits import Network, images, lecun_normal

DEV = 2_000
"""Of the 60,000 training images, those on which runs are compared."""


class Cnn(Network):
    """Two convolutions and two dense layers for 28 x 28 images, 29,083 parameters."""

    names = ("first", "second", "hidden", "dense")

    def __init__(self, rngs: nnx.Rngs):
        own: Any = dict(kernel_init=lecun_normal, rngs=rngs)
        self.first = nnx.Conv(1, 8, (3, 3), strides=2, **own)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, **own)
        self.hidden = nnx.Linear(784, 35, **own)
        self.dense = nnx.Linear(35, 10, **own)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes, gzipped or not.

    Raises:
      ValueError: it is something else, or cut off.
    """
    try:
        data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from None
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes, got {data[:4].hex()}")
    rank = data[3]
    shape = tuple(np.frombuffer(data, ">u4", rank, 4).tolist())
    if len(data) - 4 - 4 * rank != np.prod(shape):
        raise ValueError(f"{path}: expected {shape} bytes, got {len(data) - 4 - 4 * rank}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read(data: Path | None) -> dict[str, Arrays]:
    """The training and test images, from a folder of IDX files, or from the hub.

    Raises:
      SystemExit: a file is not there, or no folder is given and the hub cannot be reached.
    """
    if data is None:
        import datasets

        try:
            found = datasets.load_dataset("ylecun/mnist").with_format("numpy")
        except Exception as error:  # whatever the hub's client raises
            sys.exit(f"--data: no folder given, and the hub gave no MNIST: {error}")
        whole = {part: (found[part]["image"], found[part]["label"]) for part in ("train", "test")}
    else:
        whole = {}
        for part, stem in (("train", "train"), ("test", "t10k")):
            kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
            paths = [data / f"{stem}-{kind}{end}" for kind in kinds for end in ("", ".gz")]
            there = [path for path in paths if path.is_file()]
            if [path.name.partition(".")[0] for path in there] != [f"{stem}-{k}" for k in kinds]:
                sys.exit(
                    f"--data: {data} lacks {stem}-images-idx3-ubyte or {stem}-labels-idx1-ubyte, "
                    f"each gzipped or not, and not both; there are {[path.name for path in there]}"
                )
            x, y = (read_idx(path) for path in there)
            if x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or y.max(initial=0) > 9:
                sys.exit(f"--data: expected images [N, 28, 28] and N labels from 0 to 9 in {data}, "
                         f"got {x.shape} and {y.shape} up to {y.max(initial=0)}")  # fmt: skip
            whole[part] = (x, y)
    return {
        part: {
            "image": (np.asarray(x)[..., None] / 255 - 0.1307).astype(np.float32) / 0.3081,
            "label": np.asarray(y).astype(np.int32),
        }
        for part, (x, y) in whole.items()
    }


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    """Train a small CNN from scratch on MNIST, over clients with unequal shares of labels."""

    data: Path | None = None
    """Folder with the four IDX files, gzipped or not; by default MNIST comes from the hub."""
    alpha: float = 1.0
    """Dirichlet parameter of the label shares; inf for equal ones."""
    clients: int = 100
    """Clients (M)."""
    rounds: int = 1000
    """Communication rounds."""
    out: Path = Path("runs/mnist")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    clients_per_round: int = 10
    """Clients sampled a round (C)."""
    batch_size: int = 16
    """Examples of a client in a local step."""
    num_perturbations: int = 20
    """Scalars a local step (P)."""
    estimator: Literal["forward", "central"] = "central"
    """Differences: forward costs P + 1 forward passes, central 2 P."""
    eval_every: int = 50
    """Rounds between evaluations on the dev split."""


LEARNING_RATES: dict[str, float] = {}
"""The best of the grid in `experiments.compare`, by method."""


def build(options: Options) -> Problem:
    """MNIST as the options ask for it."""
    whole = read(options.data)
    order = np.random.default_rng(0).permutation(len(whole["train"]["label"]))
    parts = {"dev": order[:DEV], "train": np.sort(order[DEV:])}
    cut = {n: {k: v[own] for k, v in whole["train"].items()} for n, own in parts.items()}
    with exact.usual_types():
        model = Cnn(nnx.Rngs(0))
    everything = cut | {"test": whole["test"]}
    return images("MNIST, CNN", model, everything, options.clients, options.alpha, seed=0)


if __name__ == "__main__":
    job.main(Options, build, LEARNING_RATES)
