"""The rows of a run as it goes: `metrics.jsonl`, and beside it TensorBoard or Weights & Biases."""

import contextlib
import importlib
import importlib.util
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hiso_jax._engine import files
from hiso_jax.train import report
from hiso_jax.train.rows import Row

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What each --log is written with."""
Note = Callable[[Row], None]


def check(names: Sequence[str]) -> None:
    """Raise unless all that is to be logged with is installed.

    Raises:
      ValueError: says what to install.
    """
    for name in names:
        if importlib.util.find_spec(package := PACKAGES[name]) is None:
            raise ValueError(f"--log {name} needs {package}: pip install {package}")


@contextlib.contextmanager
def opened(
    folder: Path,
    rows: Sequence[Row],
    names: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Iterator[Note]:
    """Give a function that adds a row to every log of a run; it is on disk when that returns.

    Args:
      folder: of the run.
      rows: those that there are, of a run that is gone on with; all logs begin with them.
      names: of `PACKAGES`, beside metrics.jsonl.
      about: of the run: method, task and options.

    Raises:
      OSError: a log cannot be begun.
    """
    with files.atomic_write(folder / "metrics.jsonl") as part:
        part.write_text("".join(report.dumps(row) + "\n" for row in rows))
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "metrics.jsonl", "a"))
        others = []
        for name in names:
            try:
                others.append(stack.enter_context(_OTHERS[name](folder, about or {})))
            except Exception as error:  # whatever such a package raises: no account, no network
                raise OSError(f"--log {name}: {error}") from None
        for row in rows:
            for note in others:
                note(row)

        def add(row: Row) -> None:
            log.write(report.dumps(row) + "\n")
            log.flush()
            for note in others:
                note(row)

        yield add


def numbers(row: Row) -> dict[str, float]:
    """What of a row can be drawn.

    Example:
      >>> numbers({"round": 3, "loss": 0.5, "clients": ["ann"], "uplink_bytes": 20})
      {'loss': 0.5, 'uplink_bytes': 20.0}
    """
    return {k: float(v) for k, v in row.items() if k != "round" and isinstance(v, int | float)}


@contextlib.contextmanager
def _tensorboard(folder: Path, about: Mapping[str, Any]) -> Iterator[Note]:
    """Events in the run's folder `tensorboard`, written anew when a run is gone on with."""
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_text("options", "\n".join(f"    {name}: {x}" for name, x in about.items()), 0)

        def note(row: Row) -> None:
            for name, value in numbers(row).items():
                writer.add_scalar(name, value, row["round"])
            writer.flush()

        yield note


@contextlib.contextmanager
def _wandb(folder: Path, about: Mapping[str, Any]) -> Iterator[Note]:
    """A run of Weights & Biases, gone on with under the name that is kept in `wandb-id`."""
    wandb: Any = importlib.import_module("wandb")
    path = folder / "wandb-id"
    if not path.exists():
        with files.atomic_write(path) as part:
            part.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "hiso_jax"),
        name=f"{about.get('method')}: {about.get('task')}",
        id=path.read_text(),
        resume="allow",
        dir=str(folder),
        config=dict(about),
    )
    try:
        yield lambda row: run.log(numbers(row), step=row["round"])
    finally:
        run.finish()


_OTHERS = {"tensorboard": _tensorboard, "wandb": _wandb}
