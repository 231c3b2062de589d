"""A search over learning rates: which runs it asks for next, by how those before them ended.

A search has no state of its own. What it asks for is a function of the runs that are there, so
that it can be stopped anywhere, gone on with, and asked again whether anything is missing.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

Run = tuple[float, int]
"""Learning rate and seed."""
FARTHEST = 8
"""Rates that `extend` goes beyond those given: a method that diverges at every rate ends too."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How the best learning rate is looked for.

    The best rate is the one with the lowest mean score over the seeds of the first look; seeds
    that were spent on the best alone do not change which one it is.
    """

    rates: tuple[float, ...]
    """Learning rates of the first look."""
    seeds: int = 1
    """Seeds 0 to this number less one, at every rate."""
    extend: bool = False
    """While the best is the lowest or highest rate, go on by the same factor."""
    refine: bool = False
    """Then the two rates halfway to the best one's neighbors: with a first look at factors of
    four, those a factor of two beside the best."""
    seeds_at_best: int = 0
    """Seeds at the best rate in the end, if more."""


def _stages(search: Search, scores: Mapping[Run, float]) -> Iterator[list[Run]]:
    """Lists of runs, each of which can be named once those before it are there."""
    runs = lambda *rates: [(rate, seed) for rate in rates for seed in range(search.seeds)]  # noqa: E731
    # Of equal ones the lowest: where all diverged, lower rates are to be tried.
    best = lambda: min(sorted(rates), key=lambda r: sum(scores[run] for run in runs(r)))  # noqa: E731
    rates = list(dict.fromkeys(search.rates))
    yield runs(*rates)
    for _ in range(FARTHEST if search.extend else 0):
        rates.sort()
        if (edge := best()) not in (rates[0], rates[-1]):
            break
        inner = rates[1] if edge == rates[0] else rates[-2]
        rates.append(_towards(edge, inner, -1))
        yield runs(rates[-1])
    if search.refine:
        rates.sort()
        at = rates.index(best())
        # An edge has one neighbor; the other would be as far out.
        wide = [_towards(rates[0], rates[1], -1), *rates, _towards(rates[-1], rates[-2], -1)]
        beside = [_towards(rates[at], other, 0.5) for other in (wide[at], wide[at + 2])]
        rates += beside
        yield runs(*beside)
    if search.seeds_at_best > search.seeds:
        at_best = best()
        yield [(at_best, seed) for seed in range(search.seeds_at_best)]


def _towards(rate: float, other: float, share: float) -> float:
    """The rate that lies `share` of the way to another one, in factors; -1 is away from it."""
    # Rounded as people write it, which is also what is compared with the rows of a file.
    return float(f"{rate * (other / rate) ** share:.6g}")


def asked(search: Search, scores: Mapping[Run, float]) -> list[Run]:
    """All runs that a search asks for up to the first that are missing, each once.

    Args:
      search: how to search.
      scores: of the runs that are there, the lower the better; infinite for one that diverged.
    """
    out: list[Run] = []
    for stage in _stages(search, scores):
        out += stage
        if any(run not in scores for run in stage):
            break
    return list(dict.fromkeys(out))


def missing(search: Search, scores: Mapping[Run, float]) -> list[Run]:
    """The runs to do next; none, if the search is over.

    Example:
      >>> search, done = Search((0.1, 0.4), extend=True, seeds_at_best=2), {}
      >>> while runs := missing(search, done):
      ...     print(runs)
      ...     done |= {(rate, seed): abs(rate - 0.5) for rate, seed in runs}
      [(0.1, 0), (0.4, 0)]
      [(1.6, 0)]
      [(0.4, 1)]
    """
    return [run for run in asked(search, scores) if run not in scores]


def forecast(search: Search, scores: Mapping[Run, float]) -> int:
    """How many runs are left in all, if no rate does better than the best, or the middle one."""
    found, count = dict(scores), 0
    tried = sorted(search.rates)
    middle = tried[len(tried) // 2]
    while runs := missing(search, found):
        count += len(runs)
        # Worse than all that is known, and of those the middle one best.
        found |= {run: 1e9 + abs(math.log(run[0] / middle)) for run in runs}
    return count
