"""Rows as tables, targets and a section of the docs."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.device import cases, results

Rows = Mapping[str, Mapping[str, Any]]
TARGET = "overhead/opt-1.3b-bfloat16-rademacher-2x32x32-K1-P5"
"""The case that the targets are about: 2,048 tokens."""
OVERHEAD, SHARE = 1.15, 0.40
"""Most a round may cost of its bare passes; least of the matmul rate it may reach."""
MEMORY = 0.5
"""Least of what the memory's bandwidth allows that noise and digest should reach. Set before
anything was measured; below it arithmetic, not memory, is what takes the time."""
BEGIN, END = "<!-- accelerator:begin -->", "<!-- accelerator:end -->"


class Section(NamedTuple):
    """A table of text."""

    title: str
    header: list[str]
    lines: list[list[str]]


def targets(rows: Rows) -> list[dict[str, Any]]:
    """Every target: what is wanted, what was found (None: not measured) and whether it is met."""
    found: list[dict[str, Any]] = []
    judged = not _only_format(rows)

    def add(name: str, wanted: str, value: float | None, met: bool | None, kernel: str) -> None:
        met = met if judged or not kernel else None
        found.append(
            {"target": name, "wanted": wanted, "found": value, "met": met, "kernel": kernel}
        )

    exact = [row for row in rows.values() if row["part"] == "exactness" and row.get("ok")]
    equal = sum(row["found"]["equal"] for row in exact)
    add("digests equal to the CPU's", f"all of {len(exact)}", equal if exact else None,
        equal == len(exact) if exact else None, "")  # fmt: skip
    own = results.good(rows, "overhead").get(TARGET, {})
    over, share = own.get("overhead"), own.get("matmul_share")
    place = "noise beside the weights of a layer (`hiso_jax/lazy.py`, `directions.draw`)"
    add("overhead, OPT-1.3B bfloat16, 2,048 tokens", f"<= {OVERHEAD}", over,
        None if over is None else over <= OVERHEAD, place)  # fmt: skip
    if own and share * own["overhead"] < SHARE:  # what the bare passes reach
        place = "the model's own passes (attention, norms), which miss it without any noise"
    met = None if share is None else share >= SHARE
    add("share of the matmul rate, same case", f">= {SHARE}", share, met, place)
    rates = results.good(rows, "throughput")
    noise = rates.get("throughput/noise-float32", {})
    for law, rate in noise.get("numbers_per_second", {}).items():
        part = rate / noise["memory_numbers_per_second"]
        add(f"noise, {law}, of what the memory allows", f">= {MEMORY}", part, part >= MEMORY,
            f"`directions.draw`, {law}")  # fmt: skip
    if digest := rates.get("throughput/digest"):
        part = digest["gbytes"] / digest["bandwidth_gbytes"]
        add("digest, of the memory's bandwidth", f">= {MEMORY}", part, part >= MEMORY,
            "`hiso_jax/fingerprint.py`, `part`")  # fmt: skip
    return found


def device(rows: Rows) -> dict[str, Any]:
    """What the figures were taken on, or an empty dict."""
    return next((row["device"] for row in rows.values() if "device" in row), {})


def _only_format(rows: Rows) -> bool:
    """Whether the figures are of tiny shapes, or of a CPU: nothing that targets are about."""
    tiny = any(row.get("tiny") for row in rows.values())
    return tiny or device(rows).get("platform") == "cpu"


def summary(rows: Rows) -> dict[str, Any]:
    """All there is, as one JSON."""
    return {
        "device": device(rows) or None,
        "tiny": any(row.get("tiny") for row in rows.values()),
        "targets": targets(rows),
        "rows": list(rows.values()),
    }


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def sections(rows: Rows) -> list[Section]:
    """The tables, those with nothing in them left out."""
    every = [_machine(rows), _exactness(rows), _targets(rows), _overhead(rows), *_throughput(rows),
             _peers(rows), _chunks(rows), _jobs(rows), _missing(rows)]  # fmt: skip
    return [section for section in every if section.lines]


def _machine(rows: Rows) -> Section:
    found = results.good(rows, "machine").get("machine")
    lines = []
    if found:
        lines = [["machine", found["machine"]]]
        lines += [[f"matrix products, {k}", f"{_short(v)} TFLOP/s"]
                  for k, v in found["matmul_tflops"].items()]  # fmt: skip
        lines += [["copy in place", f"{_short(found['bandwidth_gbytes'])} GB/s"],
                  ["precision of float32 products", found["matmul_precision"]]]  # fmt: skip
        if limit := found["memory"].get("bytes_limit"):
            lines += [["memory that JAX may have", f"{limit / 2**30:.1f} GiB"]]
    return Section("The machine", ["", ""], lines)


def _exactness(rows: Rows) -> Section:
    found = {n: row for n, row in rows.items() if row["part"] == "exactness" and row.get("ok")}
    wrong = [n for n, row in found.items() if not row["found"]["equal"]]
    lines = [["equal", f"{len(found) - len(wrong)} of {len(found)}"]] if found else []
    lines += [[n.removeprefix("exactness/"), rows[n]["found"]["where"]] for n in wrong]
    if wrong:
        stages = found.get("exactness/stages", {}).get("found", {})
        first = stages.get("first") or ("none alone" if stages else "stages were not compared")
        lines += [["first operation that differs", first]]
    return Section("Exactness, against the digests of a CPU", ["", ""], lines)


def _targets(rows: Rows) -> Section:
    lines = []
    for own in targets(rows):
        said = {None: "not measured", True: "met", False: "missed"}[own["met"]]
        if own["met"] is None and own["found"] is not None:
            said = "not judged: a CPU, or tiny shapes"
        if own["met"] is False and own["kernel"]:
            said += f"; the place for a kernel: {own['kernel']}"
        lines.append([own["target"], own["wanted"], _short(own["found"]), said])
    return Section("Targets", ["", "wanted", "found", ""], lines if rows else [])


def _overhead(rows: Rows) -> Section:
    best = results.good(rows, "machine").get("machine", {}).get("matmul_tflops", {})
    lines = []
    for name, own in results.good(rows, "overhead").items():
        rate = best.get(own["dtype"])
        of_best = own["round_gflops"] / 1e3 / rate if rate else None
        lines.append([
            name.removeprefix("overhead/"), str(own["tokens"]), f"{1e3 * own['round_seconds']:.1f}",
            f"{1e3 * own['bare_seconds']:.1f}", f"{own['overhead']:.2f}",
            f"{own['matmul_share']:.0%}", "" if of_best is None else f"{of_best:.0%}",
            f"{own['temp_memory']:.2f}", f"{own['rule_memory']:.2f}",
            f"{own['compile_seconds']:.1f}",
        ])  # fmt: skip
    header = ["model, dtype, noise, C x B x T, K, P", "tokens", "round, ms", "bare, ms", "overhead",
              "of products of its shapes", "of large ones", "memory beyond, copies", "H, copies",
              "compile, s"]  # fmt: skip
    return Section("A round over its bare forward passes", header, lines)


def _throughput(rows: Rows) -> list[Section]:
    found = results.good(rows, "throughput")
    noise, replay, digest = [], [], []
    for own in found.values():
        for law, rate in own.get("numbers_per_second", {}).items():
            allowed = own["memory_numbers_per_second"]
            noise.append([law, own["dtype"], f"{rate / 1e9:.3g}", f"{rate / allowed:.0%}"])
        for law, each in own.get("laws", {}).items():
            how = "one program" if "ratio" in each else "in blocks, from a ledger"
            drawn = each.get("noise_numbers_per_second")
            replay.append([law, how, f"{each['replay_numbers_per_second'] / 1e9:.3g}",
                           "" if drawn is None else f"{drawn / 1e9:.3g}",
                           f"{each['ratio']:.2f}" if drawn else ""])  # fmt: skip
        if "gbytes" in own:
            digest.append([_short(own["gbytes"]), f"{own['gbytes'] / own['bandwidth_gbytes']:.0%}",
                           f"{own['share_of_advance']:.1%}"])  # fmt: skip
    return [
        Section("Noise, added to weights in memory",
                ["law", "weights", "10^9 numbers/s", "of what the memory allows"], noise),
        Section("Digest", ["GB/s", "of the memory's bandwidth", "of `advance`, Rademacher, P = 5"],
                digest),
        Section("Replay", ["law", "how", "10^9 numbers/s", "noise alone", "times the noise"],
                replay),
    ]  # fmt: skip


def _peers(rows: Rows) -> Section:
    lines = []
    for name, own in results.good(rows, "peers").items():
        mine, other = own["best"]
        lines.append([
            name.removeprefix("peers/"), f"{1e3 * own['ours'][mine]:.1f} ({mine})",
            f"{1e3 * own['ours']['normal']:.1f}", f"{1e3 * own['theirs'][other]:.1f} ({other})",
            f"{1e3 * own['theirs'].get('sequential', float('nan')):.1f}",
            f"{own['times_faster']:.2f}", f"{own['times_faster_same_law']:.2f}",
        ])  # fmt: skip
    header = ["model, dtype", "ours, ms a round", "ours, normal noise", "PyTorch at its best",
              "PyTorch, sequential", "times faster", "with the same noise"]  # fmt: skip
    return Section("MeZO's loop in PyTorch", header, lines)


def _chunks(rows: Rows) -> Section:
    found = list(results.good(rows, "chunks").values())
    names = sorted(
        {c for own in found for c in own["milliseconds"] | own["failed"]} - {"lazy"}, key=int
    )
    lines = []
    for own in sorted(found, key=lambda own: (own["shape"], own["tokens"])):
        times = own["milliseconds"]
        shown = [f"{times[c]:.3g}" if c in times else ("failed" if c in own["failed"] else "")
                 for c in ["lazy", *names]]  # fmt: skip
        lines.append([f"{own['shape']}, {own['dtype']}", str(own["tokens"]), *shown,
                      str(own["fastest"])])  # fmt: skip
    header = ["model", "tokens", "lazy, one at a time", *(f"{c} at once" for c in names), "fastest"]
    return Section("Perturbations in one batch, ms each", header, lines)


def _jobs(rows: Rows) -> Section:
    lines = [[own["name"], f"{own['clients']} x {own['batch']} x {own['length']}",
              f"{1e3 * own['seconds_a_round']:.1f}", f"{own['first_round_seconds']:.1f}"]
             for own in results.good(rows, "jobs").values()]  # fmt: skip
    header = ["job", "C x B x T", "ms a round", "until the first is done, s"]
    return Section("Jobs, batches of the host included", header, lines)


def _missing(rows: Rows) -> Section:
    lines = [[name, row["reason"]] for name, row in rows.items() if not row.get("ok")]
    return Section("Not measured", ["", "why"], lines)


def table(rows: Rows) -> str:
    """All of it for a terminal."""
    blocks = []
    for section in sections(rows):
        every = [section.header, *section.lines]
        widths = [max(len(line[i]) for line in every) for i in range(len(section.header))]
        text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in every]
        blocks.append("\n".join([section.title, *(f"  {x}".rstrip() for x in text if x.strip())]))
    return "\n\n".join(blocks) if blocks else "Nothing has been measured yet"


def markdown(rows: Rows) -> str:
    """All of it for the docs."""
    blocks = []
    for section in sections(rows):
        lines = [section.header, ["---"] * len(section.header), *section.lines]
        cells = ["| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines]
        blocks.append("\n".join([f"**{section.title}.**", "", *cells]))
    return "\n\n".join(blocks)


def fill(folder: Path, docs: Path) -> str:
    """Put a folder's figures between the marks of docs/performance.md; return what was done.

    Raises:
      SystemExit: there are no figures, or no marks.
    """
    rows, page = results.read(folder), docs / "performance.md"
    text = page.read_text()
    if not rows:
        raise SystemExit(f"{folder}: no {results.FILE} there, or nothing in it")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page.name}: expected the marks {BEGIN} and {END} once each")
    found = summary(rows)
    place = docs / "accelerator"
    place.mkdir(exist_ok=True)
    (place / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    picture = folder / "overview.png"
    if picture.exists():
        shutil.copyfile(picture, place / "overview.png")
    own, when = device(rows), sorted(row["when"] for row in rows.values())
    kind = f"{own.get('count', '?')} x {own.get('kind', 'an unknown device')}"
    warning = ""
    if _only_format(rows):
        warning = ("**This is no accelerator's result**: a CPU, or tiny shapes, to show what the "
                   "section looks like.\n\n")  # fmt: skip
    parts = ", ".join(part for part in cases.PARTS if results.good(rows, part))
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [f"{warning}{kind}, {when[0][:10]}; the parts {parts}. Numbers: "
             "[results.json](accelerator/results.json)."]  # fmt: skip
    lines += ["![Overhead, share of the matmul rate, noise, chunks](accelerator/overview.png)"]
    page.write_text(
        f"{before}{BEGIN}\n" + "\n\n".join([*lines, markdown(rows)]) + f"\n{END}{after}"
    )
    return f"Written: {page}, {place}/"
