"""What a client does before it draws batches: look at its examples and keep some of them.

Features, losses and choices stay with the client. What others are told is the recipe: the method
and its numbers, never which examples it chose.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax import selection
from hiso_jax._engine import checks, trees

Arrays = dict[str, np.ndarray]
Examples = Callable[[Any, Any], Mapping[str, jax.Array]]
"""(params, batch) -> columns [B, ...]: ``features`` [B, D] and ``loss`` [B]; where there are
classes ``entropy``, ``margin`` and ``el2n``; where labels have texts, ``texts`` [B, D]."""
SCORES = ("loss", "entropy", "margin", "el2n")
NAMES = ("uniform", "balanced", "k_center", "k_means", "active_ft", "vecaf", *SCORES, "importance")
"""Of methods, as `Select` takes them: a score's is `hiso_jax.selection.by_score` of it."""
PROBES = 4
"""Directions along which `importance` takes each example's scalar."""
SMOOTHING = 1e-3
"""Finite-difference step of these scalars."""
AT_A_TIME = 256
"""Examples that are looked at in one program."""
IMPORTANCE = "importance"
"""Column of a batch, where a method gives each example a weight: its loss is multiplied by that."""


class Subset(NamedTuple):
    """Examples of a client that batches are drawn from."""

    picks: np.ndarray  # int64 [n], numbers of its examples; of `importance`, with repetition
    weights: np.ndarray | None = None  # float32 [n], of `importance`


class Select:
    """How clients choose what they learn from, and when they choose anew.

    Args:
      method: one of `NAMES`.
      examples: what the model makes of each example; of a `hiso_jax.tasks.problem.Problem`,
        ``problem.examples``. ``uniform`` and ``balanced`` take None.
      budget: share of its examples that a client keeps, in (0, 1]; at least one.
      renew: R, rounds between choices.
      prepare: what is done to a batch before it is computed with.
      trainable: along which `importance` takes scalars, as in `hiso_jax.trees.select`.
      **arguments: of the method's function in `hiso_jax.selection`; ``by``, a score that is the
        weight of ``k_center``, ``k_means`` and ``vecaf`` (by default the loss for the last, none
        for the others); ``eta`` of ``active_ft`` and ``vecaf``: their features are moved towards
        the texts of their labels by `hiso_jax.selection.augment`.

    Raises:
      ValueError: a method, a number or an argument is none.

    Example:
      >>> Select("k_means", lambda params, batch: {}, budget=0.1, by="loss").recipe
      {'method': 'k_means', 'budget': 0.1, 'renew': 20, 'by': 'loss'}
    """

    def __init__(
        self,
        method: str,
        examples: Examples | None,
        budget: float = 0.1,
        renew: int = 20,
        *,
        prepare: Callable[[Arrays], Arrays] = lambda batch: batch,
        trainable: trees.Trainable = None,
        **arguments: Any,
    ):
        check(method, budget, renew, arguments)
        if examples is None and method not in ("uniform", "balanced"):
            raise ValueError(f"examples: expected a function for {method}, got None")
        self.method, self.budget, self.renew = method, float(budget), int(renew)
        self.by = arguments.pop("by", "loss" if method == "vecaf" else None)
        self.eta = arguments.pop("eta", None)
        self._arguments, self._prepare = arguments, prepare
        named = {"by": self.by, "eta": self.eta} | arguments
        self.recipe: dict[str, Any] = {
            "method": method, "budget": self.budget, "renew": self.renew,
            **{k: v for k, v in named.items() if v is not None},
        }  # fmt: skip
        self._examples = jax.jit(examples) if examples is not None else None

        def moved(params: Any, key: jax.Array) -> Any:
            leaves = trees.select(params, trainable)
            keys = dict(zip(leaves, jax.random.split(key, len(leaves)), strict=True))
            step = lambda n, x: x + SMOOTHING * jax.random.rademacher(keys[n], x.shape, x.dtype)  # noqa: E731
            return trees.merge(params, {n: step(n, x) for n, x in leaves.items()})

        self._moved = jax.jit(moved)

    @property
    def passes(self) -> int:
        """Forward passes that a look takes of each example."""
        return {"uniform": 0, "balanced": 0, "importance": 1 + PROBES}.get(self.method, 1)

    def size(self, examples: int) -> int:
        """How many of so many a client keeps; half an example is rounded up."""
        return min(examples, max(1, math.floor(self.budget * examples + 0.5)))

    @property
    def wanted(self) -> set[str]:
        """Of each example, what the method needs to know."""
        if self.method in (*SCORES, IMPORTANCE):
            return {"loss" if self.method == IMPORTANCE else self.method}
        beside = {self.by, "texts" if self.eta is not None else None}
        return {"features"} | {name for name in beside if name}

    def check(self, params: Any, columns: Arrays) -> None:
        """Raise ValueError unless the model gives what the method needs; nothing is computed.

        Args:
          params: of the model.
          columns: a few examples.
        """
        if self._examples is None or not self.passes:
            return
        count = len(next(iter(columns.values())))
        batch = self._prepare(dict(columns) | {"weight": np.ones(count, np.float32)})
        self._lacks(jax.eval_shape(self._examples, params, batch), self.wanted)

    def _lacks(self, seen: Mapping[str, Any], wanted: set[str]) -> None:
        if lost := wanted - seen.keys():
            raise ValueError(f"select: {self.method} needs {', '.join(sorted(lost))} of examples, "
                             f"the task gives {', '.join(sorted(seen))}")  # fmt: skip

    def look(self, params: Any, columns: Arrays, seed: tuple[int, ...]) -> Arrays:
        """What the method needs to know of examples [N, ...], as columns [N, ...].

        Raises:
          FloatingPointError: the model makes NaN or infinity of some.
          ValueError: it does not give what the method needs.
        """
        if self._examples is None or not self.passes:
            return {}
        found = self._sweep(params, columns, self.wanted)
        if self.method != IMPORTANCE:
            return found
        squares = []
        for i in range(PROBES):
            beside = self._moved(params, _key((*seed, i)))
            away = self._sweep(beside, columns, {"loss"})["loss"] - found["loss"].astype(np.float64)
            squares.append((away / SMOOTHING) ** 2)
        return {"scalar": np.sqrt(np.mean(squares, 0))}

    def _sweep(self, params: Any, columns: Arrays, wanted: set[str]) -> Arrays:
        assert self._examples is not None
        size, found = len(next(iter(columns.values()))), []
        for start in range(0, size, AT_A_TIME):
            picks = np.arange(start, start + AT_A_TIME)
            batch = {k: v[np.minimum(picks, size - 1)] for k, v in columns.items()}
            batch["weight"] = (picks < size).astype(np.float32)
            seen = self._examples(params, self._prepare(batch))
            self._lacks(seen, wanted)
            found.append({k: np.asarray(seen[k])[: size - start] for k in wanted})
        out = {k: np.concatenate([part[k] for part in found]) for k in wanted}
        if broken := [k for k, x in out.items() if not np.isfinite(x).all()]:
            raise FloatingPointError(f"select: NaN or infinite {broken[0]} of examples")
        return out

    def choose(self, columns: Arrays, seen: Arrays, seed: tuple[int, ...]) -> Subset:
        """The subset of one client.

        Args:
          columns: its examples.
          seen: what `look` made of them.
          seed: of the choice.
        """
        count = len(next(iter(columns.values())))
        budget, key, own = self.size(count), _key(seed), dict(self._arguments)
        features = seen.get("features", np.zeros((count, 1), np.float32))
        if self.eta is not None:
            features = selection.augment(features, seen["texts"], self.eta)
        if self.method == "balanced":
            if "label" not in columns:
                raise ValueError("balanced: the examples have no column label")
            own["labels"] = columns["label"]
        if self.method == IMPORTANCE:
            return Subset(*selection.importance(features, budget, key, seen["scalar"], **own))
        if self.method in SCORES:
            return Subset(selection.by_score(features, budget, key, seen[self.method]))
        weights = None
        if self.by:  # rounding may make a loss of nothing negative, and learning all of them 0
            weights = np.maximum(seen[self.by], 0)
            weights = weights if weights.any() else np.ones_like(weights)
        return Subset(getattr(selection, self.method)(features, budget, key, weights, **own))


def _key(seed: tuple[int, ...]) -> jax.Array:
    data = np.random.default_rng(list(seed)).integers(0, 2**32, 2, np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32")


OWN = {
    "k_center": {"by"}, "k_means": {"by"}, "importance": {"share"},
    "active_ft": {"eta", "temperature", "balance", "learning_rate", "steps"},
    "vecaf": {"by", "eta", "temperature", "balance", "learning_rate", "steps", "objective",
              "ensemble"},
}  # fmt: skip
"""Arguments of the methods that have some."""


def check(method: str, budget: Any, renew: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless these are those of a `Select`; nothing is computed.

    Example:
      >>> check("k_means", 0.1, 20, {"seed": 1})
      Traceback (most recent call last):
          ...
      ValueError: select: k_means has no 'seed'; expected by
    """
    if method not in NAMES:
        raise ValueError(f"select: expected one of {', '.join(NAMES)}, got {method!r}")
    checks.number("budget", budget, 0, 1, above=True)
    checks.count("renew", renew)
    known = OWN.get(method, set())
    if unknown := sorted(arguments.keys() - known):
        wanted = f"expected {', '.join(sorted(known))}" if known else "it takes none"
        raise ValueError(f"select: {method} has no {unknown[0]!r}; {wanted}")
    if "by" in arguments:  # a margin is negative
        checks.choice("select: by", arguments["by"], ("loss", "entropy", "el2n"))
    if "eta" in arguments:
        checks.number("select: eta", arguments["eta"])
    rest = {k: v for k, v in arguments.items() if k not in ("by", "eta")}
    if rest:  # a look at the values
        weights = None if method == "active_ft" else [1.0]
        try:
            if "steps" in rest:
                rest["steps"] = min(1, checks.count("steps", rest["steps"]))
            getattr(selection, method)([[1.0]], 1, _key((0,)), weights, **rest)
        except (TypeError, ValueError) as error:
            raise ValueError(f"select: {method}: {error}") from None
