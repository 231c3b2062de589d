"""Speeches of plays as JSON lines, every speaker a client: ``python -m experiments.plays IN OUT``.

Understands what Gutenberg-like editions have: ``SPEAKER:`` on a line of its own, the speech, an
empty line.
"""

import json
import re
from pathlib import Path
from typing import Annotated

import tyro

from hiso_jax._engine import files
from hiso_jax.train import report


def speeches(text: str) -> list[dict[str, str]]:
    """Rows of ``text`` and ``client``, in order."""
    found = (re.fullmatch(r"([^\n:]+):\n(.+)", b, re.S) for b in re.split(r"\n\n+", text.strip()))
    return [{"text": match[2].strip(), "client": match[1]} for match in found if match]


def main(
    source: Annotated[Path, tyro.conf.arg(metavar="IN")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
) -> None:
    """Write the speeches of a text file as JSON lines.

    Args:
      source: the plays.
      out: a .jsonl file, replaced if it is there.
    """
    rows = speeches(source.read_text("utf-8-sig"))
    if not rows:
        raise ValueError(f"{source}: no speeches; expected 'NAME:' on a line, and the speech below")
    with files.atomic_write(out) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} speeches of {len({row['client'] for row in rows})} speakers: {out}")


if __name__ == "__main__":
    with report.door():
        tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
