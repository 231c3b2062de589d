"""What people are told of a fine-tuning before it begins: what of data and options is not used."""

from pathlib import Path
from typing import Any

import numpy as np

_WITH = {"alpha": ("split", "dirichlet")} | {
    f"lora_{name}": ("train", "lora") for name in ("rank", "alpha", "targets")
}
"""Options that are used where another has a value."""


def not_used(options: Any) -> list[str]:
    """Notes on options that are not the job's defaults and change nothing."""
    default = type(options)()
    return [
        f"--{name.replace('_', '-')} is used with --{other} {value} only"
        for name, (other, value) in _WITH.items()
        if getattr(options, name) != getattr(default, name) and getattr(options, other) != value
    ]


def untuned(options: Any) -> list[str]:
    """A note that the rate was not tuned for these options' model or data.

    Example:
      >>> from hiso_jax.train.finetune import Options
      >>> untuned(Options()), untuned(Options(model="gpt", learning_rate=1e-3))
      ([], [])
    """
    default = type(options)()
    other = [f"--{name}" for name in ("model", "task", "data")
             if getattr(options, name, None) != getattr(default, name, None)]  # fmt: skip
    if options.learning_rate is not None or options.resume is not None or not other:
        return []
    return [f"the learning rate was tuned for the job's own model and data, not for {other[0]}; "
            "hiso compare finds one"]  # fmt: skip


def beside(source: Path | None) -> list[str]:
    """Notes on what an earlier run has trained beside the weights, which is not read."""
    if source is None:
        return []
    return [
        f"{name} of the model's folder is not read: the run begins at the weights alone"
        for name in ("prefix.safetensors", "labels.safetensors")
        if (source / name).is_file()
    ]


def cut(train: Any, length: int, what: str) -> list[str]:
    """A note on the texts that `length` leaves nothing free in; whether it cut them is not kept."""
    mask = train["attention_mask"]
    full = int(np.all(mask, axis=-1).sum())
    return [f"train: {full} of {len(mask)} texts take all of --length {length} tokens; of longer "
            f"ones the {what} is not read"] if full else []  # fmt: skip
