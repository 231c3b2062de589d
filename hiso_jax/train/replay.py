"""`hiso replay LEDGER BASE OUT`: rebuild a fine-tuned model, and prove that it is the same."""

import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from hiso_jax.ledger import LedgerError
from hiso_jax.ledger.rebuild import rebuild
from hiso_jax.train import report


def run(ledger: Path, base: Path, out: Path) -> None:
    """Replay with a progress bar and print what was proved."""
    begin = time.perf_counter()
    with report.progress("{task.percentage:>3.0f}%") as bar:
        tasks = {name: bar.add_task(name, status="", visible=False)
                 for name in ("reading the base", "replaying")}  # fmt: skip

        def step(name: str, count: int, total: int) -> None:
            bar.update(tasks[name], advance=count, total=total, visible=True)

        made = rebuild(ledger, base, out, step)
    seconds = time.perf_counter() - begin
    report.say(
        f"{made.rounds} rounds, {ledger.stat().st_size:,} bytes, {made.parameters:,} parameters: "
        f"{seconds:.1f} s"
    )
    if made.proved:
        report.say(f"digest {made.digest}: equal to the ledger's, bit for bit", style="green")
    else:
        report.say(f"digest {made.digest}; the ledger has none to compare with")
    if made.note:
        report.say(made.note)
    report.say("Written to ", str(out))


def main(
    ledger: Annotated[Path, tyro.conf.arg(metavar="LEDGER")],
    base: Annotated[Path, tyro.conf.arg(metavar="BASE")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
) -> None:
    """Rebuild a fine-tuned model from its base and its ledger.

    Args:
      ledger: ledger.sqlite of a run, or the ledger.safetensors that was sent.
      base: what the run started from: a Hugging Face folder, GGUF or .safetensors file.
      out: where to write the fine-tuned one; must not exist.
    """
    try:
        run(ledger, base, out)
    except (OSError, ValueError, LedgerError) as error:
        report.fail(error)
        sys.exit(1)


def cli() -> None:
    """Parse the command line and replay."""
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
