"""What scalar-only methods are measured against: federated averaging and its kin, through optax.

Clients send a whole model's worth of floats. FedAvg (arXiv 1602.05629), FedAdam, FedYogi and
FedAdagrad (arXiv 2003.00295) take gradients; FedZO (arXiv 2201.09531) estimates them from
losses, with directions of each client's own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import hiso_jax as hj
from hiso_jax import directions, estimators
from hiso_jax._engine import checks, trees
from hiso_jax.federation import traffic
from hiso_jax.ledger import snapshots
from hiso_jax.protocol import LossFn

ADAPTIVITY = 1e-3
"""Added to the root of the servers' second moment, as in arXiv 2003.00295."""

SERVERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "fedadam": lambda rate: optax.adam(rate, 0.9, 0.99, eps=ADAPTIVITY),
    "fedyogi": lambda rate: optax.yogi(rate, 0.9, 0.99, eps=ADAPTIVITY),
    "fedadagrad": lambda rate: optax.adagrad(rate, ADAPTIVITY**2, eps=ADAPTIVITY),
}


class Baseline(NamedTuple):
    """An algorithm whose clients send floats as many as the model has."""

    init: Callable[..., hj.State]
    round: Callable[..., tuple[hj.State, hj.Metrics]]
    learning_rate: Callable[[jax.Array], jax.Array]
    config: dict[str, Any]
    trainable: Callable[[trees.Params], trees.Leaves]


class _Gradient(NamedTuple):
    """How a client finds the slope of its loss, and what that costs.

    Attributes:
      of: (leaves -> loss, leaves, key) -> loss and gradient.
      forward_passes: what one costs; a backward pass is about two.
    """

    of: Callable[..., tuple[jax.Array, trees.Leaves]]
    forward_passes: int


def _schedule(rate: optax.ScalarOrSchedule) -> Callable[[jax.Array], jax.Array]:
    """A learning rate as a function of the round."""
    of = rate if callable(rate) else lambda round: rate
    return lambda round: jnp.asarray(of(round), jnp.float32)


def _build(
    name: str,
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    gradient: _Gradient,
    server: Callable[[Any], optax.GradientTransformation] | None,
    client_rate: optax.ScalarOrSchedule | None,
    local_steps: int,
    trainable: trees.Trainable,
) -> Baseline:
    """K steps of SGD a client, whose mean direction is the server's gradient.

    Args:
      gradient: of a client.
      server: learning rate -> optimizer; None moves to the mean of the clients' models.
      client_rate: of the clients' SGD; None takes the learning rate.
    """
    steps = checks.count("local_steps", local_steps)
    rate_at = _schedule(learning_rate)
    client_rate_at = rate_at if client_rate is None else _schedule(client_rate)
    optimizer = optax.identity() if server is None else server(rate_at)
    chosen = lambda params: trees.select(params, trainable)  # noqa: E731

    def init(params: trees.Params, key: jax.Array) -> hj.State:
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
        return hj.State(params, key, jnp.zeros((), jnp.int32), optimizer.init(chosen(params)))

    def round(state: hj.State, batches: Any, weights: Any = None) -> tuple[hj.State, hj.Metrics]:
        count = len(jax.tree.leaves(batches)[0])
        weights = jnp.ones(count) if weights is None else jnp.asarray(weights, jnp.float32)
        leaves, rate = chosen(state.params), rate_at(state.round)
        own_rate = client_rate_at(state.round)
        key = jax.random.fold_in(state.key, state.round)

        def client(total: trees.Leaves, inputs: Any) -> tuple[trees.Leaves, jax.Array]:
            number, weight, data = inputs

            def step(x: trees.Leaves, inputs: Any) -> tuple[trees.Leaves, jax.Array]:
                k, batch = inputs
                loss = lambda x: loss_fn(trees.merge(state.params, x), batch)  # noqa: E731
                key_of_step = jax.random.fold_in(jax.random.fold_in(key, number), k)
                value, slope = gradient.of(loss, x, key_of_step)
                return {n: v - own_rate * slope[n].astype(v.dtype) for n, v in x.items()}, value

            moved, values = lax.scan(step, leaves, (jnp.arange(steps), data))
            # Not 0 times: who is absent may have NaN, and 0 times that is one.
            counted = lambda x: jnp.where(weight > 0, weight * x, 0)  # noqa: E731
            total = {n: t + counted(leaves[n] - moved[n]) for n, t in total.items()}
            return total, values

        zeros = {n: jnp.zeros(x.shape, jnp.float32) for n, x in leaves.items()}
        total, losses = lax.scan(client, zeros, (jnp.arange(count), weights, batches))
        finite = jnp.isfinite(losses).all(1)
        usable = (finite | (weights == 0)).all() & (weights.sum() > 0)
        # The last step's gradient is in no loss.
        usable &= jnp.stack([jnp.isfinite(t).all() for t in total.values()]).all()
        mean = {n: t / weights.sum() for n, t in total.items()}
        if server is None:
            updates, memory = {n: -x for n, x in mean.items()}, state.rule
        else:
            slope = {n: x / (own_rate * steps) for n, x in mean.items()}
            updates, memory = optimizer.update(slope, state.rule, leaves)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old)  # noqa: E731
        moved = keep(optax.apply_updates(leaves, updates), leaves)
        metrics = hj.Metrics(
            loss=jnp.where(weights > 0, weights * losses.mean(1), 0).sum() / weights.sum(),
            losses=losses,
            scalars=losses[..., None],
            record=jnp.where(usable, jnp.zeros((1, 1)), jnp.nan),
            learning_rate=rate,
            finite=finite,
        )
        params = trees.merge(state.params, moved)
        memory = keep(memory, state.rule)
        return hj.State(params, state.key, state.round + 1, memory), metrics

    config = dict(name=name, local_steps=steps, forward_passes=gradient.forward_passes)
    return Baseline(init, round, rate_at, config, chosen)


def _backward(
    loss: Callable[[trees.Leaves], jax.Array], x: trees.Leaves, key: jax.Array
) -> tuple[jax.Array, trees.Leaves]:
    del key
    return jax.value_and_grad(loss)(x)


def first_order(
    name: str,
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    local_steps: int = 1,
    trainable: trees.Trainable = None,
    client_learning_rate: optax.ScalarOrSchedule = 1e-2,
) -> Baseline:
    """FedAvg, FedAdam, FedYogi or FedAdagrad.

    The servers' gradient is the mean over clients of ``(x - x_c) / (K client_learning_rate)``:
    with one local step, the gradient.

    Args:
      name: ``"fedavg"`` or one of `SERVERS`.
      loss_fn: as of `hiso_jax.scalar_algorithm`, and differentiable.
      learning_rate: of the server's optimizer, of the clients' SGD for FedAvg; a float, or an
        optax schedule of the round.
      local_steps: K.
      trainable: mask, as in `hiso_jax.trees.select`.
      client_learning_rate: likewise of the clients' SGD where the server has an optimizer.
    """
    checks.choice("name", name, ("fedavg", *SERVERS))
    server, rate = SERVERS.get(name), None if name == "fedavg" else client_learning_rate
    gradient = _Gradient(_backward, forward_passes=3)
    return _build(name, loss_fn, learning_rate, gradient, server, rate, local_steps, trainable)


def fedzo(
    loss_fn: LossFn,
    learning_rate: optax.ScalarOrSchedule,
    *,
    local_steps: int = 1,
    num_perturbations: int = 5,
    smoothing: float = 1e-3,
    distribution: str = directions.DEFAULT,
    trainable: trees.Trainable = None,
) -> Baseline:
    """FedZO: clients estimate gradients with per-client directions, the server averages models."""
    law = directions.check_distribution(distribution)

    def gradient(
        loss: Callable[[trees.Leaves], jax.Array], x: trees.Leaves, key: jax.Array
    ) -> tuple[jax.Array, trees.Leaves]:
        noise = lambda p: directions.noise(jax.random.fold_in(key, p), x, law)  # noqa: E731
        estimate = estimators.forward_difference
        value, scalars = estimate(loss, x, noise, num_perturbations, smoothing)
        return value, estimators.reconstruct(scalars, noise, x)

    estimated = _Gradient(gradient, forward_passes=num_perturbations + 1)
    return _build("fedzo", loss_fn, learning_rate, estimated, None, None, local_steps, trainable)


def restore(folder: Path, algorithm: Any, state: hj.State) -> hj.State:
    """Return the state of the last snapshot that can be read, or `state` if there is none."""
    for path in sorted(folder.glob("round-*.safetensors"), reverse=True):
        if (found := snapshots.read(path, algorithm, state)) is not None:
            return found
    return state


class Traffic(traffic.Traffic):
    """Bytes of a baseline: the whole model down and up, whenever a client is asked."""

    def __init__(self, floats: int):
        super().__init__((1, floats))

    def catch_up(self, names: Sequence[str], round: int) -> None:
        """Account the model as it is at the start of `round`."""
        del round
        for name in names:
            self.down[name] = self.down.get(name, 0) + self.record_bytes


class Unrecorded:
    """In the place of a ledger where there is none: a run of a baseline cannot be replayed.

    It goes on from its last snapshot instead, and computes what came after it anew.
    """

    nbytes = 0

    def __init__(self, reported: list[dict[str, float]]):
        self.rounds, self.reported = len(reported), reported

    def __enter__(self) -> "Unrecorded":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def records(self) -> "Unrecorded":
        """Itself, who answered in every round."""
        return self

    def append(self, record: Any, digest: Any, rate: Any, reported: Any, event: Any = None) -> None:
        """Count a round."""
        del record, digest, rate, event
        self.rounds += 1
        self.reported.append(reported)

    def export(self, path: Path) -> int:
        """Nothing to ship."""
        del path
        return 0
