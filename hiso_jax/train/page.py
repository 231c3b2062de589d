"""`report.html`: a run as one page that can be sent to a colleague; it needs no network.

Made of the files of a run's folder and of nothing else, so that it can be made again at any time.
"""

import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax._engine import files
from hiso_jax.train import report
from hiso_jax.train.folders import find
from hiso_jax.train.methods import sends_models, title

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.2rem 1rem 0.2rem 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid #ddd; overflow-wrap: break-word; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg, img { max-width: 100%; height: auto; }
code, pre { background: #f4f4f4; padding: 0.1rem 0.3rem; font-size: 0.9em; }
pre { padding: 0.7rem; overflow-x: auto; }
.scroll { overflow-x: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.pictures svg { width: 100%; }
"""
CLIENTS = 60
"""Clients that are drawn by name; of more, only how often they took part."""


class Markup(str):
    """Text that is HTML already, where other text is escaped."""


def svg(picture: Any) -> str:
    """A picture as part of a page."""
    import matplotlib

    out = io.StringIO()
    # The same run gives the same page: without the date, and with names that follow from the rest.
    with matplotlib.rc_context({"svg.hashsalt": "hiso_jax"}):
        picture.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Rows as a table; numbers stand to the right."""

    def cell(value: Any) -> str:
        if isinstance(value, Markup):
            return f"<td>{value}</td>"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = f"{value:,.6g}" if isinstance(value, float) else str(value)
        return f"<td{' class=number' * number}>{html.escape(shown)}</td>"

    lines = (
        [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"] if head else []
    )
    lines += [f"<tr>{''.join(map(cell, row))}</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def curves(rows: Sequence[Mapping[str, Any]], metric: str, passes: float) -> str:
    """Metric and loss on the dev split against rounds, forward passes and bytes sent."""
    looks = [row for row in rows if row.get("dev_loss") is not None]
    scale = report.percent(metric)
    values = [math.nan if (y := r[f"dev_{metric}"]) is None else scale * y for r in looks]
    rounds = np.array([row["round"] for row in looks])
    against = {
        "round": rounds,
        "forward passes of a client that always took part": rounds * passes,
        "bytes sent by all clients": np.array([row.get("uplink_bytes", 0) for row in looks]),
    }
    pictures = []
    for label, x in against.items():
        picture = report.blank(4, 5)
        upper, lower = picture.subplots(2, 1, sharex=True)
        upper.plot(x, values, marker=".")
        lower.plot(x, [row["dev_loss"] for row in looks], marker=".", color="C1")
        upper.set(ylabel=f"dev {metric}" + ", %" * (scale > 1))
        lower.set(ylabel="dev loss", xlabel=label)
        pictures.append(svg(report.framed(picture)))
    return "".join(pictures)


def rounds_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss of the clients that took part and seconds, round by round."""
    taken = [row for row in rows if "seconds" in row]
    pictures = []
    for name in ("loss", "seconds"):
        values = [math.nan if row[name] is None else row[name] for row in taken]
        if taken and all(map(math.isnan, values)):
            continue  # nobody is told, under --epsilon
        picture = report.blank(6, 2.6)
        axis = picture.subplots()
        axis.plot([row["round"] for row in taken], values, linewidth=0.8)
        axis.set(xlabel="round", ylabel="loss of those who took part" if name == "loss" else name)
        if name == "seconds" and len(taken) > 1:  # the first one is mostly compilation
            axis.set_ylim(0, 1.2 * max(values[1:]) + 1e-3)
        pictures.append(svg(report.framed(picture)))
    return "".join(pictures)


def participation(rows: Sequence[Mapping[str, Any]]) -> str:
    """How often each client was asked."""
    asked = Counter(str(name) for row in rows for name in row.get("clients", ()))
    names = sorted(asked, key=lambda name: (-asked[name], name))
    picture = report.blank(12, 2.6)
    axis = picture.subplots()
    if len(names) <= CLIENTS:
        axis.bar(range(len(names)), [asked[name] for name in names])
        shown = [name if len(name) < 15 else f"{name[:12]}..." for name in names]
        axis.set_xticks(range(len(names)), shown, rotation=90, fontsize=6, parse_math=False)
    else:  # a step for all that were asked alike: bars of many clients take minutes, and megabytes
        alike = Counter(asked.values())
        heights = sorted(alike, reverse=True)
        ends = np.cumsum([0, *(alike[height] for height in heights)])
        axis.stairs(heights, ends - 0.5, fill=True)
    axis.set(xlabel=f"{len(names)} clients", ylabel="rounds asked")
    return svg(report.framed(picture))


def _json(path: Path | None) -> Any:
    return json.loads(path.read_text()) if path is not None and path.is_file() else None


def _text(value: Any, digits: int = 6) -> str:
    """A value in a column of unlike ones, which stand to the left."""
    return f"{value:,.{digits}g}" if isinstance(value, float) else str(value)


def _results(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    metric = summary["metric"]
    show = lambda value: report.figure(metric, value)  # noqa: E731
    masks = report.beside(summary)
    named = ((f"sent by a client{masks}", "uplink_bytes_per_client"),
             (f"received by a client{masks}", "downlink_bytes_per_client"),
             ("the whole run as a file", "shipped_bytes"),
             ("FedAvg would have moved, per client", "fedavg_bytes_per_client"))  # fmt: skip
    spent = []
    if "epsilon_spent" in summary:
        spent.append((f"epsilon spent, delta {summary['delta']:g}",
                      _text(summary["epsilon_spent"], 3)))  # fmt: skip
    return [
        (f"test {metric} before", show(summary[f"{metric}_before"])),
        (f"test {metric} after", show(summary[metric])),
        ("rounds", f"{summary['rounds']:,}"),
        ("clients", f"{summary['clients']:,}"),
        *spent,
        ("parameters trained", f"{summary['trained_parameters']:,} of {summary['parameters']:,}"),
        *((label, report.size(summary[key])) for label, key in named if summary[key]),
        ("forward passes per round", _text(summary.get("passes_per_round", ""))),
        ("seconds per round", _text(summary["seconds_per_round"], 3)),
    ]


def _used(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's figures depend on, without the paths of the machine it was on."""
    left_out = {"out", "resume", "distributed", "answers"}
    if options.get("data"):
        left_out |= {"task"} if options.get("task") == "docstrings" else set()
        left_out |= {"clients"} if options.get("split") == "column" else set()
    elif options.get("task") == "docstrings":
        left_out |= {"split", "clients"}
    # A job without the option splits by alpha alone.
    by_alpha = options.get("split", "dirichlet") == "dirichlet" and "split" not in left_out
    left_out |= set() if by_alpha else {"alpha"}
    left_out |= {"client_column"} if options.get("split") != "column" else set()
    left_out |= {"budget", "renew"} if options.get("select") is None else set()
    left_out |= {"delta", "clip"} if options.get("epsilon") is None else set()
    if options.get("train") != "lora":
        left_out |= {"lora_rank", "lora_alpha", "lora_targets"}
    kept = {k: v for k, v in options.items() if k not in left_out}
    paths = {k: Path(str(kept[k])).name for k in ("data", "model") if kept.get(k)}
    return kept | paths


def page(folder: Path) -> str:
    """The page of the run in a folder, as `hiso_jax.train.job.train` left it.

    Raises:
      OSError, ValueError: there is no such run.
    """
    summary = _json(folder / "summary.json")
    options = _json(find(folder, "options.json")) or {"options": {}}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metric, name = summary["metric"], title(summary["method"])
    parts = [f"<h1>{html.escape(name)}: {html.escape(summary['task'])}</h1>",
             table(_results(summary))]  # fmt: skip
    if summary.get("stopped") or summary.get("failed"):
        parts.append(
            f"<p><b>{html.escape(str(summary.get('stopped') or summary['failed']))}</b></p>"
        )
    drawn = {
        "Curves": curves(rows, metric, summary.get("passes_per_round") or 1),
        "Rounds": rounds_of(rows),
        "Who took part": participation(rows),
    }
    parts += [f'<h2>{name}</h2><div class="pictures">{x}</div>' for name, x in drawn.items()]
    if split := find(folder, "split.png"):
        data = base64.b64encode(split.read_bytes()).decode()
        source = f"data:image/png;base64,{data}"
        parts.append(f'<h2>How the data is split</h2><img alt="Examples by client" src="{source}">')
    if labels := _json(find(folder, "labels.json")):
        parts += [table([list(row.values()) for row in labels], list(labels[0]))]
    if answers := _json(folder / "answers.json"):
        columns = ("prompt", "wanted", "before", "written")
        parts += ["<h2>Predictions</h2>",
                  table([[row[c] for c in columns] for row in answers],
                        ["prompt", "wanted", "before", "after"])]  # fmt: skip
    settings = _used(options["options"]) | {"learning_rate": summary["learning_rate"]}
    parts += [
        "<h2>Proof</h2><p>After the last round everybody who took part has this digest:</p>",
        f"<pre>{html.escape(summary['digest'])}</pre>",
    ]
    # What begins at random has no folder to begin with.
    begun = settings.get("model") != "cnn" and options.get("job") != "digits"
    if begun and not sends_models(summary["method"]):
        parts += [
            "<p>Whoever has the base model rebuilds the fine-tuned one from the ledger; "
            "every round's digest is compared:</p>",
            "<pre>hiso replay ledger.safetensors BASE_FOLDER OUT_FOLDER</pre>",
        ]
    parts += [
        "<h2>Settings</h2>",
        table((name, _text(value)) for name, value in sorted(settings.items())),
    ]
    return document(f"{name}: {summary['task']}", parts)


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """Parts of HTML as a file that needs nothing else."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write(folder: Path) -> Path:
    """Write `report.html` into a run's folder, whole or not at all; return its path."""
    path = folder / "report.html"
    with files.atomic_write(path) as part:
        part.write_text(page(folder), encoding="utf-8")
    return path
