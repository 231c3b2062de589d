"""MNIST from scratch over a hundred clients with unequal shares of labels, as DeComFL's paper.

`hiso images` without a model, under the options that the rows of `docs/results/mnist.jsonl` have.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from hiso_jax._engine import checks
from hiso_jax.tasks import image_problem, images
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import job
from hiso_jax.train.images import network


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    """Train a small CNN from scratch on MNIST, over clients with unequal shares of labels."""

    data: Path | None = None
    """Folder with the four IDX files, gzipped or not; by default MNIST comes from the hub."""
    alpha: float = 1.0
    """Dirichlet parameter of the label shares; inf for equal ones."""
    size_spread: float = 0.0
    """Standard deviation of the logarithm of a client's number of images."""
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


def check(options: Options) -> None:
    """Raise unless the options are in their ranges; the message names the option."""
    checks.number("--size-spread", options.size_spread, 0)


def build(options: Options) -> Problem:
    """MNIST as the options ask for it."""
    found = images.of_hub() if options.data is None else images.of_idx(options.data)
    return image_problem.scratch(
        "MNIST, CNN", network(), found.parts, options.clients, options.alpha, 0, options.size_spread
    )


if __name__ == "__main__":
    job.main(Options, build, LEARNING_RATES)
