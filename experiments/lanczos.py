"""The spectrum of a symmetric matrix that can only be multiplied with: Lanczos quadrature.

k steps from a unit vector v give the k nodes and weights with which ``v' f(A) v`` is a sum over
nodes, exact for polynomials f up to degree 2 k - 1 (Golub and Welsch 1969; Ubaru, Chen and Saad
2017). Over random directions v of n dimensions its mean is ``tr f(A) / n``: f = 1 counts
eigenvalues, f = |x| sums their sizes.

A few large eigenvalues would make such a mean noisy. So they are found first, one by one, with
their vectors, and random vectors are kept orthogonal to those (as in Hutch++, arXiv 2010.09649).
Vectors are of NumPy, flat, in the precision of the products; all k of a run are kept, and every
new one is made orthogonal to them twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Product = Callable[[np.ndarray], np.ndarray]
"""x [n] -> A x [n], in the dtype of x."""
CHUNK = 2**18
"""Numbers whose products are summed in their own precision; sums of those are float64."""
SETTLED = 0.1
"""Error, over size, of an eigenvalue that is found by itself. A trace is off by its square."""
LARGE = 0.01
"""Size of such an eigenvalue at least, over the largest."""


class Quadrature(NamedTuple):
    """Nodes, and what each stands for: as many eigenvalues as its weight says."""

    nodes: np.ndarray  # [k], ascending
    weights: np.ndarray  # [k], >= 0
    errors: np.ndarray  # [k], there is an eigenvalue at most so far from the node


class Run(NamedTuple):
    """What k steps of Lanczos found: A is tridiagonal in the basis."""

    diagonal: np.ndarray  # [k], float64
    below: np.ndarray  # [k], float64, of which the last leads out of the basis
    basis: np.ndarray  # [k, n], orthonormal rows

    def ritz(self) -> tuple[Quadrature, np.ndarray]:
        """Its quadrature, of weight 1, and the nodes' vectors in the basis, [k, k], in columns."""
        middle = np.diag(self.diagonal) + np.diag(self.below[:-1], 1) + np.diag(self.below[:-1], -1)
        nodes, vectors = np.linalg.eigh(middle)
        errors = self.below[-1] * np.abs(vectors[-1])
        return Quadrature(nodes, vectors[0] ** 2, errors), vectors


class Spectrum(NamedTuple):
    """Eigenvalues found one by one, and quadratures of all others."""

    values: np.ndarray  # [r], descending in size
    errors: np.ndarray  # [r], as of `Quadrature`
    probes: tuple[Quadrature, ...] = ()  # each an estimate of the n - r others
    blocks: np.ndarray | None = None  # [blocks], of the trace

    def total(self, of: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """Sum of a function over all eigenvalues, and its standard error over probes.

        The error is NaN where a single probe cannot tell it.
        """
        rest = np.array([probe.weights @ of(probe.nodes) for probe in self.probes] or [0.0])
        error = 0.0 if not self.probes else np.nan
        if len(rest) > 1:
            error = rest.std(ddof=1) / np.sqrt(len(rest))
        return float(of(self.values).sum() + rest.mean()), float(error)

    def all(self) -> Quadrature:
        """One quadrature of the whole spectrum."""
        count = max(1, len(self.probes))
        own = Quadrature(self.values, np.ones(len(self.values)), self.errors)
        parts = [own, *(probe._replace(weights=probe.weights / count) for probe in self.probes)]
        joined = Quadrature(*map(np.concatenate, zip(*parts, strict=True)))
        order = np.argsort(joined.nodes)
        return Quadrature(*(x[order] for x in joined))


def inner(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Inner products of rows [k, n] with x [n], float64 [k]."""
    total = np.zeros(len(rows))
    for i in range(0, x.size, CHUNK):
        total += rows[:, i : i + CHUNK] @ x[i : i + CHUNK]
    return total


def project(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Make x [n] orthogonal to orthonormal rows [k, n], in place; return what it lost, [k]."""
    lost = np.zeros(len(rows))
    for _ in range(2 if len(rows) else 0):  # what one pass leaves is rounding, of which it is rid
        own = inner(rows, x)
        for i in range(0, x.size, CHUNK):
            x[i : i + CHUNK] -= own.astype(x.dtype) @ rows[:, i : i + CHUNK]
        lost += own
    return lost


def norm(x: np.ndarray) -> float:
    """The length of x [n]."""
    return float(np.sqrt(inner(x[None], x)[0]))


def lanczos(
    product: Product, start: np.ndarray, steps: int, against: np.ndarray | None = None
) -> Run:
    """At most so many steps of Lanczos, fewer where no new direction is left.

    Args:
      product: of a symmetric matrix.
      start: [n], not zero; it is not changed.
      steps: at least 1.
      against: [r, n], orthonormal rows; all is done in the space orthogonal to them.

    Raises:
      FloatingPointError: a product is not finite.
      ValueError: the start lies in the span of `against`.

    Example:
      >>> run = lanczos(lambda x: np.array([3.0, 3.0, 1.0]) * x, np.ones(3), 3)
      >>> run.ritz()[0].nodes.round(6).tolist(), run.ritz()[0].weights.round(6).tolist()
      ([1.0, 3.0], [0.333333, 0.666667])
    """
    x = np.array(start)
    against = np.empty((0, x.size), x.dtype) if against is None else against
    eps, whole = np.finfo(x.dtype).eps, norm(x)
    project(x, against)
    if (length := norm(x)) <= 100 * eps * whole:
        raise ValueError("start: expected a vector outside of the span of `against`, got one in it")
    steps = min(steps, x.size - len(against))
    basis = np.empty((steps, x.size), x.dtype)
    basis[0] = x / x.dtype.type(length)
    diagonal, below, scale = [], [], 0.0
    for k in range(steps):
        x = np.array(product(basis[k]), basis.dtype)
        if not np.isfinite(length := norm(x)):
            raise FloatingPointError(f"product: step {k + 1} is not finite")
        scale = max(scale, length)
        project(x, against)
        diagonal.append(project(x, basis[: k + 1])[k])
        below.append(norm(x))
        if below[-1] <= 10 * eps * scale:
            below[-1] = 0.0
            break
        if k + 1 < steps:
            basis[k + 1] = x / x.dtype.type(below[-1])
            project(basis[k + 1], against)
    return Run(np.array(diagonal), np.array(below), basis[: len(below)])


def large(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues that a run settled and that are large, their errors, and vectors [r, n].

    The run's basis is used up.
    """
    found, vectors = run.ritz()
    size = np.abs(found.nodes)
    own = np.flatnonzero((found.errors <= SETTLED * size) & (size > LARGE * size.max(initial=0)))
    own = own[np.argsort(-size[own])]
    turn = vectors[:, own].T.astype(run.basis.dtype)
    for i in range(0, run.basis.shape[1], CHUNK):  # in place, since a basis may be gigabytes
        run.basis[: len(own), i : i + CHUNK] = turn @ run.basis[:, i : i + CHUNK]
    return found.nodes[own], found.errors[own], run.basis[: len(own)].copy()


def spectrum(
    product: Product,
    size: int,
    *,
    search: int = 16,
    steps: int = 12,
    probes: int = 4,
    seed: int = 0,
    dtype: Any = np.float32,
    split: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Spectrum:
    """The spectrum of a symmetric matrix [size, size] from ``search + steps * probes`` products.

    Args:
      product: of the matrix.
      size: of its side.
      search: steps that look for large eigenvalues.
      steps: of each probe.
      probes: random vectors for the rest.
      seed: of them.
      dtype: of vectors, float32 or float64.
      split: (x, y) -> the parts [blocks] of their inner product by blocks of elements; for
        `Spectrum.blocks`.

    Example:
      >>> found = spectrum(lambda x: np.array([5.0, -1, 0, 0]) * x, 4, dtype=np.float64)
      >>> found.values.round(6).tolist(), round(found.total(np.abs)[0], 6)
      ([5.0, -1.0], 6.0)
    """
    rng = np.random.default_rng(seed)
    draw = lambda: rng.standard_normal(size, dtype)  # noqa: E731
    values, errors, vectors = large(lanczos(product, draw(), search))
    parts = [v * split(q, q) for v, q in zip(values, vectors, strict=True)] if split else []
    found, rest = [], size - len(values)
    for _ in range(probes if rest else 0):
        run = lanczos(product, draw(), steps, vectors)
        own = run.ritz()[0]
        found.append(own._replace(weights=rest * own.weights))
        if split:
            image = run.basis[0] * run.diagonal[0].astype(dtype)
            if len(run.basis) > 1:
                image += run.basis[1] * run.below[0].astype(dtype)
            parts.append(rest / probes * split(run.basis[0], image))
        del run  # before the next has a basis of its own
    return Spectrum(values, errors, tuple(found), np.sum(parts, 0) if parts else None)


def dense(product: Product, size: int, dtype: Any = np.float32) -> np.ndarray:
    """The matrix itself, float64 [size, size], from a product with every unit vector."""
    rows = np.stack([np.asarray(product(row)) for row in np.eye(size, dtype=dtype)])
    return (rows + rows.T).astype(np.float64) / 2


def exactly(matrix: np.ndarray) -> Spectrum:
    """The spectrum of a symmetric matrix that is given."""
    values = np.linalg.eigvalsh(matrix)
    values = values[np.argsort(-np.abs(values))]
    return Spectrum(values, np.zeros(len(values)))


def figures(found: Spectrum) -> dict[str, float]:
    """What the theory speaks of: traces, the largest eigenvalue, the effective rank.

    ``trace`` and ``absolute`` are sums of eigenvalues and of their sizes, each with its standard
    error; ``largest`` is the largest in size, with its sign, and ``least`` the most negative;
    ``rank`` is absolute over largest; ``negative`` the share of `absolute` below zero; ``half``
    says how many eigenvalues, the largest in size, have half of `absolute`.

    Example:
      >>> f = figures(exactly(np.diag([4.0, 2, 1, -1])))
      >>> [f[name] for name in ("trace", "absolute", "largest", "rank", "negative", "half")]
      [6.0, 8.0, 4.0, 2.0, 0.125, 1.0]
    """
    trace, absolute = found.total(lambda x: x), found.total(np.abs)
    every = found.all()
    at = int(np.argmax(np.abs(every.nodes)))
    largest, sizes = every.nodes[at], np.abs(every.nodes)
    order = np.argsort(-sizes)
    sums = np.cumsum(np.append(0, (every.weights * sizes)[order]))
    counts = np.cumsum(np.append(0, every.weights[order]))
    size = np.abs(largest) or np.nan  # of a matrix of zeros there is no rank
    plain = dict(
        trace=trace[0], trace_error=trace[1], absolute=absolute[0], absolute_error=absolute[1],
        largest=largest, largest_error=every.errors[at], least=min(every.nodes.min(), 0.0),
        rank=absolute[0] / size, rank_error=absolute[1] / size,
        negative=found.total(lambda x: np.maximum(-x, 0))[0] / (absolute[0] or np.nan),
        half=np.interp(sums[-1] / 2, sums, counts),
    )  # fmt: skip
    return {name: float(value) for name, value in plain.items()}


def density(found: Spectrum, at: np.ndarray, width: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues a factor of ten in size, positive and negative ones.

    Args:
      found: of which nodes of size 0 are left out.
      at: sizes [m], above 0, where to tell it.
      width: standard deviation, in powers of ten, of the bell that stands for each node.

    Example:
      >>> up, down = density(exactly(np.diag([1.0, 1, -10])), np.logspace(-3, 4, 701))
      >>> round(float(up.sum()) / 100, 3), round(float(down.sum()) / 100, 3)
      (2.0, 1.0)
    """
    every = found.all()
    sizes = np.abs(every.nodes)
    place = np.log10(sizes, where=sizes > 0, out=np.full(len(sizes), -np.inf))
    bells = np.exp(-0.5 * ((np.log10(at)[:, None] - place) / width) ** 2)
    bells *= every.weights / (width * np.sqrt(2 * np.pi))
    return bells[:, every.nodes > 0].sum(1), bells[:, every.nodes < 0].sum(1)
