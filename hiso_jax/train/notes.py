"""What people are told of a fine-tuning before it begins: what of data and options is not used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_LORA = ("with --train lora only", lambda options: options.train == "lora")
_USED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    # A job that does not ask how examples are split does it by alpha.
    "alpha": ("with --split dirichlet only",
              lambda options: getattr(options, "split", "dirichlet") == "dirichlet"),
    "clients": ("without --split column only",
                lambda options: getattr(options, "split", None) != "column"),
    "lora_rank": _LORA,
    "lora_alpha": _LORA,
    "lora_targets": _LORA,
    "upper_layers": ("with --upper-directions only",
                     lambda options: options.upper_directions not in ((), "auto")),
    "delta": ("with --epsilon only", lambda options: options.epsilon is not None),
    "beside": ("without --compare only", lambda options: not options.compare),
}  # fmt: skip
"""Options of all jobs that have no effect everywhere: how, and where they have."""
_WRITES = ("answers", "room")
"""Options that have none where the model is an encoder."""


def not_used(options: Any) -> list[str]:
    """Notes on options, of any job, that are not its defaults and change nothing."""
    return [f"--{name.replace('_', '-')} is used {how}" for name, (how, is_used) in _USED.items()
            if _given(options, name) and not is_used(options)]  # fmt: skip


def not_used_by_encoders(options: Any) -> list[str]:
    """The same where the model does not write."""
    return [f"--{name} is used by models that write, and an encoder does not"
            for name in _WRITES if _given(options, name)]  # fmt: skip


def _given(options: Any, name: str) -> bool:
    return getattr(options, name, None) != getattr(type(options)(), name, None)


def untuned(options: Any) -> list[str]:
    """A note that the rate was not tuned for these options' model or data.

    Example:
      >>> from hiso_jax.train.finetune import Options
      >>> untuned(Options()), untuned(Options(model="gpt", learning_rate=1e-3))
      ([], [])
    """
    other = [f"--{name}" for name in ("model", "task", "data") if _given(options, name)]
    if options.learning_rate is not None or options.resume is not None or not other:
        return []
    return [f"the learning rate was tuned for the job's own model and data, not for {other[0]}; "
            "to find one: hiso compare --vary NAME=VALUE (docs/your-model.md, A learning rate)"
            ]  # fmt: skip


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
