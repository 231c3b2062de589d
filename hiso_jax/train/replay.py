"""`hiso replay LEDGER BASE OUT`: rebuild a fine-tuned model, and prove that it is the same."""

import time
from pathlib import Path
from typing import Annotated

import tyro

from hiso_jax.ledger.rebuild import rebuild
from hiso_jax.rules import Rule
from hiso_jax.train import methods, report


def rule_of(text: str | None) -> Rule | None:
    """The rule that ``module:function`` makes.

    Raises:
      ValueError: it cannot be imported, or what it makes is no rule.
    """
    if text is None:
        return None
    function = methods.imported(text, "--rule: expected")
    try:
        rule = function()
    except (TypeError, ValueError) as error:
        wanted = "--rule: expected module:function of yours"
        raise ValueError(f"{wanted}, got {text!r}: {error}") from None
    if not isinstance(rule, Rule):
        raise ValueError(f"--rule: expected {text} to make a Rule, got {type(rule).__name__}")
    return rule


def run(ledger: Path, base: Path, out: Path, rule: Rule | None = None) -> None:
    """Replay with a progress bar and print what was proved."""
    begin = time.perf_counter()
    if ledger.is_dir():  # of a run, as other commands take it
        ledger = ledger / "ledger.safetensors"
    with report.progress("{task.percentage:>3.0f}%") as bar:
        tasks = {name: bar.add_task(name, status="", visible=False)
                 for name in ("reading the base", "replaying")}  # fmt: skip

        def step(name: str, count: int, total: int) -> None:
            bar.update(tasks[name], advance=count, total=total, visible=True)

        made = rebuild(ledger, base, out, step, rule)
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
    rule: str | None = None,
) -> None:
    """Rebuild a fine-tuned model from its base and its ledger.

    Args:
      ledger: ledger.sqlite of a run, the ledger.safetensors that was sent, or a run's folder.
      base: what the run started from: a Hugging Face folder, GGUF or .safetensors file.
      out: where to write the fine-tuned one; must not exist.
      rule: module:function that makes the rule, if it is one of yours.
    """
    with report.door():
        run(ledger, base, out, rule_of(rule))


def cli() -> None:
    """Parse the command line and replay."""
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
