"""Bytes and milliseconds of a masked round, for a client and for the server.

Run it with ``python -m benchmarks.secure``.

All parties are in one process, one after the other. Milliseconds are of the processor, so that
others on the machine count little; what a network would add is not in them.
"""

import argparse
import collections
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.timing import machine
from hiso_jax import secure


class Meter:
    """Processor time and bytes by party and step."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
        self.up = self.down = 0

    def timed(self, party: str, step: str, function: Callable[..., Any], *args: Any) -> Any:
        """The function's result; its time is added to that of the party and step."""
        start = time.process_time()
        result = function(*args)
        self.seconds[party, step] += time.process_time() - start
        return result

    def milliseconds(self, party: str) -> float:
        """Of a party, in all steps."""
        return 1e3 * sum(seconds for (who, _), seconds in self.seconds.items() if who == party)


def measure(count: int, degree: int | None, numbers: int, dropout: float) -> Meter:
    """One round of so many clients; a share `dropout` of them is gone before it sends its vector.

    Raises:
      AssertionError: the sum is not the plain one.
    """
    names = tuple(f"client{i}" for i in range(count))
    sites = {name: name.encode().ljust(32) for name in names}
    directory = {name: secure.site_public(key) for name, key in sites.items()}
    session = secure.Session("benchmark", 0, names, numbers + 1, 0, degree, count // 2 + 1)
    rng, meter = np.random.default_rng(0), Meter()
    gone = set(rng.choice(names, int(dropout * count), replace=False))
    vectors = {n: rng.integers(-(2**40), 2**40, numbers + 1) for n in names if n not in gone}
    server = secure.Server(session, directory)
    clients = {
        name: meter.timed("client", "keys", secure.Client, session, name, sites[name], directory)
        for name in names
    }
    steps: dict[str, Callable[[Any, Any], bytes]] = {
        "keys": lambda client, _: client.advertise(),
        "shares": lambda client, message: client.share(message),
        "vector": lambda client, message: client.mask(message, vectors[client.name]),
        "unmask": lambda client, message: client.unmask(message),
    }
    messages: dict[str, Any] = dict.fromkeys(names)
    for step, act in steps.items():
        for name, message in messages.items():
            if step == "vector" and name in gone:
                continue
            said = meter.timed("client", step, act, clients[name], message)
            meter.up += len(said)
            meter.timed("server", step, server.receive, name, said)
        if step != "unmask":
            messages = meter.timed("server", step, server.close)
            meter.down += sum(map(len, messages.values()))
    total, there = meter.timed("server", "sum", server.total)
    np.testing.assert_array_equal(total, sum(vectors.values()))
    assert set(there) == set(vectors)
    return meter


def main() -> None:
    """Print one row a number of clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--degree", type=int, default=32, help="neighbors; 0 for all others")
    parser.add_argument("--numbers", type=int, default=5, help="K P, scalars of a client")
    parser.add_argument("--dropout", type=float, default=0.05)
    options = parser.parse_args()
    print(machine())
    print(f"{options.numbers} scalars a client, {options.dropout:.0%} gone; per client and round")
    for count in options.clients:
        meter = measure(count, options.degree or None, options.numbers, options.dropout)
        neighbors = min(options.degree or count, count - 1)
        print(
            f"{count} clients, {neighbors} neighbors: up {meter.up / count:.0f} bytes, "
            f"down {meter.down / count:.0f} bytes, "
            f"client {meter.milliseconds('client') / count:.1f} ms, "
            f"server {meter.milliseconds('server') / count:.1f} ms", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
