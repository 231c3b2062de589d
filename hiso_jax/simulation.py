"""Many clients on one machine: their data, who takes part, what is sent, the round loop.

Everything random here is a function of (seed, round), so a run can be stopped after any
round and gone on with, and two methods can be given the very same clients and batches.
"""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hiso_jax import checks, meshes
from hiso_jax.exact import compiler_options
from hiso_jax.protocol import Algorithm, Metrics, State

Arrays = dict[str, np.ndarray]
"""Named columns of one client: each [N, ...], the same N."""


class Clients:
    """Clients by name, each with columns of its own examples.

    Names are text, as in a ledger: ``str`` of what is given, which any method may be given again.

    Args:
      data: name -> columns; every column of a client has its number of examples first.

    Raises:
      ValueError: no client, a client without examples, columns that do not match, or names that
        are missing or the same text.

    Example:
      >>> import numpy as np
      >>> clients = Clients({"a": {"x": np.arange(3)}, "b": {"x": np.arange(10, 15)}})
      >>> batch = clients.batches(["b"], round=0, batch_size=2)
      >>> {name: column.shape for name, column in batch.items()}
      {'x': (1, 1, 2), 'weight': (1, 1, 2)}
    """

    def __init__(self, data: Mapping[Any, Mapping[str, np.ndarray]]):
        names = checks.clients("data", data)
        clients = {
            name: {k: np.asarray(v) for k, v in own.items()}
            for name, own in zip(names, data.values(), strict=True)
        }
        columns = {(k, v.shape[1:], v.dtype) for k, v in next(iter(clients.values())).items()}
        sizes = []
        for name, own in clients.items():
            lengths = {len(v) for v in own.values()}
            if len(lengths) != 1 or min(lengths) == 0:
                raise ValueError(
                    f"data: client {name!r} needs columns of one length >= 1, got "
                    f"{ {k: len(v) for k, v in own.items()} }"
                )
            if {(k, v.shape[1:], v.dtype) for k, v in own.items()} != columns or "weight" in own:
                raise ValueError(
                    f"data: client {name!r} must have the same columns as the others, and none "
                    f'called "weight"; got { {k: (v.shape[1:], v.dtype) for k, v in own.items()} }'
                )
            sizes.append(lengths.pop())
        first = clients[next(iter(clients))]
        joined = {k: np.concatenate([own[k] for own in clients.values()]) for k in first}
        self._hold(list(clients), np.array(sizes), joined)

    @classmethod
    def joined(
        cls, names: Sequence[Any], sizes: Sequence[int], columns: Mapping[str, np.ndarray]
    ) -> "Clients":
        """Clients whose examples lie one client after the other; nothing is copied.

        Args:
          names: of the clients, different.
          sizes: examples of each, >= 1.
          columns: name -> array [sum(sizes), ...].

        Raises:
          ValueError: names, sizes and columns do not match, or names are missing or the same.

        Example:
          >>> Clients.joined(["a", "b"], [2, 1], {"x": np.arange(3)})["b"]["x"]
          array([2])
        """
        lengths = {len(v) for v in columns.values()} | {int(np.sum(sizes))}
        if len(names) != len(sizes) or not len(names) or min(sizes) < 1 or len(lengths) != 1:
            raise ValueError(
                f"sizes: expected one >= 1 a client that add up to the columns' length; got "
                f"{len(names)} names, {len(sizes)} sizes and lengths {sorted(lengths)}"
            )
        clients = cls.__new__(cls)
        clients._hold(checks.clients("names", names), np.asarray(sizes), dict(columns))
        return clients

    def _hold(self, names: list[str], sizes: np.ndarray, columns: Arrays) -> None:
        self.names, self._columns, self._sizes = names, columns, sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._index = {name: i for i, name in enumerate(names)}
        self._shares = sizes / sizes.sum()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def columns(self) -> Arrays:
        """The examples of all clients, end to end in the order of `names`."""
        return dict(self._columns)

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each client."""
        return dict(zip(self.names, self._sizes.tolist(), strict=True))

    def __getitem__(self, name: Any) -> Arrays:
        """A client's own columns."""
        i = self._index[str(name)]
        own = slice(self._starts[i], self._starts[i] + self._sizes[i])
        return {k: v[own] for k, v in self._columns.items()}

    def sample(self, count: int, round: int, seed: int = 0, sampling: str = "uniform") -> list[str]:
        """Draw the names of `count` different clients for a round.

        Args:
          count: C.
          round: number of the round.
          seed: of the run.
          sampling: ``"uniform"``, or ``"size"``: with probability in proportion to a
            client's examples, so that the plain mean over clients stands for the mean over
            examples (as in FedProx, arXiv 1812.06127).
        """
        checks.choice("sampling", sampling, ("uniform", "size"))
        if not 1 <= count <= len(self):
            raise ValueError(f"count: expected 1 to {len(self)} clients a round, got {count}")
        rng = np.random.default_rng([seed, round, 0])
        shares = self._shares if sampling == "size" else None
        return [self.names[i] for i in rng.choice(len(self), count, replace=False, p=shares)]

    def batches(
        self, names: Sequence[Any], round: int, batch_size: int, local_steps: int = 1, seed: int = 0
    ) -> Arrays:
        """Draw the batches of a round, leaves [C, K, B, ...].

        A client draws without repetition within a local step; one with fewer examples than
        `batch_size` gives all it has, and the rest of its batch has ``weight`` 0.
        """
        shape = (len(names), local_steps, batch_size)
        picks, weight = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for c, name in enumerate(names):
            i = self._index[str(name)]
            size, kept = int(self._sizes[i]), min(int(self._sizes[i]), batch_size)
            rng = np.random.default_rng([seed, round, 1, i])
            for k in range(local_steps):
                picks[c, k, :kept] = rng.permutation(size)[:kept]
            picks[c] += self._starts[i]
            weight[c, :, :kept] = 1
        return {k: v[picks] for k, v in self._columns.items()} | {"weight": weight}


class Traffic:
    """Counts payload bytes: what has crossed the network, nothing else has.

    A client's first message down is the root key (8 bytes). Then, whenever it is asked, it
    gets the round's number (4 bytes) and the records it missed (K x P float32 each, as
    ``ledger.records(since)``), and sends K x P float32.

    Args:
      record_shape: (K, P).
      schedule: whether the learning rate follows one: it is then sent too, 4 bytes a record.
      own_directions: C, where a client sends its part of a record only.
    """

    def __init__(
        self, record_shape: tuple[int, int], schedule: bool = False, own_directions: int = 1
    ):
        whole = 4 * int(np.prod(record_shape))
        self.record_bytes = whole // own_directions
        self.missed_bytes = whole + 4 * schedule
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self._next: dict[str, int] = {}

    def ask(self, names: Sequence[str], round: int, reported: Container[str] | None = None) -> None:
        """Account a round: every named client catches up; all, or those `reported`, answer."""
        self.catch_up(names, round)
        for name in names:
            self.down[name] += 4
            if reported is None or name in reported:
                self.up[name] = self.up.get(name, 0) + self.record_bytes

    def catch_up(self, names: Sequence[str], round: int) -> None:
        """Account the records that bring the named clients to the start of `round`."""
        for name in names:
            missed = round - self._next.get(name, 0)
            self.down[name] = self.down.get(name, 8) + missed * self.missed_bytes
            self._next[name] = round


class Report(NamedTuple):
    """What a simulated round leaves to look at."""

    round: int  # rounds done
    state: State
    metrics: Metrics
    names: list[str]  # who was asked
    weights: np.ndarray  # float32 [C]: 0 for those who did not answer
    bad: list[str]  # who sent NaN or infinite scalars, so that nothing moved

    @property
    def reported(self) -> dict[str, float]:
        """Weights of those who answered, by name, as ``ledger.append`` takes them."""
        return {n: float(w) for n, w in zip(self.names, self.weights, strict=True) if w > 0}


def answers(count: int, round: int, seed: int, dropout: float) -> np.ndarray:
    """Weights of the clients asked: 0 with probability `dropout`, else 1."""
    chances = np.random.default_rng([seed, round, 2]).random(count)
    return (chances >= dropout).astype(np.float32)


def run(
    algorithm: Algorithm,
    state: State,
    clients: Clients,
    *,
    rounds: int,
    clients_per_round: int,
    batch_size: int,
    local_steps: int = 1,
    seed: int = 0,
    sampling: str = "uniform",
    dropout: float = 0.0,
    prepare: Callable[[Arrays], Arrays] = lambda batches: batches,
    mesh: Mesh | None = None,
) -> Iterator[Report]:
    """Yield a report after every round, from ``state.round`` on.

    The next batches are prepared while the device works. The state given in is not kept:
    its buffers are reused, so copy what should outlive the first round.

    Args:
      algorithm: with the same `local_steps`.
      state: from ``algorithm.init`` or an earlier report.
      clients: whose data it is.
      rounds: the round to stop before.
      clients_per_round: C.
      batch_size: B, examples of a client in a local step.
      local_steps: K.
      seed: of who takes part with which examples; independent of the noise.
      sampling: ``"uniform"`` or ``"size"``, see `Clients.sample`.
      dropout: chance in [0, 1] that a client that was asked does not answer. A round nobody
        answers moves nothing; its record is NaN.
      prepare: what is done to batches [C, K, B, ...] before they are computed with.
      mesh: devices to work on, from `hiso_jax.meshes.make`; C must be a multiple of its rows.

    Raises:
      FloatingPointError: clients sent NaN or infinite scalars, by name, and whether their loss
        was so before any step. It is raised after the report of that round, which moved nothing,
        so the last good state is at hand.
    """
    checks.count("rounds", rounds)
    checks.count("batch_size", batch_size)
    checks.number("dropout", dropout, 0, 1)
    step = jax.jit(algorithm.round, donate_argnums=0, compiler_options=compiler_options())

    def draw(round: int) -> tuple[list[str], Any]:
        names = clients.sample(clients_per_round, round, seed, sampling)
        batches = prepare(clients.batches(names, round, batch_size, local_steps, seed))
        return names, batches if mesh is None else meshes.place_batches(mesh, batches)

    used = contextlib.nullcontext if mesh is None else lambda: jax.set_mesh(mesh)
    if mesh is not None:
        state = meshes.place_state(mesh, state)
    first = int(state.round)
    ahead = draw(first)
    for round in range(first, rounds):
        names, batches = ahead
        weights = answers(len(names), round, seed, dropout)
        with used():
            state, metrics = step(state, batches, weights)
        if round + 1 < rounds:
            ahead = draw(round + 1)  # the device is still busy with this round
        finite = np.asarray(metrics.finite) | (weights == 0)  # waits for the device
        bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
        stuck = bad and not np.isfinite(np.asarray(metrics.record)).all()
        yield Report(round + 1, state, metrics, names, weights, bad if stuck else [])
        if stuck:
            raise FloatingPointError(
                f"round {round}: clients {bad} sent NaN or infinite scalars; the round moved "
                f"nothing{_advice(algorithm, metrics, round, names, bad)}"
            )


def _advice(
    algorithm: Algorithm, metrics: Metrics, round: int, names: list[str], bad: list[str]
) -> str:
    """What may have made the scalars of the clients `bad` NaN or infinite."""
    first = dict(zip(names, np.asarray(metrics.losses)[:, 0].tolist(), strict=True))
    broken = [name for name in bad if not np.isfinite(first[name])]
    if not broken:
        return ". Lower the learning rate or the smoothing"
    kind = "NaN" if all(np.isnan(first[name]) for name in broken) else "NaN or infinite"
    # Other estimators take no loss at the parameters themselves.
    place = "near" if algorithm.recipe.get("estimator") == "central" else "at"
    earlier = ", and at the learning rate of the rounds before" if round else ""
    return (
        f": the loss of clients {broken} is {kind} {place} the model's own parameters, before "
        f"any step of this round: look at their data and at the model{earlier}"
    )


def evaluate(
    function: Any,
    params: Any,
    data: Mapping[str, np.ndarray],
    batch_size: int,
    prepare: Callable[[Arrays], Arrays] = lambda batch: batch,
) -> Any:
    """Sum ``function(params, batch)`` over all of `data`, in batches of one shape.

    `function` returns a pytree of sums over its batch; the last batch is padded with
    examples of ``weight`` 0.
    """
    size = len(next(iter(data.values())))
    total = None
    for start in range(0, size, batch_size):
        picks = np.arange(start, start + batch_size)
        batch = {k: v[np.minimum(picks, size - 1)] for k, v in data.items()}
        batch["weight"] = (picks < size).astype(np.float32)
        sums = function(params, prepare(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return jax.device_get(total)
