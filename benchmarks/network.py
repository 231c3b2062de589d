"""What the network costs: seconds of a round in which nothing is computed, bytes, memory.

python -m benchmarks.network                        # real processes on loopback: 2, 8, 16 sites
python -m benchmarks.network --sites --clients 1000  # the server alone, in this process
python -m benchmarks.network --secure --clients 0     # masked rounds
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import hiso_jax as hj
from benchmarks import timing
from hiso_jax import federation
from hiso_jax.federation import wire
from hiso_jax.nvflare.parties import Local, Party


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure rounds without work, on loopback with mutual TLS, and the server by itself."""

    sites: tuple[int, ...] = (2, 8, 16)
    """Numbers of sites: one federation of real processes for each."""
    rounds: int = 60
    """Rounds of a job; the first ten, in which programs are compiled, are not counted."""
    clients: int = 1000
    """Clients asked in a round of the server alone; 0: it is not measured."""
    secure: bool = False
    """Rounds of the sites are masked."""


COMPILING = 10


def _loss(params: Any, batch: Any) -> jax.Array:
    return ((params["w"] - batch) ** 2).mean()


ALGORITHM = hj.decomfl(_loss, 0.1)


def _begin() -> hj.State:
    return ALGORITHM.init({"w": jnp.zeros(8)}, jax.random.key(0, impl="threefry2x32"))


def party(options: dict[str, Any], local: Local) -> Party:
    """A site that has next to nothing to do: eight parameters, one row."""
    del options
    batch = np.ones((1, 1, 8), np.float32)
    return Party(ALGORITHM, _begin, lambda round, number: batch if local.site else None)


def alone(clients: int, rounds: int = 30) -> dict[str, float]:
    """Median milliseconds of a round of `Server`, and of `Host` with all its messages."""
    names = [f"client {i}" for i in range(clients)]
    shape = (clients, *ALGORITHM.spec.sent)
    scalars = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    places = {name: i for i, name in enumerate(names)}

    def of_server(server: federation.Server) -> None:
        number = server.open(names)
        for name, own in zip(names, scalars, strict=True):
            server.reply(name, number, own)
        server.close()

    def answer(name: str, message: bytes) -> None:
        """At once: what is timed is the asking, parsing and counting."""
        del message
        reply = wire.Reply(host.server.round, host.digest, scalars[places[name]])
        host.receive(name, wire.pack(reply, host.run))

    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            federation.Server(
                ALGORITHM, _begin(), hj.Ledger.create(Path(folder) / what, ALGORITHM, _begin())
            )
            for what in ("server", "host")
        )
        host = federation.Host(second, answer)
        asked = {
            "server": lambda: of_server(first),
            "host": lambda: host.conduct(names, deadline=600),
        }
        return {k: 1000 * x for k, x in timing.interleaved(asked, rounds).items()}


def measure(count: int, rounds: int, secure: bool) -> dict[str, Any]:
    """One federation of real processes: seconds of a round, bytes of a client in it, memory."""
    import psutil

    from tests.flare import Flare, until  # the processes of the tests, and nothing else of them

    names = [f"site-{i + 1}" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder, Flare(Path(folder), names) as flare:
        for name in ("server", *names):
            flare.prepare(name, functions=("benchmarks.network:party",))
        flare.start()
        flare.wait()
        job = flare.submit(
            rounds=rounds, party="benchmarks.network:party", deadline=600.0, secure=secure
        )
        until(lambda: len(flare.rows()) >= rounds - 5, "most rounds", 1200)
        memory = {}
        for what, name in (("server", "server"), ("site", names[0])):
            own = [psutil.Process(flare.processes[name].pid)]
            parts = zip(("parent", "job"), [own, own[0].children(recursive=True)], strict=True)
            memory |= {f"{what}_{part}": sum(p.memory_info().rss for p in processes)
                       for part, processes in parts}  # fmt: skip
        flare.finish(job, 600)
        rows = flare.rows()[COMPILING:]
        steps = len(rows) - 1
        each = lambda field: (rows[-1][field] - rows[0][field]) / steps / count  # noqa: E731
        begin = [row["seconds"] for row in rows]
        return {
            "sites": count,
            "secure": secure,
            "seconds": float(np.median(begin)),
            "slowest_of_ten": float(np.quantile(begin, 0.9)),
            "silent": sum(len(row["silent"]) for row in flare.rows()),
            "payload_up": each("payload_up"), "payload_down": each("payload_down"),
            "messages_up": each("messages_up"), "messages_down": each("messages_down"),
            "wire_up": each("wire_received"), "wire_down": each("wire_sent"),
            "memory_mib": {name: round(size / 2**20) for name, size in memory.items()},
        }  # fmt: skip


def main(options: Options) -> None:
    """Measure, and print a line of JSON for each."""
    print(json.dumps({"machine": timing.machine()}))
    if options.clients:
        print(json.dumps({"clients": options.clients, "milliseconds": alone(options.clients)}))
    for count in options.sites:
        print(json.dumps(measure(count, options.rounds, options.secure)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
