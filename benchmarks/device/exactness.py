"""The same bits on another device: digests of fixed programs against those of a CPU.

No loss is evaluated: records are fixed numbers, so that nothing depends on how a device rounds a
forward pass. `benchmarks/digests.json` is what the CPU found, by
``python -m benchmarks.accelerator --write-digests``.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from benchmarks.device import stages

DIGESTS = Path(__file__).parents[1] / "digests.json"
LEDGERS = Path(__file__).parents[2] / "tests" / "data"
ROUNDS = 4
TREES = {
    "odd": [(33, 65), (129,), (4, 31, 17), (), (0, 3)],
    "large": [(3, 64, 64), (520, 544), (7,)],  # stacked layers; more than one block of an update
}


class Program(NamedTuple):
    """A run of a few rounds whose records are given."""

    rule: str = "hiso"
    law: str = "normal"
    steps: int = 1  # K
    dtype: tuple[str, ...] = ("float32",)  # of the leaves, in turn
    tree: str = "odd"
    perturbations: int = 3  # P
    own: int | None = None  # per_client_directions
    upper: int | None = None  # directions of the upper part
    pool: int | None = None  # seed_pool
    all_steps: bool = False  # update_steps="all"
    ledger: str | None = None  # file of tests/data whose records are taken


HALF, BOTH = ("bfloat16",), ("float32", "bfloat16", "float16")
PROGRAMS: dict[str, Program] = {
    "hiso, normal": Program(),
    "identity, normal": Program("identity"),
    "rms, normal": Program("rms"),
    "meazo, normal": Program("meazo"),
    "fzoo, normal": Program("fzoo"),
    "hizoo, normal": Program("hizoo"),
    "momentum, normal": Program("momentum"),
    "adam, normal": Program("adam"),
    "hiso, rademacher, bfloat16, K = 3": Program("hiso", "rademacher", 3, HALF),
    "identity, rademacher, bfloat16, K = 3": Program("identity", "rademacher", 3, HALF),
    "rms, rademacher, bfloat16, K = 3": Program("rms", "rademacher", 3, HALF),
    "meazo, rademacher, bfloat16, K = 3": Program("meazo", "rademacher", 3, HALF),
    "fzoo, rademacher, bfloat16, K = 3": Program("fzoo", "rademacher", 3, HALF),
    "hizoo, rademacher, bfloat16, K = 3": Program("hizoo", "rademacher", 3, HALF),
    "momentum, rademacher, bfloat16, K = 3": Program("momentum", "rademacher", 3, HALF),
    "adam, rademacher, bfloat16, K = 3": Program("adam", "rademacher", 3, HALF),
    "hiso, near_normal, float16": Program("hiso", "near_normal", 1, ("float16",)),
    "hiso, near_normal, large leaves, K = 3": Program("hiso", "near_normal", 3, tree="large"),
    "hiso, normal, large leaves, bfloat16": Program("hiso", "normal", 1, HALF, "large"),
    "adam, near_normal, mixed leaves, K = 3": Program("adam", "near_normal", 3, BOTH),
    "rms, rademacher, per-client directions": Program("rms", "rademacher", own=3),
    "hiso, normal, per-client directions, K = 3": Program("hiso", "normal", 3, own=2),
    "rms, rademacher, upper part": Program("rms", "rademacher", upper=2),
    "hiso, near_normal, upper part only, mixed leaves": Program(
        "hiso", "near_normal", 1, BOTH, upper=3
    ),
    "identity, normal, pool of 7": Program("identity", pool=7),
    "ledger normal-float32": Program(
        "hiso", "normal", 2, all_steps=True, ledger="normal-float32.safetensors"
    ),
    "ledger near_normal-float32": Program(
        "hiso", "near_normal", ledger="near_normal-float32.safetensors"
    ),
    "ledger rademacher-bfloat16": Program(
        "hiso", "rademacher", 1, HALF, ledger="rademacher-bfloat16.safetensors"
    ),
}


def build(program: Program) -> tuple[hj.Algorithm, hj.State]:
    """The algorithm, and its base in numbers that need no rounding."""
    rule = hj.rules.RULES[program.rule](**({"update_steps": "all"} if program.all_steps else {}))
    upper = None
    if program.upper is not None:
        rows = {"leaf0": 10, "leaf2": 0, "leaf3": 0}
        upper = hj.Split(lambda params, batch: batch, None, rows, program.upper)
    alg = hj.scalar_algorithm(
        lambda params, batch: jnp.float32(0),
        2**-7,
        rule=rule,
        estimator="three_point" if rule.second else "forward",
        local_steps=program.steps,
        num_perturbations=program.perturbations,
        distribution=program.law,
        per_client_directions=program.own,
        seed_pool=program.pool,
        upper=upper,
    )
    params = {}
    for i, shape in enumerate(TREES[program.tree]):
        place = (np.arange(np.prod(shape, dtype=int)) * 7 % 17 - 8).reshape(shape) / 16
        params[f"leaf{i}"] = jnp.asarray(place, program.dtype[i % len(program.dtype)])
    return alg, alg.init(params, jax.random.key(2025))


def records(program: Program) -> np.ndarray:
    """Records [R, K, P]: fixed, one of them NaN, another with numbers that come out subnormal."""
    if program.ledger is not None:
        with hj.Ledger.import_(LEDGERS / program.ledger) as ledger:
            return np.asarray(ledger.records().scalars)
    second = 2 if hj.rules.RULES[program.rule]().second else 1
    shape = (ROUNDS, program.steps, second * program.perturbations * (program.own or 1))
    found = (np.arange(np.prod(shape)) * 7919 % 2001 - 1000).reshape(shape) / 256
    found[1], found[2] = np.nan, found[2] * 2.0**-100
    return found.astype(np.float32)


def by_leaf(state: hj.State) -> dict[str, str]:
    """The digest of every leaf of parameters and rule, and of all together."""
    each = hj.fingerprint.by_leaf(hj.fingerprint.content(state))
    return {name: hj.fingerprint.text(x) for name, x in each.items()} | {
        "all": hj.fingerprint.text(hj.digest(state))
    }


def states(program: Program) -> Iterator[hj.State]:
    """The states after each round."""
    alg, state = build(program)
    advance = jax.jit(alg.advance, compiler_options=hj.compiler_options())
    for record in records(program):
        state = advance(state, record)
        yield state


def play(program: Program) -> list[dict[str, str]]:
    """The digests after each round."""
    return [by_leaf(state) for state in states(program)]


def replayed(program: Program) -> str:
    """The digest after `alg.replay`, a single program for all rounds."""
    alg, state = build(program)
    return hj.fingerprint.text(hj.digest(jax.jit(alg.replay)(state, records(program))))


def saved() -> dict[str, Any]:
    """The digests that the CPU found."""
    return json.loads(DIGESTS.read_text())


def spelled(found: list[dict[str, str]]) -> dict[str, Any]:
    """The digests of a program as they stand in the file: names once, a line a round."""
    return {"leaves": list(found[0]), "rounds": [" ".join(each.values()) for each in found]}


def read(entry: dict[str, Any]) -> list[dict[str, str]]:
    """The inverse of `spelled`."""
    each = (line.split() for line in entry["rounds"])
    return [dict(zip(entry["leaves"], own, strict=True)) for own in each]


def check_program(name: str) -> dict[str, Any]:
    """Run a program and compare with the CPU's digests: which round and leaves differ first."""
    program, wanted = PROGRAMS[name], read(saved()["programs"][name])
    found = play(program)
    result: dict[str, Any] = {"rounds": len(found), "equal": found == wanted}
    if found != wanted:
        pairs = enumerate(zip(found, wanted, strict=True))
        number, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        leaves = [leaf for leaf in theirs if ours.get(leaf) != theirs[leaf] and leaf != "all"]
        first = stages.first_difference(lambda: next(islice(states(program), number, None)))
        result |= {"round": number, "leaves": leaves}
        result["where"] = f"round {number}, leaves {', '.join(leaves) or 'none alone'}; {first}"
    elif program.ledger is not None and replayed(program) != wanted[-1]["all"]:
        result |= {"equal": False, "where": "`replay`, one program for all rounds, differs"}
    return result


def check_stages(names: list[str] | None = None) -> dict[str, Any]:
    """Compare every stage with the CPU's digest; describe the first that differs."""
    wanted, every = saved()["stages"], stages.all_stages()
    chosen = names or list(every)
    wrong = [name for name in chosen if stages.digest(every[name]) != wanted[name]]
    result: dict[str, Any] = {"stages": len(chosen), "equal": not wrong, "differ": wrong}
    if wrong:
        result["first"] = wrong[0]
        first = stages.first_difference(lambda: stages.compute(every[wrong[0]]))
        result["where"] = f"{wrong[0]}: {first}"
    return result


def write() -> None:
    """Write down what the CPU finds; a digest that is there already is never replaced.

    Raises:
      SystemExit: this is no CPU, or one of the digests that are there comes out otherwise.
    """
    if jax.default_backend() != "cpu":
        sys.exit(f"--write-digests: digests are a CPU's, this is {jax.default_backend()}")
    old = saved() if DIGESTS.exists() else {"programs": {}, "stages": {}}
    new: dict[str, Any] = {"programs": {}, "stages": {}}
    for name, program in PROGRAMS.items():
        found = play(program)
        new["programs"][name] = spelled(found)
        print(f"{name}: {found[-1]['all']}", flush=True)
    for name, stage in stages.all_stages().items():
        new["stages"][name] = stages.digest(stage)
        print(f"{name}: {new['stages'][name]}", flush=True)
    changed = [
        name
        for kind in ("programs", "stages")
        for name, value in old[kind].items()
        if new[kind].get(name, value) != value
    ]
    if changed:
        sys.exit(f"{DIGESTS.name}: these came out otherwise than they were, nothing is written: "
                 f"{changed}")  # fmt: skip
    made = {"python": platform.python_version(), "jax": jax.__version__, "backend": "cpu"}
    content = {"made": old.get("made", made)} | {k: old[k] | new[k] for k in new}
    part = DIGESTS.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, DIGESTS)
    print(f"Written: {len(content['programs'])} programs, {len(content['stages'])} stages")
