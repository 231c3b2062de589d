"""How a job ends: its table, where the files are, how it is gone on with, and the exit code."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hiso_jax import LedgerError
from hiso_jax.train import folders, report
from hiso_jax.train.settings import Options


@contextlib.contextmanager
def safe(out: Path) -> Iterator[None]:
    """On an error of the disk, or Ctrl-C, say how to go on with the run in `out`, and exit.

    Raises:
      SystemExit: 1 after an error, 130 after Ctrl-C.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        report.say("Stopped.", style="yellow")
        code = 130
    except (OSError, LedgerError, SafetensorError) as error:  # the last: a full disk
        report.fail(error)
        code = 1
    if (out / "options.json").exists():
        report.say(f"What was recorded is safe. To go on: {report.resuming(out)}")
    sys.exit(code)


def say(options: Options, summaries: list[dict[str, Any]]) -> None:
    """Print the table and where the files are; exit with 1 unless all is as it was asked for.

    Args:
      options: of the job.
      summaries: of the methods that were run, as `job.train` returns them; those that Ctrl-C came
        before have none.
    """
    report.console.print(report.table(summaries))
    folders.say_where(options.out, [s["method"] for s in summaries], len(options.methods) > 1)
    broken = [s for s in summaries if s.get("stopped")]
    for summary in (s for s in summaries if s.get("failed")):
        report.fail(f"Not measured: {'; '.join(summary['failed'])}. The weights are written.")
    if broken:
        why = "see above" if options.epsilon is None else broken[0]["stopped"]
        report.fail(f"It ended after {broken[0]['rounds']} of {options.rounds} rounds: {why}.")
    left = [s for s in summaries if s["rounds"] < options.rounds and not s.get("stopped")]
    if left or len(summaries) < len(options.methods):
        report.say(f"To go on with it: {report.resuming(options.out)}")
    if broken or any(s.get("failed") for s in summaries):
        sys.exit(1)
