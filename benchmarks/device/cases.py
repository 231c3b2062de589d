"""What there is to measure, what it is worth and how long it should take: plain data, no JAX."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PARTS = {
    "machine": "what it is, its matmul rate and its memory bandwidth",
    "exactness": "the bits that a CPU finds",
    "overhead": "a round against its bare forward passes",
    "throughput": "noise, digest and replay alone",
    "peers": "what a user would pick instead: MeZO's loop in PyTorch",
    "chunks": "several perturbations in one batch",
    "jobs": "seconds a round of the jobs",
}
"""In their order."""

START = 12.0
"""Seconds until a process has imported everything and found its device."""
RATES = {"bfloat16": 200.0, "float16": 200.0, "float32": 80.0}
"""TFLOP/s of matrix products that are reckoned with until the machine's are measured."""
REACHED = 0.4
"""Share of them that a round is thought to reach."""
SHAPES = {"opt-1m": (128, 4), "opt-125m": (768, 12), "opt-350m": (1024, 24), "opt-1.3b": (2048, 24)}
"""Width and layers, as in `benchmarks.round`, which has to import JAX."""


class Case(NamedTuple):
    """One thing to measure.

    Attributes:
      name: unique; a result is found again by it.
      part: one of `PARTS`.
      worth: cases worth more are measured first, and kept where time is short.
      fixed: seconds that do not depend on the device's speed: compilation, most of all.
      tflop: work on the device, in 10^12 operations of matrix products.
      options: of the measurement.
    """

    name: str
    part: str
    worth: float
    fixed: float
    tflop: float = 0.0
    options: Mapping[str, Any] = {}

    def seconds(self, rates: Mapping[str, float] = RATES) -> float:
        """How long it should take."""
        rate = rates[self.options.get("dtype", "bfloat16")]
        return self.fixed + self.tflop / (REACHED * rate)


def work(shape: str, tokens: int, passes: float) -> float:
    """10^12 operations of forward passes."""
    width, layers = SHAPES[shape]
    return passes * tokens * layers * 24 * width**2 / 1e12


def overhead(worth: float, shape: str, dtype: str, law: str, sizes: str, **more: Any) -> Case:
    """A case of part "overhead"; `sizes` is clients x batch x tokens."""
    clients, batch, length = map(int, sizes.split("x"))
    options: dict[str, Any] = dict(
        shape=shape, dtype=dtype, distribution=law, clients=clients, batch=batch, length=length,
        lazy=True, method="hiso", local_steps=1, num_perturbations=5, repeats=5,
    )  # fmt: skip
    options |= more
    steps, passes = options["local_steps"], options["num_perturbations"] + 1
    shown = [shape, dtype, law, sizes, f"K{steps}", f"P{passes - 1}"]
    shown += [] if options["lazy"] else ["not-lazy"]
    shown += [] if options["method"] == "hiso" else [options["method"]]
    # A round, and its bare passes, once more than they are timed.
    tflop = 2 * (options["repeats"] + 1) * work(shape, clients * batch * length, passes * steps)
    fixed = 12.0 + 8.0 * (shape == "opt-1.3b") + 6.0 * (steps > 1)
    return Case("overhead/" + "-".join(shown), "overhead", worth, fixed, tflop, options)


def _overheads() -> list[Case]:
    big, small, half, single = "opt-1.3b", "opt-125m", "bfloat16", "float32"
    rademacher, near, normal = "rademacher", "near_normal", "normal"
    return [
        overhead(89, big, half, rademacher, "2x32x32"),  # the two targets: 2,048 tokens
        overhead(88, big, half, normal, "2x32x32"),
        overhead(87, small, single, rademacher, "2x32x32"),  # the case of the CPU's table
        overhead(86, big, half, near, "2x32x32"),
        # From here on when every other part has its most important figures.
        overhead(47, big, half, rademacher, "2x32x32", local_steps=5),
        overhead(46, big, half, rademacher, "2x1x32"),  # few tokens: noise has nothing to hide in
        overhead(45, big, half, rademacher, "2x32x32", lazy=False),
        overhead(44, big, single, rademacher, "2x32x32"),
        overhead(38, small, half, rademacher, "2x32x32"),
        overhead(37, big, half, rademacher, "8x1x256"),
        overhead(36, big, half, rademacher, "2x32x32", num_perturbations=64),
        overhead(35, small, single, normal, "2x32x32"),
        overhead(34, small, single, near, "2x32x32"),
        overhead(33, big, half, rademacher, "64x4x256"),  # 65,536 tokens
        overhead(32, big, half, rademacher, "2x32x32", method="decomfl"),
        overhead(31, small, half, normal, "64x1x32", num_perturbations=64),
        overhead(30, big, half, normal, "2x32x32", local_steps=5),
        overhead(29, big, single, normal, "2x32x32"),
        overhead(28, small, single, rademacher, "2x32x32", local_steps=5),
        overhead(27, big, half, normal, "2x32x32", lazy=False),
        overhead(26, small, single, rademacher, "2x32x32", lazy=False),
        overhead(25, small, half, near, "2x32x32"),
    ]


def _throughputs() -> list[Case]:
    noise = dict(numbers=2**27, times=10, repeats=5)
    return [
        Case("throughput/noise-float32", "throughput", 70, 12.0, 0.0, noise | {"of": "noise"}),
        Case("throughput/digest", "throughput", 69, 8.0, 0.0,
             {"of": "digest", "layers": 24, "width": 2048, "repeats": 5}),
        Case("throughput/replay", "throughput", 68, 15.0, 0.0,
             {"of": "replay", "rounds": 50, "size": 2**26}),
        Case("throughput/noise-bfloat16", "throughput", 41.8, 12.0, 0.0,
             noise | {"of": "noise", "dtype": "bfloat16"}),
        Case("throughput/replay-in-blocks", "throughput", 41.7, 20.0, 0.0,
             {"of": "blocks", "rounds": 50, "size": 2**26}),
    ]  # fmt: skip


def _peers() -> list[Case]:
    found = []
    for worth, shape, dtype in (
        (60, "opt-1.3b", "bfloat16"),
        (43, "opt-125m", "float32"),
        (40, "opt-1.3b", "float32"),
        (39, "opt-125m", "bfloat16"),
    ):
        # In PyTorch too every setting does the passes of a round, some of them in small pieces.
        tflop = 4 * 6 * work(shape, 2048, 6)
        options = dict(shape=shape, dtype=dtype, repeats=3)
        fixed = 70.0 if shape == "opt-1.3b" else 55.0
        found.append(Case(f"peers/{shape}-{dtype}", "peers", worth, fixed, tflop, options))
    return found


def _chunks() -> list[Case]:
    found = []
    for worth, shape, tokens in (
        (55, "opt-125m", 32),
        (54, "opt-125m", 256),
        (42, "opt-125m", 2048),
        (41.5, "opt-1.3b", 32),
        (41, "opt-1.3b", 256),
        (24, "opt-1.3b", 2048),
        (23, "opt-125m", 8192),
    ):
        options = dict(shape=shape, dtype="bfloat16", tokens=tokens, perturbations=16, repeats=5,
                       chunks=[1, 4, 16])  # fmt: skip
        tflop = 3 * 6 * work(shape, tokens, 16)
        name = f"chunks/{shape}-{tokens}-tokens"
        found.append(Case(name, "chunks", worth, 25.0, tflop, options))
    return found


def all_cases(programs: Sequence[str]) -> list[Case]:
    """Every case, worth most first.

    Args:
      programs: names of the programs in `benchmarks/digests.json`.
    """
    found = [
        Case("machine", "machine", 100, 10.0),
        Case("exactness/stages", "exactness", 99, 25.0, options={"stages": None}),
        *(
            Case(f"exactness/{name}", "exactness", 98 - i / 1000, 2.5, options={"program": name})
            for i, name in enumerate(programs)
        ),
        *_overheads(),
        *_throughputs(),
        *_peers(),
        *_chunks(),
        Case("jobs/main", "jobs", 50, 20.0, options={"of": "main", "rounds": 20}),
        Case("jobs/main-shape", "jobs", 49, 15.0, options={"of": "main-shape", "rounds": 20}),
        Case("jobs/language-model", "jobs", 48, 15.0, options={"of": "language", "rounds": 20}),
    ]
    return sorted(found, key=lambda case: -case.worth)


def tiny_cases(programs: Sequence[str]) -> list[Case]:
    """The same parts at shapes that a CPU has in seconds: to see that everything works."""
    few = [*programs[:1], *programs[-2:-1]]  # a rule, and a ledger
    stages = ["exact.mul", "exact.rsqrt", "directions.draw, rademacher", "rules.hiso"]
    tiny = dict(num_perturbations=2, repeats=1)
    chunk = dict(shape="opt-1m", dtype="float32", tokens=8, perturbations=4, repeats=1)
    return [
        Case("machine", "machine", 100, 10.0, options={"tiny": True}),
        Case("exactness/stages", "exactness", 99, 15.0, options={"stages": stages}),
        *(
            Case(f"exactness/{name}", "exactness", 98, 5.0, options={"program": name})
            for name in few
        ),
        overhead(89, "opt-1m", "float32", "rademacher", "2x2x8", **tiny),
        overhead(88, "opt-1m", "bfloat16", "rademacher", "2x2x8", lazy=False, **tiny),
        Case("throughput/noise-float32", "throughput", 70, 5.0, 0.0,
             {"of": "noise", "numbers": 2**12, "times": 2, "repeats": 1}),
        Case("throughput/digest", "throughput", 69, 5.0, 0.0,
             {"of": "digest", "layers": 1, "width": 32, "repeats": 1}),
        Case("throughput/replay", "throughput", 68, 5.0, 0.0,
             {"of": "replay", "rounds": 3, "size": 2**12}),
        Case("throughput/replay-in-blocks", "throughput", 67, 5.0, 0.0,
             {"of": "blocks", "rounds": 3, "size": 2**12}),
        Case("peers/opt-1m-float32", "peers", 60, 60.0, 0.0,
             dict(shape="opt-1m", dtype="float32", repeats=1, batch=2, length=8,
                  num_perturbations=2)),
        Case("chunks/opt-1m-8-tokens", "chunks", 55, 20.0, 0.0, chunk | {"chunks": [1, 2, 4]}),
        Case("chunks/opt-1m-32-tokens", "chunks", 54, 20.0, 0.0,
             chunk | {"chunks": [1, 4], "tokens": 32}),
        Case("jobs/main", "jobs", 48, 60.0, options={"of": "main", "rounds": 2}),
        Case("jobs/main-shape", "jobs", 47, 30.0, options={"of": "main-shape", "rounds": 2}),
        Case("jobs/language-model", "jobs", 46, 60.0, options={"of": "language", "rounds": 2}),
    ]  # fmt: skip


def programs() -> list[str]:
    """Names of the programs whose digests are committed, in their order."""
    path = Path(__file__).parents[1] / "digests.json"
    return list(json.loads(path.read_text())["programs"]) if path.exists() else []


class Plan(NamedTuple):
    """What will be measured in the time there is, and what will not."""

    chosen: list[Case]
    left: list[Case]
    seconds: float  # of the chosen


def plan(cases: Sequence[Case], seconds: float, rates: Mapping[str, float] = RATES) -> Plan:
    """Choose cases for so many seconds: those that are worth most, if they still fit.

    Each change of the part costs the start of a process.

    Args:
      cases: what is left to measure.
      seconds: the time left.
      rates: TFLOP/s of matrix products by dtype.
    """
    chosen: list[Case] = []
    left: list[Case] = []
    total = 0.0
    for case in sorted(cases, key=lambda case: -case.worth):
        new = START if not chosen or chosen[-1].part != case.part else 0.0
        if total + new + case.seconds(rates) <= seconds:
            total += new + case.seconds(rates)
            chosen.append(case)
        else:
            left.append(case)
    return Plan(chosen, left, total)
