"""Can choosing examples pay? How much of a round's noise is a batch's, and what selectors take off.

Along a random direction z example i has a scalar s_i, the derivative of its loss, here by forward
differentiation. A round averages C clients with B examples each, so what it sends along z is off by
``within / (B C)``, from which examples a client drew (without repetition), and ``between / C``,
from which clients were drawn. Progress along z goes with the squared mean over the mean square (see
`experiments.blocks`), so batches without any noise, for as many rounds, would be worth

    (mean^2 + between / C + within / (B C)) / (mean^2 + between / C)

times as much: no selector within clients can bring more by its batches being better estimates of
the mean. It can be worth more or less by changing what is aimed at.

The second table has, for each selector, the squared error of the mean over its subset against the
mean over all of a client's examples, over what a uniform subset of the size has: below 1 it is a
better stand-in. Subsets are chosen by the model at hand; directions are none that it looked along.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from hiso_jax._engine import checks, files, trees
from hiso_jax.federation import Select, selecting
from hiso_jax.federation.clients import Arrays
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import compare, job, methods, options, report, results


@dataclasses.dataclass(frozen=True)
class Selection:
    """Measure the noise of batches and clients, and what selectors do to it, while HiSo trains."""

    task: Literal["finetune", "sst2", "llm", "digits", "mnist"] = "digits"
    """The job whose options are used."""
    rounds: tuple[int, ...] = (0, 100, 300)
    """When to look."""
    data: Path | None = None
    """File or folder of the data, for sst2 and mnist."""
    columns: tuple[str, ...] = ()
    """Names of its columns, if it has no header line."""
    vary: tuple[str, ...] = ()
    """Other options of the job, name=value: alpha=0.1, batch_size=4."""
    learning_rate: float = 1e-2
    """Of HiSo, constant."""
    examples: int = 4096
    """Clients are drawn until they have so many examples."""
    directions: int = 16
    """Random directions."""
    budget: float = 0.1
    """Share of its examples that a client keeps."""
    methods: tuple[str, ...] = selecting.NAMES
    """Selectors, with arguments as of --select."""
    out: Path = Path("runs/selection.json")
    """Where the figures go."""


class Scalars:
    """Each example's derivative along random directions."""

    def __init__(self, problem: Problem, directions: int):
        if problem.examples is None:
            raise ValueError(f"--task: {problem.name} tells nothing of its examples")
        examples, self.problem, self.directions = problem.examples, problem, directions

        def along(params: Any, key: jax.Array, batch: Any) -> jax.Array:
            leaves = trees.select(params, problem.trainable)
            keys = dict(zip(leaves, jax.random.split(key, len(leaves)), strict=True))
            z = {n: jax.random.rademacher(keys[n], x.shape, x.dtype) for n, x in leaves.items()}
            loss = lambda x: examples(trees.merge(params, x), batch)["loss"]  # noqa: E731
            return jax.jvp(loss, (leaves,), (z,))[1]

        self._along = jax.jit(along)

    def __call__(self, params: Any, columns: Arrays) -> np.ndarray:
        """[directions, N], float64."""
        size, found = len(next(iter(columns.values()))), []
        for start in range(0, size, selecting.AT_A_TIME):
            picks = np.arange(start, start + selecting.AT_A_TIME)
            batch = {k: v[np.minimum(picks, size - 1)] for k, v in columns.items()}
            batch = self.problem.prepare(batch | {"weight": np.ones(len(picks), np.float32)})
            keys = jax.random.split(jax.random.key(11), self.directions)
            own = [np.asarray(self._along(params, key, batch)) for key in keys]
            found.append(np.array(own, np.float64)[:, : size - start])
        return np.concatenate(found, 1)


def noise(
    scalars: list[np.ndarray], shares: np.ndarray, clients: int, of: int, batch: int
) -> dict[str, float]:
    """Mean squares over directions: of the mean, and of what draws of clients and examples add.

    Args:
      scalars: [J, N] of each client that is looked at.
      shares: [clients], the chance of each to be drawn.
      clients: C.
      of: all clients there are.
      batch: B.
    """
    means = np.array([own.mean(1) for own in scalars])  # [clients, J]
    mean = shares @ means
    between = shares @ (means - mean) ** 2 * len(means) / max(1, len(means) - 1)
    spread = np.array(
        [own.var(1, ddof=1) if own.shape[1] > 1 else 0 * own[:, 0] for own in scalars]
    )
    rest = np.array([max(0.0, 1 / batch - 1 / own.shape[1]) for own in scalars])
    within = shares @ (spread * rest[:, None])
    figures = dict(
        mean_square=(mean**2).mean(),
        between=between.mean() * (1 / clients - 1 / of),
        within=within.mean() / clients,
    )
    rest = figures["mean_square"] + figures["between"]
    return {k: float(v) for k, v in figures.items()} | {
        "bound": float(1 + figures["within"] / rest)
    }


def errors(
    select: Select,
    seen: list[Arrays],
    data: list[Arrays],
    scalars: list[np.ndarray],
    draws: int = 4,
) -> float:
    """Squared error of subsets' means, over that of uniform subsets of the same sizes.

    Args:
      select: how they are chosen.
      seen: what the clients see of their examples.
      data: their columns.
      scalars: [J, N] of each.
      draws: choices, with seeds of their own.
    """
    ours = alike = 0.0
    for seed in range(draws):
        for number, (looked, columns, own) in enumerate(zip(seen, data, scalars, strict=True)):
            picks, weights = select.choose(columns, looked, (seed, number))
            size, count = len(picks), own.shape[1]
            if size == count:
                continue
            factor = 1.0 if weights is None else weights.astype(np.float64)
            off = (own[:, picks] * factor).mean(1) - own.mean(1)
            ours += float((off**2).mean())
            alike += float(own.var(1, ddof=1).mean() * (1 / size - 1 / count))
    return ours / alike if alike else float("nan")


def looks(selects: dict[str, Select], params: Any, data: list[Arrays]) -> dict[str, list[Arrays]]:
    """What clients see for each selector; those that need the same look once."""
    joined = {k: np.concatenate([columns[k] for columns in data]) for k in data[0]}
    cuts = np.cumsum([len(next(iter(columns.values()))) for columns in data])[:-1]
    found: dict[Any, Arrays] = {}
    out = {}
    for text, select in selects.items():
        key = (select.passes, *sorted(select.wanted))
        if key not in found:
            found[key] = select.look(params, joined, (0,))
        parts = {k: np.split(v, cuts) for k, v in found[key].items()}
        out[text] = [{k: v[i] for k, v in parts.items()} for i in range(len(data))]
    return out


def drawn(problem: Problem, examples: int) -> Iterator[str]:
    """Clients in a random order, until they have so many examples."""
    left = examples
    for i in np.random.default_rng(3).permutation(len(problem.clients)):
        name = problem.clients.names[int(i)]
        left -= problem.clients.sizes[name]
        yield name
        if left <= 0:
            return


def main(given: Selection) -> None:
    """Train, look, print and write."""
    checks.count("--directions", given.directions)
    start = options.defaults(given.task, given.data, given.columns)
    first = {n: v[0] for n, v in compare.varied(type(start), given.vary).items()}
    settings = dataclasses.replace(start, rounds=max(1, *given.rounds), **first)
    problem = compare.build(given.task, settings)
    look = Scalars(problem, given.directions)
    names = list(drawn(problem, given.examples))
    shares = np.array(
        [problem.clients.sizes[n] if settings.sampling == "size" else 1 for n in names]
    )
    alg = hj.federated_hiso(
        problem.loss_fn, given.learning_rate, num_perturbations=settings.num_perturbations,
        distribution=settings.distribution, lazy=problem.lazy, trainable=problem.trainable,
    )  # fmt: skip
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(0))
    selects = {}
    for text in given.methods:
        name, own = methods.parse(text)
        selects[text] = Select(name, problem.examples, given.budget, 1, prepare=problem.prepare,
                               trainable=problem.trainable, **own)  # fmt: skip
    data = [problem.clients[name] for name in names]
    kept: list[dict[str, Any]] = []

    def note(params: Any, round: int) -> None:
        scalars = [look(params, columns) for columns in data]
        seen = looks(selects, params, data)
        figures: dict[str, Any] = {"round": round}
        figures |= noise(scalars, shares / shares.sum(), settings.clients_per_round,
                         len(problem.clients), settings.batch_size)  # fmt: skip
        figures["errors"] = {
            text: errors(select, seen[text], data, scalars) for text, select in selects.items()
        }
        kept.append(figures)
        about = {"task": problem.name, "clients": len(names), "batch_size": settings.batch_size,
                 "clients_per_round": settings.clients_per_round, "budget": given.budget,
                 "examples": sum(s.shape[1] for s in scalars), "looks": kept}  # fmt: skip
        with files.atomic_write(given.out) as part:
            part.write_text(report.dumps(about, 1) + "\n")

    if 0 in given.rounds:
        note(state.params, 0)
    for step in job.rounds(settings, problem, alg, state) if max(given.rounds) else ():
        if step.round in given.rounds:
            note(step.state.params, step.round)
    show = lambda x: f"{x:.3g}"  # noqa: E731
    head = ["round", "mean squared", "of clients drawn", "of examples drawn", "worth at most"]
    keys = ("mean_square", "between", "within")
    results.show(head, [[str(f["round"]), *(show(f[k]) for k in keys), f"{f['bound']:.2f}"]
                        for f in kept])  # fmt: skip
    lines = [[text, *(f"{f['errors'][text]:.2f}" for f in kept)] for text in given.methods]
    results.show(["selector", *(f"round {f['round']}" for f in kept)], lines)


if __name__ == "__main__":
    import tyro

    with report.door():
        main(tyro.cli(Selection))
