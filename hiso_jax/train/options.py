"""The tasks that runs are compared on: their options, from text or a file, and what names a run."""

import dataclasses
import importlib
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hiso_jax.tasks.problem import Problem
from hiso_jax.train import job
from hiso_jax.train import settings as limits
from hiso_jax.train.rows import Row

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("hiso_jax.train.finetune", {}),
    "sst2": ("hiso_jax.train.finetune", dict(task="sst2", length=32, batch_size=8)),
    "llm": ("hiso_jax.train.llm", {}),
    "digits": ("hiso_jax.train.digits", {}),
    "images": ("hiso_jax.train.images", {}),
    "mnist": ("experiments.mnist", {}),
}
"""Modules of jobs, with `Options` and `build`, and what options they have here."""


def options_of(task: str, **given: Any) -> job.Options:
    """The options of the job that a task is, with those given in their place.

    Raises:
      ValueError: there is no such task, or it is of the experiments, which only a clone has.
    """
    if task not in TASKS:
        raise ValueError(f"--task: expected one of {', '.join(TASKS)}, got {task!r}")
    module, own = TASKS[task]
    return _module(module).Options(**dict(eval_examples=0) | own | given)


def build(task: str, options: job.Options) -> Problem:
    """The problem that a task's options ask for."""
    return _module(TASKS[task][0]).build(options).at_most(options.eval_examples)


def _module(name: str) -> Any:
    here = Path.cwd()
    if name.startswith("experiments.") and (here / "experiments").is_dir():
        if str(here) not in sys.path:  # where the command `hiso` does not look
            sys.path.append(str(here))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "experiments":
            raise
        raise ValueError(f"--task: {name} is in a clone of hiso_jax only; run it there") from None


def defaults(task: str, data: Path | None, columns: tuple[str, ...]) -> job.Options:
    """The options of a task, with its data and columns, if they are given."""
    pairs = (("data", data), ("columns", columns))
    given: dict[str, Any] = {name: value for name, value in pairs if value}
    known = {field.name for field in dataclasses.fields(options_of(task))}
    if lost := given.keys() - known:
        raise ValueError(f"--{sorted(lost)[0]}: {task} reads none")
    return options_of(task, **given)


def check(task: str, options: job.Options) -> None:
    """Raise unless the options are in their ranges and fit together; names the option."""
    limits.check(options)
    own = getattr(_module(TASKS[task][0]), "check", None)
    if own is not None:
        own(options)


def settings(options: job.Options) -> Row:
    """All options that a run's figures depend on."""
    left_out = {
        "out", "resume", "distributed", "compare", "mesh", "snapshot_every", "data", "answers",
        "beside", "log",
    }  # fmt: skip
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in left_out}
    for name in ("upper_directions", "upper_layers"):  # one depth is a number in a row
        if kept[name] != "auto":
            kept[name] = kept[name][0] if len(kept[name]) == 1 else kept[name] or 0
    if "task" in kept:  # which is the job, in a row
        kept["text_task"] = kept.pop("task")
    for name, value in kept.items():  # JSON has no infinity, which some take
        if isinstance(value, float) and math.isinf(value):
            kept[name] = str(value)
    return json.loads(json.dumps(kept, default=str))


ELSEWHERE = {
    "method", "learning_rate", "seed", "out", "resume", "compare", "distributed", "data", "columns",
    "log",
}  # fmt: skip
"""Options of a job that are none to vary: a grid has its own, or no run depends on them."""


def fit(hint: Any, value: Any) -> Any:
    """A value as an option of that type has it; one is as good as a list of one.

    Raises:
      ValueError: it is none of that type; says what is wanted.
    """
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        return value if isinstance(value, str) and value in words else fit(kinds[0], value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        if not isinstance(value, list | tuple):
            value = [value] if kind is not int or value else []  # 0 directions are none
        return tuple(fit(kind, x) for x in value)
    truth = isinstance(value, bool)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not truth:
        return float(value)
    if not isinstance(value, hint) or (truth and hint is not bool):
        wanted = {bool: "true or false", int: "a whole number", float: "a number",
                  dict: "a table"}  # fmt: skip
        raise ValueError(wanted.get(hint, "a text"))
    return value


def _from_text(hint: Any, text: str) -> Any:
    """The same of a text on the command line."""
    kinds: dict[Any, Callable[[str], Any]] = {
        bool: lambda text: {"true": True, "false": False}.get(text.lower(), text),
        int: int,
        float: float,
    }
    parts = [part for kind in (hint, *get_args(hint)) for part in (kind, *get_args(kind))]
    read = next((kinds[k] for k in parts if isinstance(k, type) and k in kinds), str)
    try:
        return fit(hint, read(text))
    except ValueError:
        return fit(hint, text)  # which says what is wanted


def modern(name: str) -> str:
    """An option by its name of today, with underscores."""
    name = name.replace("-", "_")
    return limits.RENAMED.get(name, name)


def varied(kind: type, texts: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """Parse ``name=value,value`` by the types of a job's options.

    Raises:
      SystemExit: no such option, or a value it does not take.
    """
    hints, axes = get_type_hints(kind), {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = modern(name)
        if not equals or name not in hints or name in ELSEWHERE:
            sys.exit(f"--vary: expected name=value,value with an option of the job that is not set "
                     f"elsewhere, got {text!r}")  # fmt: skip
        try:
            axes[name] = tuple(_from_text(hints[name], value) for value in values.split(","))
        except ValueError as wanted:
            sys.exit(f"--vary: expected values of {name}, {wanted}, got {values!r}")
    return axes
