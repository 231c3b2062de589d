"""Everything that the docs want to know of an accelerator, in one command and few minutes.

python -m benchmarks.accelerator --out runs/accelerator --minutes 9

Run again with the same folder, it goes on with what is left. `--fill-docs FOLDER` puts what was
found into docs/performance.md. It needs jax, flax, optax, transformers, safetensors, numpy and
matplotlib, and no network; torch is compared with where it is installed.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device import cases, results, runner

ROOT = Path(__file__).parents[1]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", type=Path, metavar="FOLDER", help="folder of the results; a run goes on in it")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="time in all: cases worth most are taken, and none is begun that would not end",
    )
    add("--part", nargs="+", choices=list(cases.PARTS), help="only these parts")
    add("--case", nargs="+", metavar="NAME", help="only these cases, by their names in the plan")
    add(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="stop a case after so long; by default after three times what it should take",
    )
    add("--again", action="store_true", help="try again what failed or was stopped before")
    add("--tiny", action="store_true", help="shapes that a CPU has in seconds, to see it work")
    add("--cpu", action="store_true", help="go on where JAX finds no accelerator")
    add("--plan", action="store_true", help="show what would be measured, and stop")
    add("--fill-docs", type=Path, metavar="FOLDER", help="put a folder's figures into the docs")
    add(
        "--write-digests",
        action="store_true",
        help="write benchmarks/digests.json on a CPU; what is in it is never changed",
    )
    add("--worker", nargs="+", metavar="CASE", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def command(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """This command, as a process that measures the cases named."""
    own = [sys.executable, "-m", "benchmarks.accelerator", "--out", str(options.out)]
    return [*own, *["--tiny"] * options.tiny, *["--cpu"] * options.cpu, "--worker", *names]


def chosen(options: argparse.Namespace) -> list[cases.Case]:
    """The cases that the options are about.

    Raises:
      SystemExit: there is no case of a name that is given.
    """
    every = (cases.tiny_cases if options.tiny else cases.all_cases)(cases.programs())
    if unknown := set(options.case or ()) - {case.name for case in every}:
        sys.exit(f"--case: expected names of {[case.name for case in every]}, got {unknown}")
    return [
        case
        for case in every
        if (options.part is None or case.part in options.part)
        and (options.case is None or case.name in options.case)
    ]


def work(options: argparse.Namespace) -> None:
    """Measure the cases named, in this process, and write a row for each as it is had.

    Raises:
      SystemExit: there is no accelerator, or the folder has results of another device.
    """
    from benchmarks.device import measure

    by_name = {case.name: case for case in chosen(options)}
    every = [by_name[name] for name in options.worker]
    device = {}
    if any(case.part != "peers" for case in every):  # those have processes that take the device
        device = {"device": measure.device()}
        if device["device"]["platform"] == "cpu" and not (options.tiny or options.cpu):
            sys.exit("JAX finds no accelerator here, only a CPU: is its CUDA or TPU plugin there? "
                     "--cpu goes on all the same, --tiny shows that it works")  # fmt: skip
        others = [r["device"] for r in results.read(options.out).values() if "device" in r]
        if others and others[0] != device["device"]:
            sys.exit(f"{options.out} has results of another device, {others[0]}; this is "
                     f"{device['device']}: take another --out")  # fmt: skip
    for case in every:
        runner.say(runner.BEGIN + case.name)
        began, row = time.monotonic(), dict(device)
        try:
            found = measure.run(case.part, dict(case.options))
            row |= {"ok": True, "found": found}
            said = summary(found)
        except results.Skip as error:
            row |= {"ok": False, "skipped": True, "reason": (said := str(error))}
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            said = f"{type(error).__name__}: {first}"[:500]
            row |= {"ok": False, "skipped": False, "reason": said}
        seconds = time.monotonic() - began
        results.append(options.out, case.name, case.part, seconds=seconds, tiny=options.tiny,
                       **row)  # fmt: skip
        runner.say(f"{case.name}: {said}, {seconds:.0f} s")
        runner.say(runner.END + case.name)
        if not row["ok"] and not row["skipped"]:
            return  # memory may be lost; the next case starts in a process that has all of it


def summary(found: dict) -> str:
    """What was found, in a few words, for whoever watches."""
    if "equal" in found:
        return "equal" if found["equal"] else f"DIFFERS: {found['where']}"
    if "overhead" in found:
        return f"overhead {found['overhead']:.2f}, {found['matmul_share']:.0%} of the matmul rate"
    for name in ("times_faster", "seconds_a_round", "fastest", "gbytes", "bandwidth_gbytes"):
        if name in found:
            return f"{name.replace('_', ' ')} {found[name]:.3g}"
    return "measured"


def measure(options: argparse.Namespace) -> int:
    """Plan, run, and show what was found; return the exit code."""
    began = time.monotonic()
    every = chosen(options)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.plan:
        rows = results.read(options.out)
        todo, rates = [c for c in every if c.name not in rows], results.rates(rows, cases.RATES)
        runner.show(cases.plan(todo, 60 * options.minutes, rates), len(every) - len(todo), rates)
        return 0
    if options.again:
        rows = results.read(options.out)
        results.forget(options.out, {name for name, row in rows.items() if not row.get("ok")})
    if any(
        r.get("tiny") != options.tiny for r in results.read(options.out).values() if "tiny" in r
    ):
        sys.exit(f"{options.out} has results {'without' if options.tiny else 'of'} --tiny: take "
                 "another --out")  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of a `timeout`, most likely
    deadline = began + 60 * options.minutes
    settings = runner.Settings(
        options.out, lambda names: command(options, names), deadline, options.limit, options.tiny
    )
    code, left = 0, every
    try:
        left = runner.run(every, settings)
    except runner.NoDevice as error:
        runner.say(f"No case could be begun: {error}")
        code = 1
    except KeyboardInterrupt:
        runner.say("Stopped; the same command goes on from here")
        code = 130
    if results.read(options.out):
        finish(options.out)
    if not code and left:
        runner.say(f"Left, for the same command another time: {runner.listed(left)}")
    runner.say(f"{time.monotonic() - began:.0f} s; everything is in {options.out}/")
    return code


def finish(folder: Path) -> None:
    """Write table, JSON and picture of all that a folder has, and print the table."""
    from benchmarks.device import picture, report

    rows = results.read(folder)
    text = report.table(rows)
    (folder / "table.txt").write_text(text + "\n")
    (folder / "results.json").write_text(json.dumps(report.summary(rows), indent=1) + "\n")
    picture.draw(rows, folder / "overview.png")
    runner.say(text)


def main(given: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    options = arguments(given)
    if options.write_digests:
        os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
        from benchmarks.device import exactness

        exactness.write()
        return 0
    if options.fill_docs is not None:
        from benchmarks.device import report

        runner.say(report.fill(options.fill_docs, ROOT / "docs"))
        return 0
    if options.out is None:
        sys.exit("--out: a folder for the results is needed, for example runs/accelerator")
    options.out = options.out.absolute()
    if options.worker:
        work(options)
        return 0
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
