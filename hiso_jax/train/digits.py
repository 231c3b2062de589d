"""A small network on scikit-learn's handwritten digits: non-IID clients, twenty seconds."""

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from hiso_jax._engine import checks, exact, files, trees
from hiso_jax.federation import Arrays, Clients
from hiso_jax.tasks import splits
from hiso_jax.tasks.problem import Cut, Problem, classification, looked_at
from hiso_jax.train import job


def lecun_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The initializer of flax, drawn flat: the same numbers, for a quarter of the compile time."""
    drawn = jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype).reshape(shape)
    # Cut off at two, a standard normal number has this standard deviation.
    return drawn * (jnp.sqrt(jnp.array(1 / math.prod(shape[:-1]), dtype)) / 0.87962566103423978)


class Network(nnx.Module):
    """Layers one after the other, a ReLU between them; `names` are theirs."""

    names: tuple[str, ...]

    def __call__(self, x: jax.Array, begin: int = 0, end: int | None = None) -> jax.Array:
        """Layers `begin` to `end`, by default all: images [B, H, W, 1] to logits [B, labels]."""
        for name in self.names[begin:end]:
            layer = getattr(self, name)
            x = layer(x if isinstance(layer, nnx.Conv) else x.reshape(x.shape[0], -1))
            x = x if name == self.names[-1] else nnx.relu(x)
        return x


class Cnn(Network):
    """Two convolutions and a dense layer for 8 x 8 images, 4,610 parameters."""

    names = ("first", "second", "dense")

    def __init__(self, rngs: nnx.Rngs):
        own: Any = dict(kernel_init=lecun_normal, rngs=rngs)
        self.first = nnx.Conv(1, 16, (3, 3), strides=2, **own)
        self.second = nnx.Conv(16, 24, (3, 3), strides=2, **own)
        self.dense = nnx.Linear(96, 10, **own)


def images(
    name: str,
    model: Network,
    parts: dict[str, Arrays],
    num_clients: int,
    alpha: float,
    seed: int,
) -> Problem:
    """Images of ten classes, split over clients with label shares from Dirichlet(alpha).

    Args:
      name: of the problem.
      model: images [B, H, W, 1] -> logits [B, 10].
      parts: ``train``, ``dev`` and ``test``, each with columns ``image`` and ``label``.
      num_clients: of whom those without an example are left out.
      alpha: infinity for equal shares.
      seed: of the split.
    """
    checks.count("--clients", num_clients)
    if not np.isinf(alpha):
        checks.number("--alpha", alpha, 0, above=True)
    train = parts["train"]
    own = splits.dirichlet_draws(train["label"], num_clients, alpha, seed)
    graph, state = nnx.split(model)

    def upper(layers: int, before: int | None = None) -> Cut:
        if not 1 <= layers < len(model.names):
            raise ValueError(f"--upper-layers: expected 1 to {len(model.names) - 1}, got {layers}")
        end = len(model.names) - layers

        def trunk(params: Any, batch: Any) -> Any:
            rest = {k: v for k, v in batch.items() if k != "image"}
            return rest | {"stream": nnx.merge(graph, params)(batch["image"], 0, end)}

        def between(params: Any, kept: Any) -> Any:
            begin = len(model.names) - (before or layers)
            return kept | {"stream": nnx.merge(graph, params)(kept["stream"], begin, end)}

        head, _ = classification(lambda p, kept: nnx.merge(graph, p)(kept["stream"], end))
        above = tuple(f"{name}/" for name in model.names[end:])
        leaves = {n: 0 for n in trees.named(params) if n.startswith(above)}
        return Cut(trunk, head, leaves, None if before is None else between)

    def examples(params: Any, batch: Any) -> dict[str, jax.Array]:
        net, end = nnx.merge(graph, params), len(model.names) - 1
        kept = net(batch["image"], 0, end)
        return looked_at(kept.reshape(kept.shape[0], -1), net(kept, end), batch)

    def save(folder: Path, params: Any) -> None:
        with files.atomic_write(folder / "model.safetensors") as part:
            save_file({n: np.asarray(x) for n, x in trees.named(params).items()}, part)

    loss_fn, score = classification(lambda p, batch: nnx.merge(graph, p)(batch["image"]))
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))
    take = lambda picks: {k: v[picks] for k, v in train.items()}  # noqa: E731
    return Problem(
        name=name,
        params=params,
        loss_fn=loss_fn,
        score=score,
        clients=Clients({f"client {i}": take(p) for i, p in enumerate(own) if len(p)}),
        dev=parts["dev"],
        test=parts["test"],
        save=save,
        upper=upper,
        classes=tuple((str(label), "") for label in range(10)),
        examples=examples,
    )


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
    return images("handwritten digits, CNN", model, parts, num_clients, alpha, seed)


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
