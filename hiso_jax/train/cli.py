"""The console script `hiso`: one command per job."""

import importlib
import importlib.metadata
import io
import os
import sys

from hiso_jax._engine import extras

COMMANDS = {
    "finetune": "fine-tune a language model over clients that send a few bytes per round",
    "llm": "fine-tune SmolLM2 (134.5 M parameters) like that, with FedAdam beside it",
    "digits": "train a small network on handwritten digits, in twenty seconds",
    "images": "train on MNIST, CIFAR-10 or folders of images: a small CNN, EfficientNet or a ViT",
    "predict": "label new rows with the model that finetune or llm has left",
    "watch": "the figures of a run in a terminal, as they come",
    "replay": "rebuild a fine-tuned model from its base and a ledger, and prove it",
    "compare": "run a grid of methods, learning rates and seeds",
    "results": "tables and figures of what compare wrote",
    "nvflare": "prepare machines, write a job and run it over real sites, with NVFlare",
}
ELSEWHERE = {"nvflare": "hiso_jax.nvflare.job"}
"""Modules of commands that are not of this folder."""


def choose(program: str, commands: dict[str, str], more: str) -> list[str] | None:
    """The command that is named, and its arguments; None if help was asked for, and printed.

    Args:
      program: what the commands are of.
      commands: name -> what it does.
      more: where help goes on.

    Raises:
      SystemExit: there is no such command.
    """
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"Usage: {program} COMMAND [OPTIONS]; {more}\n")
        for command, what in commands.items():
            print(f"  {command:10} {what}")
        return None
    if name not in commands:
        sys.exit(f"{program}: expected one of {', '.join(commands)}, got {name!r}")
    return [name, *rest]


def _run() -> None:
    """Run the command that is named."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names need not be in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:] == ["--version"]:
        print("hiso_jax", importlib.metadata.version("hiso-jax"))
        return
    if (chosen := choose("hiso", COMMANDS, "hiso COMMAND --help has the options.")) is None:
        return
    name, *rest = chosen
    # For `--method module:function`. A console script, unlike `python -m`, does not look in the
    # working folder; last on the path, so that a file there never hides a package.
    sys.path.append(os.getcwd())
    # Or transformers says that without torch there are no models, of which none here is its.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        job = importlib.import_module(ELSEWHERE.get(name, f"hiso_jax.train.{name}"))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "hiso_jax":
            raise
        sys.exit(extras.needs(f"hiso {name}", str(error.name), "train"))
    sys.argv = [f"hiso {name}", *rest]
    job.cli()


def main() -> None:
    """Run the command that is named; each has its own --help.

    Raises:
      SystemExit: how it ended; 130 after Ctrl-C.
    """
    try:
        _run()
    except KeyboardInterrupt:  # before the command was there, or where it has nothing to say
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
