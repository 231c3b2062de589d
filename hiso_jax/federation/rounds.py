"""The round loop of a simulation: many clients on one machine, in one program a round."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hiso_jax import aggregators
from hiso_jax import algorithm as algorithms
from hiso_jax._engine import checks, meshes
from hiso_jax._engine.exact import compiler_options
from hiso_jax.federation.clients import Arrays, Clients
from hiso_jax.protocol import Algorithm, Metrics, State


class Report(NamedTuple):
    """What a simulated round leaves to look at."""

    round: int  # rounds done
    state: State
    metrics: Metrics
    names: list[str]  # who was asked
    weights: np.ndarray  # float32 [C]: 0 for those who did not answer
    bad: list[str]  # who sent NaN or infinite scalars, so that nothing moved
    event: dict[str, Any] | None = None  # what a round of sums has released

    @property
    def reported(self) -> dict[str, float]:
        """Weights of those who answered, by name, as ``ledger.append`` takes them."""
        return {n: float(w) for n, w in zip(self.names, self.weights, strict=True) if w > 0}


def participation(count: int, round: int, seed: int, dropout: float) -> np.ndarray:
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
    summed: Callable[..., Any] | None = None,
) -> Iterator[Report]:
    """Yield a report after every round, from ``state.round`` on.

    The next batches are prepared while the device works, unless clients choose examples anew with
    the model that comes out. The state given in is not kept: its buffers are reused, so copy what
    should outlive the first round.

    Args:
      algorithm: with the same `local_steps`.
      state: from ``algorithm.init`` or an earlier report.
      clients: whose data it is. Where they `select`, and the state's round is none in which they
        do, ``clients.chosen`` must be what they chose before.
      rounds: the round to stop before.
      clients_per_round: C.
      batch_size: B, examples of a client in a local step.
      local_steps: K.
      seed: of who takes part with which examples; independent of the noise.
      sampling: ``"uniform"``, ``"size"`` or ``"balanced"``, see `Clients.sample`.
      dropout: chance in [0, 1] that a client that was asked does not answer. A round nobody
        answers moves nothing; its record is NaN.
      prepare: what is done to batches [C, K, B, ...] before they are computed with.
      mesh: devices to work on, from `hiso_jax.meshes.make`; C must be a multiple of its rows.
      summed: a `hiso_jax.federation.private.Simulated`, which makes records of sums on a grid.
        Under a mechanism the losses of its rounds are NaN: to show them would be one release more.

    Raises:
      FloatingPointError: clients sent NaN or infinite scalars, by name, and whether their loss
        was so before any step. It is raised after the report of that round, which moved nothing,
        so the last good state is at hand.
    """
    checks.count("rounds", rounds)
    checks.count("batch_size", batch_size)
    checks.number("dropout", dropout, 0, 1)
    step = _plain_round(algorithm) if summed is None else _round_of_sums(algorithm, summed)

    def draw(round: int) -> tuple[list[str], Any]:
        if clients.select is not None and clients.due(
            round
        ):  # whoever is asked until the next time
            period = range(round, min(round + clients.select.renew, rounds))
            asked = clients.asked(period, clients_per_round, seed, sampling)
            with used():
                clients.choose(state.params, asked, round, seed)
        names = clients.sample(clients_per_round, round, seed, sampling)
        batches = prepare(clients.batches(names, round, batch_size, local_steps, seed))
        return names, batches if mesh is None else meshes.place_batches(mesh, batches)

    used = contextlib.nullcontext if mesh is None else lambda: jax.set_mesh(mesh)
    if mesh is not None:
        state = meshes.place_state(mesh, state)
    first, ahead = int(state.round), None
    for round in range(first, rounds):
        names, batches = draw(round) if ahead is None else ahead
        weights = participation(len(names), round, seed, dropout)
        with used():
            state, metrics, weights, event = step(state, batches, weights, round, names)
        ahead = None
        if round + 1 < rounds and not clients.due(round + 1):
            ahead = draw(round + 1)  # the device is still busy with this round
        finite = np.asarray(metrics.finite) | (weights == 0)  # waits for the device
        bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
        stuck = bad and not np.isfinite(np.asarray(metrics.record)).all()
        yield Report(round + 1, state, metrics, names, weights, bad if stuck else [], event)
        if stuck:
            advice = _advice(algorithm, metrics, round, names, bad)
            raise FloatingPointError(
                f"round {round}: clients {bad} sent scalars that are NaN, infinite or beyond "
                f"{aggregators.MOST:g}; the round moved nothing{advice}"
            )


Step = Callable[
    [State, Any, np.ndarray, int, list[str]],
    tuple[State, Metrics, np.ndarray, dict[str, Any] | None],
]
"""(state, batches, weights, round, names) -> state, metrics, weights that count, event."""


def _plain_round(algorithm: Algorithm) -> Step:
    """A round in one program, in the buffers of the state before."""
    compiled = jax.jit(algorithm.round, donate_argnums=0, compiler_options=compiler_options())
    return lambda state, batches, weights, *_: (*compiled(state, batches, weights), weights, None)


def _round_of_sums(algorithm: Algorithm, summed: Any) -> Step:
    """A round whose record is a sum on a grid: scalars leave the device for it."""
    spec, terms = algorithm.spec, summed.terms
    terms.check(spec)
    compiled = partial(jax.jit, compiler_options=compiler_options())
    measure, advance = compiled(partial(algorithms.evaluate, spec)), compiled(algorithm.advance)

    def step(
        state: State, batches: Any, weights: np.ndarray, round: int, names: list[str]
    ) -> tuple[State, Metrics, np.ndarray, dict[str, Any] | None]:
        losses, sent = measure(state, batches)
        scalars = np.asarray(sent)
        finite = np.isfinite(scalars).all((1, 2))
        usable = np.where(finite, weights, 0)
        record, reported, event = np.full(spec.record, np.nan, np.float32), {}, None
        if spec.combine.nonfinite == "exclude" or (finite | (weights == 0)).all():
            own = {} if spec.directions.clients is None else {"own": spec}
            record, reported, event = summed(round, names, scalars, usable, **own)
        there = np.array([reported.get(name, 0.0) for name in names], np.float32)
        mean = jnp.asarray(np.nan, losses.dtype)
        if terms.mechanism is not None:
            losses = jnp.full_like(losses, jnp.nan)
        elif there.any():
            mean = jnp.average(losses.mean(1), weights=jnp.asarray(there, losses.dtype))
        rate = spec.rate(state.round)
        metrics = Metrics(mean, losses, sent, jnp.asarray(record), rate, jnp.asarray(finite))
        # NaN scalars of those who answered are told by name, so their weights stay.
        weights = there if (finite | (weights == 0)).all() else weights
        return advance(state, record, rate), metrics, weights, event

    return step


def _advice(
    algorithm: Algorithm, metrics: Metrics, round: int, names: list[str], bad: list[str]
) -> str:
    """What may have made the scalars of the clients `bad` NaN or infinite."""
    first = dict(zip(names, np.asarray(metrics.losses)[:, 0].tolist(), strict=True))
    # Under a mechanism no loss is shown.
    shown = np.isfinite(np.asarray(metrics.losses)).any()
    broken = [name for name in bad if shown and not np.isfinite(first[name])]
    if not broken:
        return ". Lower the learning rate or the smoothing"
    kind = "NaN" if all(np.isnan(first[name]) for name in broken) else "NaN or infinite"
    # Other estimators take no loss at the parameters themselves.
    at = algorithm.config.get("estimator") in ("forward", "three_point")
    place = "at" if at else "near"
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
    on_batch: Callable[[int, int], Any] = lambda done, size: None,
) -> Any:
    """Sum ``function(params, batch)`` over all of `data`, in batches of one shape.

    `function` returns a pytree of sums over its batch; the last batch is padded with
    examples of ``weight`` 0. `on_batch` is called after each with the number of examples that
    are done, and of all.
    """
    size = len(next(iter(data.values())))
    total = before = None
    for start in range(0, size, batch_size):
        picks = np.arange(start, start + batch_size)
        batch = {k: v[np.minimum(picks, size - 1)] for k, v in data.items()}
        batch["weight"] = (picks < size).astype(np.float32)
        sums = function(params, prepare(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        jax.block_until_ready(before)  # one batch is prepared while the device works, no more
        before = sums
        on_batch(min(start + batch_size, size), size)
    return jax.device_get(total)
