"""One picture of all that was found: overhead, share of the matmul rate, noise, chunks."""

from pathlib import Path
from typing import Any

from benchmarks.device import report, results

OURS, PALE, MARK = "#2a6f97", "#a9c6d9", "#c1121f"


def draw(rows: report.Rows, path: Path) -> None:
    """Draw the four panels; one without figures says so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = len(results.good(rows, "overhead"))
    size = (15, max(7.5, 3.5 + 0.28 * cases))
    figure, axes = plt.subplots(2, 2, figsize=size, layout="constrained",
                                height_ratios=[max(cases, 4), 8])  # fmt: skip
    panels = [_overhead, _share, _noise, _chunks]
    for axis, panel in zip(axes.flat, panels, strict=True):
        if not panel(axis, rows):
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", color="0.5",
                      transform=axis.transAxes)  # fmt: skip
            axis.set_axis_off()
        axis.spines[["top", "right"]].set_visible(False)
    device = report.device(rows)
    shown = f"{device['count']} x {device['kind']} ({device['platform']})" if device else "nothing"
    tiny = ", tiny shapes: the format only" if any(r.get("tiny") for r in rows.values()) else ""
    figure.suptitle(f"Measured on {shown}{tiny}", x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Any, names: list[str], values: list[float], target: float, title: str) -> None:
    axis.barh(range(len(names)), values, color=OURS, height=0.6)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(target, color=MARK, lw=1.2, ls="--")
    for i, value in enumerate(values):
        axis.annotate(f"{value:.2f}", (value, i), (3, 0), textcoords="offset points", va="center",
                      fontsize=8, bbox=dict(fc="white", ec="none", pad=0.4, alpha=0.8))  # fmt: skip
    axis.margins(x=0.1)
    axis.set_title(f"{title}\n(dashed: {target}, the target of OPT-1.3B, bfloat16, 2,048 tokens)",
                   loc="left", fontsize=10)  # fmt: skip


def _overhead(axis: Any, rows: report.Rows) -> bool:
    found = results.good(rows, "overhead")
    if found:
        names = [name.removeprefix("overhead/") for name in found]
        values = [own["overhead"] for own in found.values()]
        _bars(axis, names, values, report.OVERHEAD, "A round over its bare forward passes")
    return bool(found)


def _share(axis: Any, rows: report.Rows) -> bool:
    found = results.good(rows, "overhead")
    if found:
        values = [own["matmul_share"] for own in found.values()]
        title = "A round's share of the rate of matrix products of its shapes"
        _bars(axis, [""] * len(found), values, report.SHARE, title)
    return bool(found)


def _noise(axis: Any, rows: report.Rows) -> bool:
    found = [x for x in results.good(rows, "throughput").values() if "numbers_per_second" in x]
    ticks, values, allowed = [], [], []
    for own in found:
        for law, rate in own["numbers_per_second"].items():
            ticks.append(f"{law}\n{own['dtype']}")
            values.append(rate / 1e9)
            allowed.append(own["memory_numbers_per_second"] / 1e9)
    if found:
        axis.bar(range(len(ticks)), allowed, color=PALE, width=0.75)
        axis.bar(range(len(ticks)), values, color=OURS, width=0.5)
        for i, (value, most) in enumerate(zip(values, allowed, strict=True)):
            axis.annotate(f"{value:.3g}\n{value / most:.0%}", (i, value), (0, 3), fontsize=8,
                          textcoords="offset points", ha="center", va="bottom")  # fmt: skip
        axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
        axis.set_ylabel("$10^9$ numbers a second")
        axis.set_title("Noise, added to weights in memory\n(pale: what reading and writing the "
                       "weights allows)", loc="left", fontsize=10)  # fmt: skip
    return bool(found)


def _chunks(axis: Any, rows: report.Rows) -> bool:
    found = sorted(results.good(rows, "chunks").values(), key=lambda x: (x["shape"], x["tokens"]))
    styles = dict(zip(sorted({x["shape"] for x in found}), ("o-", "s--", "^:"), strict=False))
    every = sorted({int(c) for x in found for c in x["milliseconds"] if c != "lazy"})
    for i, own in enumerate(found):
        chunks = sorted(int(c) for c in own["milliseconds"] if c != "lazy")
        times = [own["milliseconds"][str(c)] for c in chunks]
        line = dict(color=f"C{i % 10}", label=f"{own['shape']}, {own['tokens']} tokens")
        axis.loglog(chunks, times, styles[own["shape"]], **line)
        if (alone := own["milliseconds"].get("lazy")) is not None:
            axis.plot(every[0] / 2, alone, styles[own["shape"]][0], color=line["color"])
    if found:
        from matplotlib.ticker import LogLocator

        axis.set_xticks([every[0] / 2, *every], ["lazy,\n1", *map(str, every)])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("perturbations in one batch")
        axis.set_ylabel("ms a perturbation")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_title("Several perturbations at once", loc="left", fontsize=10)
    return bool(found)
