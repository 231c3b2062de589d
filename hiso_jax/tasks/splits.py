"""Examples over clients, and over train, dev and test: every example goes to one of them."""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from hiso_jax._engine import checks


def iid(count: int, clients: int, seed: int = 0) -> list[np.ndarray]:
    """Split numbers below `count` at random into parts of equal size (to one).

    Example:
      >>> [len(part) for part in iid(10, 3)]
      [4, 3, 3]
    """
    _enough(count, clients)
    order = np.random.default_rng([seed, 11]).permutation(count)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet(labels: Any, clients: int, alpha: float, seed: int = 0) -> list[np.ndarray]:
    """Split by labels: each label's examples go to the clients in shares from Dirichlet(alpha).

    The usual non-IID split (Hsu et al. 2019, arXiv 1909.06335). A small alpha gives every
    client few labels, a large one nears `iid`. A client that would get nothing gets one
    example of the largest.

    Args:
      labels: integers [N].
      clients: number of clients.
      alpha: concentration > 0.
      seed: of the shares.
    """
    labels = np.asarray(labels)
    _enough(len(labels), clients)
    checks.number("alpha", alpha, 0, above=True)
    rng = np.random.default_rng([seed, 12])
    owners = np.zeros(len(labels), int)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        ends = (np.cumsum(shares)[:-1] * len(own)).round().astype(int)
        for client, part in enumerate(np.split(own, ends)):
            owners[part] = client
    return _parts(owners, clients)


def dirichlet_draws(
    labels: Any, clients: int, alpha: float, seed: int = 0, spread: float = 0.0
) -> list[np.ndarray]:
    """Split by labels: each example draws its client by its label's Dirichlet(alpha) shares.

    Where `dirichlet` cuts a label's examples in proportion to the shares, these counts are
    multinomial around them, and a client may get nothing. With many examples the two agree. The
    figures of digits and MNIST in docs/lab/results.md are of this one.

    Args:
      labels: integers [N].
      clients: number of clients.
      alpha: concentration > 0; infinity for the same shares of every label.
      seed: of shares and draws.
      spread: clients are of unequal sizes, as in `by_size`: the Dirichlet shares have a mean that
        is log-normal, with this standard deviation of its logarithm.

    Returns:
      Numbers of each client's examples, ascending.
    """
    labels = np.asarray(labels)
    checks.count("clients", clients)
    if not np.isinf(alpha):
        checks.number("alpha", alpha, 0, above=True)
    mean = _log_normal(np.random.default_rng([seed, 13]), clients, spread)
    rng = np.random.default_rng([seed, 7])
    owners = np.zeros(len(labels), int)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        shares = mean if np.isinf(alpha) else rng.dirichlet(alpha * clients * mean)
        owners[own] = rng.choice(clients, len(own), p=shares)
    return [np.flatnonzero(owners == client) for client in range(clients)]


def by_size(count: int, clients: int, spread: float = 1.0, seed: int = 0) -> list[np.ndarray]:
    """Split at random into parts of unequal, log-normally distributed sizes.

    Args:
      count: examples.
      clients: number of clients.
      spread: standard deviation of the logarithm of a client's share.
      seed: of sizes and examples.
    """
    _enough(count, clients)
    rng = np.random.default_rng([seed, 13])
    owners = rng.choice(clients, count, p=_log_normal(rng, clients, spread))
    return _parts(owners, clients)


def natural(names: Sequence[Any]) -> dict[str, np.ndarray]:
    """Split by a column that names the client of each example, in order of appearance.

    Args:
      names: text, numbers or truth values [N]; 1, 1.0 and "1" are one client.

    Raises:
      ValueError: an example has no name.

    Example:
      >>> natural(["ann", "bob", "ann"])
      {'ann': array([0, 2]), 'bob': array([1])}
    """
    return checks.groups("names", names)


def train_dev_test(
    count: int, seed: int, parts: tuple[float, ...] = (0.7, 0.15, 0.15)
) -> list[np.ndarray]:
    """Split the numbers below `count` at random into parts of these shares, each ascending.

    Example:
      >>> [len(part) for part in train_dev_test(100, seed=0)]
      [70, 15, 15]
    """
    order = np.random.default_rng([seed, count]).permutation(count)
    ends = (np.cumsum(parts)[:-1] * count).astype(int)
    return [np.sort(part) for part in np.split(order, ends)]


def hold_out(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the numbers below `count` at random: those kept and a `share`, one at least, held out.

    Example:
      >>> [len(part) for part in hold_out(100, 0.15, seed=0)]
      [85, 15]
    """
    order = np.random.default_rng([seed, count]).permutation(count)
    cut = max(int(share * count), 1)
    return np.sort(order[cut:]), np.sort(order[:cut])


def _log_normal(rng: np.random.Generator, clients: int, spread: float) -> np.ndarray:
    """Shares of clients that add up to one."""
    checks.number("spread", spread, 0)
    shares = np.exp(spread * rng.normal(size=clients))
    return shares / shares.sum()


def _enough(count: int, clients: int) -> None:
    checks.count("clients", clients)
    if count < clients:
        raise ValueError(
            f"clients: expected at most {count}, the number of examples; got {clients}"
        )


def _parts(owners: np.ndarray, clients: int) -> list[np.ndarray]:
    order = np.argsort(owners, kind="stable")
    sizes = np.bincount(owners, minlength=clients)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    if (empty := np.flatnonzero(sizes == 0)).size:
        # The largest gives its first; a heap, for there may be many of both.
        heap = [(-len(part), client) for client, part in enumerate(parts)]
        heapq.heapify(heap)
        for client in empty.tolist():
            _, largest = heap[0]
            parts[client], parts[largest] = parts[largest][:1], parts[largest][1:]
            heapq.heapreplace(heap, (-len(parts[largest]), largest))
    return parts
