"""A federated run as a fold over scalars: probe, aggregate, advance, replay.

    scalars = probe(state, batches)     # clients (`evaluate`): see private data, change nothing
    record  = aggregate(scalars)        # server: sees scalars only
    state   = advance(state, record)    # everyone: sees no data; the only thing that moves

`advance` is the one function that changes parameters. A client that was away, a crash,
a resumed run and a shipped model are all `replay`, the fold of `advance` over records.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from hiso_jax import aggregators, directions, estimators, rules
from hiso_jax._engine import checks, meshes, renamed, trees
from hiso_jax._engine.shapes import Array, ArrayLike, Float, Index, Number, Real, SomeKey
from hiso_jax._engine.trees import Batch, Params
from hiso_jax.layout import Laid, Layout
from hiso_jax.protocol import Algorithm, LossFn, Metrics, Rate, State
from hiso_jax.steps import Moved


class Spec(NamedTuple):
    """An algorithm as data, of which `algorithm` makes functions. Every field is a choice.

    `hiso_jax.scalar_algorithm` also gives second differences, per-client and upper directions the
    estimator and the aggregator that go with them.

    Example:
      >>> import hiso_jax as hj
      >>> alg = hj.decomfl(lambda params, batch: ((params["w"] - batch) ** 2).mean(), 0.1)
      >>> alg.spec.record
      (1, 5)
      >>> central = alg.spec._replace(estimator=hj.estimators.make("central", 5, 1e-3))
      >>> algorithm(central).config["estimator"]
      'central'
    """

    loss_fn: LossFn  # (params, a client's batch) -> loss
    rate: Rate  # round -> learning rate
    rule: rules.Rule  # scalars and noise -> step
    estimator: estimators.Estimator  # losses -> scalars
    directions: directions.Directions  # (root key, round, local step, number) -> noise
    combine: aggregators.Combine  # clients' scalars -> record
    layout: Layout  # how leaves are cut; changes no number
    steps: int  # K

    @property
    def sent(self) -> tuple[int, int]:
        """Shape [K, P] of what a client sends."""
        return self.steps, self.directions.per_client * self.estimator.per_direction

    @property
    def record(self) -> tuple[int, int]:
        """Shape of a record: as of what is sent, but C times as wide with per-client directions."""
        return self.steps, self.directions.total * self.estimator.per_direction

    @property
    def config(self) -> dict[str, Any]:
        """Every hyper-parameter by name, as data: each choice brings its own."""
        mine = dict(rule=self.rule.config, learning_rate=self.rate.config, local_steps=self.steps)
        return mine | {**self.estimator.config, **self.directions.config, **self.combine.config}

    @classmethod
    def from_header(
        cls, header: Mapping[str, Any], loss_fn: Any = None, rule: rules.Rule | None = None
    ) -> Self:
        """Return the algorithm that a ledger's header was written by.

        Args:
          loss_fn: only needed to evaluate clients.
          rule: of yours, if it is none of `hiso_jax.rules.RULES`.

        Raises:
          ValueError: something in it has no name here.
        """
        config = header["algorithm"]
        return cls(
            loss_fn,
            Rate.from_config(config["learning_rate"]),
            rules.from_config(config["rule"]) if rule is None else rule,
            estimators.from_config(config),
            directions.Directions.from_config(config),
            aggregators.Combine.from_config(config),
            Layout(trainable=trees.mask_of(header["leaves"])),
            int(config["local_steps"]),
        )


def init(spec: Spec, params: Params, key: SomeKey) -> State:
    """A fresh state: `params` any pytree of arrays, `key` the shared root key."""
    key = directions.as_key(key)
    # Weakly typed leaves (Python numbers) would change type, and recompile, after a round.
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
    leaves = spec.layout.select(params)
    spec.directions.check(leaves)
    return State(params, key, jnp.zeros((), jnp.int32), spec.rule.init(leaves))


def client(
    spec: Spec, state: State, laid: Laid, noise: directions.Noise, slot: Index, batches: Batch
) -> tuple[Float[Array, "K"], Float[Array, "K P"]]:
    """Losses and scalars of one client's local steps; the steps are forgotten."""
    first = spec.directions.first(slot)  # 0, but with directions of each client's own
    numbered = lambda name, k, p, *where: noise(name, k, first + p, *where)  # noqa: E731

    def measure(k: Index, params: Params, batch: Batch) -> estimators.Measured:
        direction = laid.direction(spec.rule, numbered, k)
        return spec.estimator.scalars(spec.loss_fn, params, batch, direction)

    if spec.steps == 1:
        found = measure(0, state.params, jax.tree.map(lambda x: x[0], batches))
        return jax.tree.map(lambda x: x[None], found)

    def step(before: Moved, inputs: tuple[Array, Batch]) -> tuple[Moved, tuple[Array, Array]]:
        k, batch = inputs
        loss, scalars = measure(k, laid.tree(before[0]), batch)
        more = k < spec.steps - 1  # its last step would be thrown away
        return laid.step(spec.rule, numbered, before, k, scalars, rate, more), (loss, scalars)

    rate = spec.rate(state.round)
    return jax.lax.scan(step, (laid.wide(), laid.rule), (jnp.arange(spec.steps), batches))[1]


def evaluate(
    spec: Spec, state: State, batches: Batch, slot: Index = 0
) -> tuple[Float[Array, "C K"], Float[Array, "C K P"]]:
    """Losses and scalars of clients; `slot` is the first one's place among the asked."""
    checks.batches(spec.loss_fn, state.params, batches, spec.steps)
    count = len(jax.tree.leaves(batches)[0])
    spec.directions.check_slots(slot, count)
    # Where all stand at the same perturbed parameters, their batches go through one pass.
    together = spec.steps == 1 and spec.directions.clients is None

    def some(state: State, inputs: tuple[Array, Batch]) -> tuple[Array, Array]:
        laid = spec.layout.lay(state.params, state.rule)
        noise = spec.directions.noise(laid, state.key, state.round, spec.steps)
        one = partial(client, spec, state, laid, noise)
        return jax.vmap(one)(*inputs) if together else jax.lax.map(lambda row: one(*row), inputs)

    return meshes.over_clients(some, state, (slot + jnp.arange(count), batches))


def aggregate(
    spec: Spec, scalars: Real[ArrayLike, "C K P"], weights: aggregators.Weights = None
) -> Float[Array, "K S"]:
    """The record of clients' scalars [C, K, P]."""
    return spec.combine(jnp.asarray(scalars, jnp.float32), weights, spec.sent)[0]


def advance(
    spec: Spec, state: State, record: Real[ArrayLike, "K S"], learning_rate: Number | None = None
) -> State:
    """The state after a record; one of NaN, a round nobody answered, moves nothing."""
    record = checks.record(record, spec.record)
    rate = spec.rate(state.round) if learning_rate is None else checks.rate(learning_rate)
    laid = spec.layout.lay(state.params, state.rule)
    noise = spec.directions.noise(laid, state.key, state.round, spec.steps)
    params, rule = laid.advance(spec.rule, noise, record, rate, state.key, state.round)
    return State(params, state.key, state.round + 1, rule)


def round(
    spec: Spec, state: State, batches: Batch, weights: aggregators.Weights = None
) -> tuple[State, Metrics]:
    """All of it in one program: what a simulation jits."""
    losses, scalars = evaluate(spec, state, batches)
    record, weights, finite = spec.combine(scalars, weights, spec.sent)
    record, shares = jax.lax.optimization_barrier(record), weights.astype(losses.dtype)
    mean = jnp.where(shares > 0, shares * losses.mean(1), 0).sum() / shares.sum()
    metrics = Metrics(mean, losses, scalars, record, spec.rate(state.round), finite)
    return advance(spec, state, record), metrics


def replay(
    spec: Spec, state: State, records: Real[ArrayLike, "R K S"], learning_rates: Any = None
) -> State:
    """The fold of `advance`: a client that was away, a crash, a shipped model."""
    step = lambda state, inputs: (advance(spec, state, *inputs), None)  # noqa: E731
    return jax.lax.scan(step, state, checks.records(records, learning_rates, spec.record))[0]


def algorithm(spec: Spec) -> Algorithm:
    """The functions of a spec, as they are handed on."""
    spec.estimator.check(spec.rule.second)
    probe = lambda state, batches, slot=0: evaluate(spec, state, batches, slot)[1]  # noqa: E731
    return Algorithm(
        init=partial(init, spec),
        probe=renamed.arguments(place="slot")(probe),
        aggregate=partial(aggregate, spec),
        advance=partial(advance, spec),
        round=partial(round, spec),
        replay=partial(replay, spec),
        learning_rate=spec.rate, config=spec.config, trainable=spec.layout.select, spec=spec,
    )  # fmt: skip
