"""A federated run as a fold over scalars: probe, aggregate, advance, replay.

    scalars = probe(state, batches)     # clients: see private data, change nothing
    record  = aggregate(scalars)        # server: sees scalars only
    state   = advance(state, record)    # everyone: sees no data; the only thing that moves

`advance` is the one function that changes parameters. A client that was away, a crash,
a resumed run and a shipped model are all `replay`, the fold of `advance` over records.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hiso_jax import (
    aggregators,
    checks,
    directions,
    estimators,
    exact,
    meshes,
    packing,
    rules,
    trees,
    updates,
)
from hiso_jax import upper as uppers
from hiso_jax.protocol import Algorithm, LossFn, Metrics, State
from hiso_jax.upper import Upper


def scalar_algorithm(
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rule: rules.Rule,
    estimator: str | estimators.Estimator = "forward",
    aggregator: aggregators.Aggregator | None = None,
    local_steps: int = 1,
    num_perturbations: int = 5,
    smoothing: float = 1e-3,
    distribution: str = "normal",
    trainable: trees.Trainable = None,
    nonfinite: str = "raise",
    seed_pool: int | None = None,
    own_directions: int | None = None,
    upper: Upper | None = None,
    lazy: bool = False,
) -> Algorithm:
    """Build a scalar-only federated algorithm from a rule (HiSo's Algorithm 1).

    Each client takes K local steps from the global parameters, all with the round's
    shared noise, sends K x P scalars and forgets the steps. Everybody then takes the same
    steps with the aggregated scalars: ``x <- x - learning_rate * step_k`` for k < K.

    With K = 1 all clients evaluate the same perturbed parameters, so their batches go
    through one forward pass. With K > 1 clients run one after another: memory does not
    grow with C.

    Args:
      loss_fn: pure function of (params, one client's batch) returning a float32 scalar.
      learning_rate: float, or optax schedule of the round.
      rule: how scalars become steps, see `hiso_jax.rules`.
      estimator: ``"forward"`` (P + 1 forward passes), ``"central"`` (2 P), ``"three_point"``
        (2 P + 1, and 2 P scalars; for rules that take second differences) or a function.
      aggregator: see `hiso_jax.aggregators`; the weighted mean by default.
      local_steps: K >= 1.
      num_perturbations: P >= 1.
      smoothing: finite-difference step mu > 0.
      distribution: noise, ``"normal"``, ``"near_normal"`` or ``"rademacher"``; see
        `hiso_jax.directions.draw`.
      trainable: mask as in `hiso_jax.trees.select`; other leaves are never perturbed,
        drawn for or changed.
      nonfinite: what a client with a NaN or infinite scalar does. ``"raise"``: `aggregate`
        raises ValueError naming it; inside jit, where nothing can be raised, the whole
        round moves nothing, its record is NaN, and ``metrics.finite`` names the client.
        ``"exclude"``: it gets weight 0.
      seed_pool: every direction is one of so many, picked by the shared key, as in FedKSeed;
        by default no two are the same. See `hiso_jax.pool`.
      own_directions: C, the clients asked in a round, of whom each then evaluates P directions
        of its own: client c of the round the directions c P to c P + P - 1. By default all
        evaluate the same. A client does and sends no more, the record is [K, C P], and the
        step an average over C P directions instead of P. What has no common quantity to
        compare cannot be aggregated but by the weighted mean.
      upper: some of the P directions move the upper part of the model only and start from the
        activations below it; see `hiso_jax.Upper`. Forward differences only.
      lazy: the loss takes large leaves as `hiso_jax.lazy.Lazy`, as one that computes with
        ``model.apply``, ``hidden`` and ``head`` of `hiso_jax.models` does: only one layer's
        perturbed copy lives at a time, instead of one of all parameters. Records and states
        do not depend on it.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: an argument out of range, by name, before anything is computed.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> loss_fn = lambda params, batch: ((params["w"] - batch) ** 2).mean()
      >>> alg = hj.scalar_algorithm(loss_fn, 0.1, rule=hj.rules.identity())
      >>> state = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> batches = jnp.ones((4, 1, 3))  # 4 clients, 1 local step
      >>> state, metrics = jax.jit(alg.round)(state, batches)
      >>> metrics.record.shape, int(state.round)
      ((1, 5), 1)
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function (params, batch) -> loss, got {loss_fn!r}")
    if not callable(learning_rate):
        checks.number("learning_rate", learning_rate, 0)
    steps = checks.count("local_steps", local_steps)
    perturbations = checks.count("num_perturbations", num_perturbations)
    checks.number("smoothing", smoothing, 0, above=True)
    noise_law = directions.check_distribution(distribution)
    checks.choice("nonfinite", nonfinite, ("raise", "exclude"))
    estimate = estimators.get(estimator, rule.second)
    if seed_pool is not None:
        checks.count("seed_pool", seed_pool)
    combine_clients = aggregators.mean() if aggregator is None else aggregator
    outputs, places = estimators.scalars_per_direction(estimator), 1
    if own_directions is not None:
        places = checks.count("own_directions", own_directions)
        if aggregator is not None:
            raise ValueError("aggregator: clients with own_directions have nothing in common to "
                             "aggregate; leave one of the two out")  # fmt: skip
        combine_clients = aggregators.side_by_side(places, outputs)
    if upper is not None:
        uppers.check(upper, perturbations)
        if estimator != "forward" or seed_pool is not None:
            raise ValueError('upper: goes with estimator="forward" and without seed_pool, got '
                             f"{estimator!r} and {seed_pool!r}")  # fmt: skip
    sent, shape = (steps, outputs * perturbations), (steps, outputs * places * perturbations)

    def noise_of(state: State, packs: packing.Packs) -> updates.Noise:
        leaves = trees.select(state.params, trainable)
        names, drawn = list(leaves), (steps, places * perturbations)
        keys = directions.round_keys(state.key, state.round, drawn, names, seed_pool)
        noise = packing.noise(keys, names, packs, noise_law)
        if upper is None:
            return noise
        shapes = {n: x.shape for n, x in leaves.items()}
        return uppers.noise(noise, uppers.recipe(upper), perturbations, shapes, packs)

    def rate_at(round: jax.Array) -> jax.Array:
        if not callable(learning_rate):
            return jnp.asarray(learning_rate, jnp.float32)
        schedule = lambda r: jnp.asarray(learning_rate(r), jnp.float32)  # noqa: E731  # pyright: ignore
        with exact.usual_types():
            return exact.apart(schedule, round)

    def packed(state: State) -> tuple[trees.Leaves, packing.Packs, Any]:
        """Leaves and the rule's state, small leaves packed."""
        leaves = trees.select(state.params, trainable)
        packs = packing.plan(leaves)
        return packing.pack(leaves, packs), packs, packing.pack_state(state.rule, leaves, packs)

    def narrow(params: trees.Params, leaves: trees.Leaves) -> trees.Params:
        like = trees.select(params, trainable)
        return trees.merge(params, {n: x.astype(like[n].dtype) for n, x in leaves.items()})

    def init(params: trees.Params, key: jax.Array) -> State:
        """Start a run: `params` any pytree of arrays, `key` the shared root key."""
        key = directions.as_key(key)
        # Weakly typed leaves (Python numbers) would change type, and recompile, after a round.
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
        if upper is not None:
            uppers.check_leaves(upper, trees.select(params, trainable))
        return State(
            params=params,
            key=key,
            round=jnp.zeros((), jnp.int32),
            rule=rule.init(trees.select(params, trainable)),
        )

    def evaluate(state: State, batches: Any, place: int = 0) -> tuple[jax.Array, jax.Array]:
        """Return losses [C, K] and scalars [C, K, P]."""
        checks.batches(loss_fn, state.params, batches, steps)
        count = len(jax.tree.leaves(batches)[0])
        if own_directions is not None and not 0 <= place <= places - count:
            raise ValueError(f"batches: {count} clients from place {place} on, but "
                             f"own_directions={own_directions}")  # fmt: skip
        starts = perturbations * (place + jnp.arange(count)) * int(own_directions is not None)
        return meshes.over_clients(evaluate_some, state, (starts, batches))

    def measure(
        params: trees.Params, batch: Any, direction: estimators.Direction, over: Any = lambda f: f
    ) -> tuple[jax.Array, jax.Array]:
        """Losses and scalars [P, ...] of a batch, or `over` the batches of several clients."""
        # Closed over, since lazy leaves cannot be arguments of vmap.
        plain = lambda x, own: jnp.asarray(loss_fn(x, own))  # noqa: E731  # a Python float, say
        loss = lambda batch: lambda x: over(lambda own: plain(x, own))(batch)  # noqa: E731
        if upper is None:
            return estimate(loss(batch), params, direction, perturbations, smoothing)
        features, wholes = upper.features, perturbations - upper.directions
        kept = over(lambda own: features(params, own))(batch)
        above = lambda p: direction(wholes + p)  # noqa: E731
        value, scalars = estimate(loss(kept), params, above, upper.directions, smoothing)
        if not wholes:
            return value, scalars
        first = estimators.forward_difference(
            loss(batch), params, direction, wholes, smoothing, base=value
        )
        return value, jnp.concatenate([first[1], scalars])

    def evaluate_some(state: State, clients: Any) -> tuple[jax.Array, jax.Array]:
        leaves, packs, rule_state = packed(state)
        noise = noise_of(state, packs)

        def noise_from(start: Any) -> updates.Noise:
            return lambda name, k, p, *where: noise(name, k, start + p, *where)

        def direction_of(step: Any, start: Any = 0) -> estimators.Direction:
            own = noise_from(start)
            of = updates.directions_of(rule, own, leaves, rule_state, step, lazy)
            return lambda p: packing.unpack(of(p), packs)

        if steps == 1 and own_directions is None:
            _, batches = clients
            data = jax.tree.map(lambda x: x[:, 0], batches)
            losses, scalars = measure(state.params, data, direction_of(0), jax.vmap)
            return losses[:, None], scalars.T[:, None]

        rate = rate_at(state.round)

        def client(inputs: Any) -> tuple[jax.Array, jax.Array]:
            start, data = inputs
            own = noise_from(start)

            def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
                leaves, inner = carry
                k, batch = inputs
                params = narrow(state.params, packing.unpack(leaves, packs))
                loss, scalars = measure(params, batch, direction_of(k, start))
                moved = updates.apply_record(
                    rule,
                    lambda name, _, *place: own(name, k, *place),
                    leaves,
                    inner,
                    scalars[None],
                    rate,
                    entering=rule_state,
                    lasts=jnp.zeros(1, bool),
                    wanted=k < steps - 1,  # its last step would be thrown away
                    frozen=not rule.carried,
                )
                return moved, (loss, scalars)

            wide = {n: exact.wide(x) for n, x in leaves.items()}
            return lax.scan(step, (wide, rule_state), (jnp.arange(steps), data))[1]

        return lax.map(client, clients)

    def combine(scalars: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return record [K, P], effective weights [C] and finite [C]."""
        if scalars.ndim != 3 or scalars.shape[1:] != sent:
            raise ValueError(f"scalars: expected shape [C, {steps}, {sent[1]}] (clients, "
                             f"local steps, perturbations), got {scalars.shape}")  # fmt: skip
        weights = checks.weights(weights, scalars.shape[0])
        finite = jnp.isfinite(scalars).all((1, 2))
        counts = weights > 0
        if checks.is_concrete((scalars, weights)) and nonfinite == "raise":
            if bad := np.flatnonzero(~np.asarray(finite | ~counts)).tolist():
                raise ValueError(
                    f"scalars: clients {bad} (positions along the first axis) sent NaN or infinite "
                    'scalars; lower the learning rate, or leave them out with nonfinite="exclude"'
                )
        weights = jnp.where(finite, weights, 0)
        scalars = jnp.where((weights > 0)[:, None, None], scalars, 0)
        record = combine_clients(scalars, weights)
        # A record nobody may apply is NaN: `advance` then moves nothing.
        usable = weights.sum() > 0
        if nonfinite == "raise":
            usable &= (finite | ~counts).all()
        return jnp.where(usable, record, jnp.nan), weights, finite

    def probe(state: State, batches: Any, place: int = 0) -> jax.Array:
        return evaluate(state, batches, place)[1]

    def aggregate(scalars: jax.Array, weights: Any = None) -> jax.Array:
        return combine(jnp.asarray(scalars, jnp.float32), weights)[0]

    def advance(state: State, record: jax.Array, learning_rate: Any = None) -> State:
        record = jnp.asarray(record, jnp.float32)
        if record.shape != shape:
            raise ValueError(f"record: expected shape {shape} (local steps, perturbations), got "
                             f"{record.shape}")  # fmt: skip
        usable = jnp.isfinite(record).all()
        if checks.is_concrete(record):
            values = np.asarray(record)
            if not np.isfinite(values).all() and not np.isnan(values).all():
                raise ValueError("record: expected finite scalars, or NaN only for a round nobody "
                                 f"answered, got {values.tolist()}")  # fmt: skip
        rate = rate_at(state.round)
        if learning_rate is not None:
            rate = jnp.asarray(checks.number("learning_rate", learning_rate, 0), jnp.float32)
        # Without the barrier the scalars may be computed anew, and differently, where used.
        record = exact.seal(lax.optimization_barrier(jnp.where(usable, record, 0)))

        leaves, packs, rule_state = packed(state)
        names = list(trees.select(state.params, trainable))
        keys = directions.rounding_keys(state.key, state.round, names)
        leaves, rule_state = updates.apply_record(
            rule,
            noise_of(state, packs),
            leaves,
            rule_state,
            record,
            rate,
            usable=usable,
            narrow=packing.rounding(keys, names, packs, leaves),
        )
        return State(
            params=trees.merge(state.params, packing.unpack(leaves, packs)),
            key=state.key,
            round=state.round + 1,
            rule=packing.unpack_state(rule_state, leaves, packs),
        )

    def round(state: State, batches: Any, weights: Any = None) -> tuple[State, Metrics]:
        losses, scalars = evaluate(state, batches)
        record, weights, finite = combine(scalars, weights)
        record, shares = lax.optimization_barrier(record), weights.astype(losses.dtype)
        metrics = Metrics(
            loss=jnp.where(shares > 0, shares * losses.mean(1), 0).sum() / shares.sum(),
            losses=losses,
            scalars=scalars,
            record=record,
            learning_rate=rate_at(state.round),
            finite=finite,
        )
        return advance(state, record), metrics

    def replay(state: State, records: jax.Array, learning_rates: Any = None) -> State:
        records = jnp.asarray(records, jnp.float32)
        if records.ndim != 3 or records.shape[1:] != shape:
            raise ValueError(f"records: expected shape [R, {steps}, {shape[1]}] (rounds, "
                             f"local steps, perturbations), got {records.shape}")  # fmt: skip
        if checks.is_concrete(records):
            values = np.asarray(records)
            bad = np.flatnonzero(~np.isfinite(values).all((1, 2)) & ~np.isnan(values).all((1, 2)))
            if bad.size:
                raise ValueError(f"records: NaN or infinite scalars in records {bad.tolist()}")
        if learning_rates is not None:
            learning_rates = jnp.asarray(learning_rates, jnp.float32)
            if learning_rates.shape != records.shape[:1]:
                raise ValueError(f"learning_rates: expected shape ({len(records)},), one a record, "
                                 f"got {learning_rates.shape}")  # fmt: skip
        step = lambda state, inputs: (advance(state, *inputs), None)  # noqa: E731
        return lax.scan(step, state, (records, learning_rates))[0]

    recipe = dict(
        rule=rule.recipe,
        learning_rate="schedule" if callable(learning_rate) else learning_rate,
        local_steps=steps,
        num_perturbations=perturbations,
        smoothing=smoothing,
        estimator=getattr(estimator, "__qualname__", estimator),
        aggregator=getattr(combine_clients, "__qualname__", repr(combine_clients)),
        distribution=noise_law,
        nonfinite=nonfinite,
    )
    # Only where they are used, so that the headers of other runs are what they were.
    given: dict[str, Any] = {"seed_pool": seed_pool, "own_directions": own_directions}
    given["upper"] = None if upper is None else uppers.recipe(upper)
    recipe |= {name: value for name, value in given.items() if value is not None}
    chosen = lambda params: trees.select(params, trainable)  # noqa: E731
    return Algorithm(init, probe, aggregate, advance, round, replay, rate_at, recipe, chosen)
