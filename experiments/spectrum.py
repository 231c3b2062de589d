"""Is the effective rank of the Hessian low, as the theory of HiSo and DeComFL assumes?

Looks at the spectrum of the training loss before a run and after it, by stochastic Lanczos
quadrature on training examples that stay the same (`experiments.lanczos`). The theory bounds a
round by ``tr(S) = L kappa``, with S at least as large as the Hessian and its negative, L the
largest eigenvalue of S, kappa its effective rank; the least such S is the Hessian's absolute
value, so kappa here is the sum of sizes of all eigenvalues over the largest size. HiSo replaces
L kappa by ``zeta = tr(H^-1/2 S H^-1/2)``, of which the least is the sum of sizes of the
eigenvalues of the whitened Hessian. Since a larger H makes zeta smaller as a smaller rate does a
step, the table has it once more for an H whose mean of 1 / H is one, as it is without H.

A look is one row of a file; what is there is not computed again.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import hiso_jax as hj
from experiments import granularity, lanczos
from experiments.blocks import Derivatives, block_names
from hiso_jax import federation, rules
from hiso_jax._engine import files, trees
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import compare, job, methods, options, report, results, rows
from hiso_jax.train.rows import Row


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Measure the Hessian's spectrum before and after training."""

    task: Literal["digits", "images", "finetune", "sst2", "llm"] = "digits"
    """The job whose options are used."""
    rounds: tuple[int, ...] = (0, 600)
    """When to look; by none, only what is in the file is shown."""
    method: tuple[str, ...] = ("hiso",)
    """Methods that train, as of the job's --method."""
    learning_rate: tuple[float, ...] = (2e-2,)
    """Of each; they fall linearly to 0."""
    data: Path | None = None
    """File or folder of the data, for sst2, llm and images."""
    columns: tuple[str, ...] = ()
    """Names of its columns, if it has no header line."""
    vary: tuple[str, ...] = ()
    """Other options of the job, name=value or name=[...]: batch_size=2, verbalizer=["no","yes"]."""
    examples: int = 1024
    """Training examples whose mean loss it is."""
    piece: int = 128
    """Of them, that are computed with at a time."""
    search: int = 16
    """Products that look for the largest eigenvalues."""
    steps: int = 12
    """Products of each random vector."""
    probes: int = 4
    """Random vectors."""
    whole: bool = False
    """Also compute the Hessian itself, where it is small, to check against."""
    out: Path = Path("runs/spectrum.jsonl")
    """A row a look."""
    picture: Path | None = None
    """Where to draw the spectra of all rows of the file, a PNG."""


def short(value: Any) -> Any:
    """Numbers, and lists of them, with six digits."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [short(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, (float, np.floating)) else value


class Hessian:
    """Of a problem's mean loss over some training examples, at some parameters.

    Args:
      look: its derivatives.
      params: where.
      h: H, positive leaves by name: it is the Hessian in noise whitened by them.
    """

    def __init__(self, look: Derivatives, params: Any, h: trees.Leaves | None = None):
        leaves = look.pick(params)
        flat, self.back = ravel_pytree(leaves)
        self.size, self.look, self.params, self.data = flat.size, look, params, look.data()
        own = granularity.block_names(leaves, "layer")
        self.parts = [part for parts in own.values() for part in parts]
        assert len(self.parts) == len(block_names(leaves))
        whiten = None if h is None else ravel_pytree({n: h[n] for n in leaves})[0] ** -0.5
        self.scale = None if whiten is None else np.asarray(whiten)

    def __call__(self, v: np.ndarray) -> np.ndarray:
        """Its product with v [n]."""
        tree = self.back(jnp.asarray(v if self.scale is None else self.scale * v))
        along = self.look.mean(self.look.along(self.params, tree, x) for x in self.data)
        image = np.asarray(ravel_pytree(along)[0])
        return image if self.scale is None else self.scale * image

    def split(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The inner product of two vectors, block by block."""
        a, b = (self.back(jnp.asarray(v)) for v in (x, y))
        return np.asarray(self.look.dots(a, b), np.float64)

    def spectrum(self, given: Spectra) -> lanczos.Spectrum:
        """Its spectrum, by as many products as the options say."""
        split = self.split if self.scale is None else None
        return lanczos.spectrum(self, self.size, search=given.search, steps=given.steps,
                                probes=given.probes, split=split)  # fmt: skip


def measured(given: Spectra, look: Derivatives, state: hj.State) -> Row:
    """All figures of a state."""
    began, problem = time.perf_counter(), look.problem
    hessian = Hessian(look, state.params)
    found = hessian.spectrum(given)
    sums = federation.evaluate(
        jax.jit(problem.score), state.params, problem.dev, 128, problem.prepare
    )
    row: Row = dict(
        parameters=hessian.size,
        loss=float(np.mean([look.loss(state.params, x) for x in hessian.data])),
        metric=problem.metric_value(sums)[1],
    )
    row |= lanczos.figures(found)
    row |= dict(
        values=found.values, errors=found.errors,
        nodes=[probe.nodes for probe in found.probes],
        weights=[probe.weights for probe in found.probes],
    )  # fmt: skip
    if found.blocks is not None:
        names = np.array(hessian.parts)
        row["parts"] = {n: found.blocks[names == n].sum() for n in dict.fromkeys(hessian.parts)}
    if given.whole:
        row["exact"] = lanczos.figures(lanczos.exactly(lanczos.dense(hessian, hessian.size)))
    if isinstance(state.rule, rules.HisoState) and int(state.round):
        white = Hessian(look, state.params, state.rule.curvature)
        own: Row = dict(lanczos.figures(white.spectrum(given)))
        assert white.scale is not None
        own["even"] = own["absolute"] / float((white.scale**2).mean())
        if given.whole:
            own["exact"] = lanczos.figures(lanczos.exactly(lanczos.dense(white, white.size)))
        row["white"] = own
    return short(row | {"seconds": time.perf_counter() - began})


class Point:
    """One training run: its options, and the names of its looks."""

    def __init__(self, given: Spectra, run: job.Options, problem: Problem):
        how = ("examples", "search", "steps", "probes")
        own = options.settings(run)
        rest = {k: v for k, v in own.items() if k not in ("method", "learning_rate")}
        about = dict(problem=problem.name, **{name: getattr(given, name) for name in how})
        # Nothing of a run matters to where it begins.
        start = {k: v for k, v in rest.items() if k not in compare.COMMON}
        self.run = run
        self.names: dict[int, Row] = {}
        for round in sorted(given.rounds):
            kind = (own["method"], own["learning_rate"], rest) if round else (None, None, start)
            named = dict(zip(("method", "learning_rate", "settings"), kind, strict=True))
            self.names[round] = about | dict(round=round) | named

    def missing(self, known: list[Row]) -> list[int]:
        """Rounds whose look is not in the file."""
        return [round for round, name in self.names.items() if rows.missing([name], known)]


def states(point: Point, problem: Problem, wanted: list[int]) -> Iterator[hj.State]:
    """The states of a run after these rounds."""
    alg = job.algorithm(point.run, problem, point.run.learning_rate or 0.0)
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(point.run.seed))
    if 0 in wanted:
        yield state
    for step in job.rounds(point.run, problem, alg, state) if max(wanted) else ():
        if step.round in wanted:
            yield step.state
        if step.round == max(wanted):
            return


def points(given: Spectra, problem: Problem, start: job.Options) -> list[Point]:
    """A run a method."""
    if len(given.learning_rate) != len(given.method):
        raise ValueError(f"--learning-rate: expected {len(given.method)}, one a method, got "
                         f"{len(given.learning_rate)}")  # fmt: skip
    pairs = zip(map(methods.check, given.method), given.learning_rate, strict=True)
    runs = [dataclasses.replace(start, method=m, learning_rate=rate) for m, rate in pairs]
    return [Point(given, run, problem) for run in runs]


def settings(given: Spectra) -> job.Options:
    """The options of the runs, but for method and rate."""
    start = options.defaults(given.task, given.data, given.columns)
    hints, own = get_type_hints(type(start)), {}
    for text in given.vary:
        name, _, value = text.partition("=")
        if value.startswith("[") and name in hints:
            own[name] = options.fit(hints[name], json.loads(value))
        else:
            own |= {n: v[0] for n, v in compare.varied(type(start), (text,)).items()}
    return dataclasses.replace(start, rounds=max(1, *given.rounds), **own)


def look_at(given: Spectra) -> None:
    """Train, look and write what is missing in the file."""
    start = settings(given)
    problem = compare.build(given.task, start)
    look, known = Derivatives(problem, given.examples, given.piece), rows.read(given.out)
    if (count := len(look.pieces) * given.piece) != given.examples:  # a row says how many
        raise ValueError(f"--examples: expected a multiple of --piece, {given.piece}, and no more "
                         f"than there are; {count} is the next, got {given.examples}")  # fmt: skip
    with rows.append(given.out) as add:
        for point in points(given, problem, start):
            wanted = point.missing(known)
            for state in states(point, problem, wanted) if wanted else ():
                row = point.names[int(state.round)] | measured(given, look, state)
                add(row)
                known.append(row)
                report.say(f"{title(row)}: rank {row['rank']:.3g} ({row['seconds']:.0f} s)")


def title(row: Row) -> str:
    """What a row is of."""
    if not row["round"]:
        return f"{row['problem']}, at the start"
    return f"{row['problem']}, {methods.title(row['method'])} after {row['round']}"


def plus(value: float, error: float | None) -> str:
    """A figure and its error, as far as it is known.

    Example:
      >>> plus(1234.5, 6.78), plus(0.5, None)
      ('1.23e+03 ± 6.8', '0.5')
    """
    return f"{value:.3g}" + (f" ± {error:.2g}" if error else "")


HEAD = ["", "loss", "dev", "largest", "trace", "over largest", "sizes' sum", "rank", "half in",
        "below zero", "zeta", "at mean 1"]  # fmt: skip


def line(row: Row) -> list[str]:
    """A row of the table."""
    white = row.get("white")
    return [
        title(row), f"{row['loss']:.3f}", f"{row['metric']:.1%}", f"{row['largest']:.3g}",
        plus(row["trace"], row["trace_error"]), f"{row['trace'] / abs(row['largest']):.3g}",
        plus(row["absolute"], row["absolute_error"]), plus(row["rank"], row["rank_error"]),
        f"{row['half']:.3g}", f"{row['negative']:.1%}",
        plus(white["absolute"], white["absolute_error"]) if white else "",
        f"{white['even']:.3g}" if white else "",
    ]  # fmt: skip


def spectrum_of(row: Row) -> lanczos.Spectrum:
    """The spectrum that a row has, without its errors."""
    pairs = zip(row["nodes"], row["weights"], strict=True)
    probes = tuple(lanczos.Quadrature(np.array(x), np.array(w), np.zeros(len(x))) for x, w in pairs)
    return lanczos.Spectrum(np.array(row["values"]), np.array(row["errors"]), probes)


def kind_of(row: Row) -> str:
    """What brought the model there, for a legend."""
    return methods.title(row["method"]) if row["round"] else "start"


def draw(found: list[Row], path: Path) -> None:
    """How many eigenvalues there are of each size, a panel a network."""
    networks = list(dict.fromkeys(row["problem"] for row in found))
    across = min(3, len(networks))
    down = -(-len(networks) // across)
    picture = report.blank(4.6 * across, 3.4 * down)
    kinds = list(dict.fromkeys(kind_of(row) for row in found))
    for number, network in enumerate(networks):
        axis = picture.add_subplot(down, across, number + 1)
        own = [row for row in found if row["problem"] == network]
        top = max(abs(row["largest"]) for row in own)
        at = np.logspace(np.log10(top) - 4, np.log10(top) + 0.6, 300)  # lower ones blur
        most = 1.0
        for row in own:
            color = f"C{kinds.index(kind_of(row))}"
            sides = lanczos.density(spectrum_of(row), at)
            most = max(most, *(side.max() for side in sides))
            for side, style, label in zip(sides, ("-", ":"), (kind_of(row), None), strict=True):
                axis.plot(at, side, style, color=color, label=label, linewidth=1.2)
        axis.set(xscale="log", yscale="log", ylim=(0.3, 3 * most), xlabel="size of an eigenvalue",
                 ylabel="eigenvalues a factor of ten")  # fmt: skip
        shown = network.partition(" (")[0]  # which has their number, rounded
        axis.set_title(f"{shown}\n{own[0]['parameters']:,} parameters", fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    report.framed(picture)
    with files.atomic_write(path) as part:
        picture.savefig(part, dpi=110)


def main(given: Spectra) -> None:
    """Look, print the table of all rows, and draw."""
    if given.rounds:
        look_at(given)
    found = rows.read(given.out)
    if not found:
        raise ValueError(f"--out: {given.out} has no rows")
    networks = list(dict.fromkeys(row["problem"] for row in found))
    found.sort(key=lambda row: networks.index(row["problem"]))
    results.show(HEAD, [line(row) for row in found])
    if given.picture:
        draw(found, given.picture)


if __name__ == "__main__":
    import tyro

    with report.door():
        main(tyro.cli(Spectra))
