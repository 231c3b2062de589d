"""What a federated algorithm is: functions, the state they fold, and what may be looked at."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypedDict

import jax
import jax.numpy as jnp

from hiso_jax import aggregators, estimators, rules
from hiso_jax._engine import exact, renamed, trees
from hiso_jax._engine.shapes import Array, Bool, Float, Index, Integer, Key
from hiso_jax.estimators import LossFn as LossFn
from hiso_jax.split import Split


class State(NamedTuple):
    """What every party holds; a function of the initial state and the records alone."""

    params: trees.Params  # any pytree
    key: Key[Array, ""]  # root PRNG key, never changes
    round: Integer[Array, ""]  # int32: rounds advanced so far
    rule: rules.RuleState  # the rule's state, float32 leaves by name


@dataclasses.dataclass(frozen=True)  # what jax.jit may be given is no tuple
class Rate:
    """The learning rate of a round: a number, or an optax schedule.

    Attributes:
      value: the number or the schedule; None: a schedule of which only the values are known.
    """

    value: Any

    def __call__(self, round: Index) -> Float[Array, ""]:
        """The learning rate of a round, float32."""
        if self.value is None:
            raise ValueError("learning_rate: needed, since it follows a schedule; got None")
        if not callable(self.value):
            return jnp.asarray(self.value, jnp.float32)
        with exact.usual_types():
            return self._scheduled(round)

    @functools.cached_property
    def _scheduled(self) -> Callable[[Index], Float[Array, ""]]:
        # One program for all rounds: what is compiled alone would be compiled anew at each call.
        rate = lambda round: jnp.asarray(self.value(round), jnp.float32)  # noqa: E731
        return jax.jit(lambda round: exact.compiled_alone(rate, round))

    @property
    def config(self) -> Any:
        """The number; ``"schedule"`` for a schedule, whose values are in the records then."""
        return "schedule" if self.value is None or callable(self.value) else self.value

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The inverse of `config`."""
        return cls(None if config == "schedule" else config)


class Metrics(NamedTuple):
    """What a simulation may look at after a round. Only `record` exists outside one."""

    loss: Float[Array, ""]  # mean of `losses` over the clients that count
    losses: Float[Array, "C K"]  # loss of each client at its own parameters; never sent
    scalars: Float[Array, "C K P"]  # what each client sent
    record: Float[Array, "K S"]  # what everybody applied; NaN if nobody counted
    learning_rate: Float[Array, ""]  # what everybody applied it with
    finite: Bool[Array, "C"]  # the client's scalars are all finite


class Algorithm(NamedTuple):
    """A federated algorithm as pure functions; C clients, K local steps, P perturbations.

    Attributes:
      init: ``(params, key) -> State``.
      probe: ``(state, batches, slot=0) -> scalars [C, K, P]``; batch leaves are [C, K, ...].
        `slot` is the first client's place among those asked; with per-client directions it matters.
      aggregate: ``(scalars [C, K, P], weights [C] or None) -> record [K, S]``; S is P, or C P with
        per-client directions.
      advance: ``(state, record [K, S], learning_rate=None) -> State``. The rate of a schedule
        is itself computed; a party whose schedule might round differently, or that has none,
        is given the value.
      round: ``(state, batches, weights=None) -> (State, Metrics)``: all of the above in
        one program; the one to jit in a simulation.
      replay: ``(state, records [R, K, S], learning_rates=None) -> State``: the fold of `advance`.
      learning_rate: ``round -> float32``, what `advance` takes by default.
      config: every hyper-parameter by name, as data: what a `hiso_jax.Ledger` writes down.
      trainable: ``params -> Leaves``: the leaves that are trained, by name.
      spec: what it was made of: a `hiso_jax.algorithm.Spec`, from which another can be made.
    """

    init: Callable[..., State]
    probe: Callable[..., Float[Array, "C K P"]]
    aggregate: Callable[..., Float[Array, "K S"]]
    advance: Callable[..., State]
    round: Callable[..., tuple[State, Metrics]]
    replay: Callable[..., State]
    learning_rate: Callable[[Index], Float[Array, ""]]
    config: dict[str, Any]
    trainable: Callable[[trees.Params], trees.Leaves]
    spec: Any = None
    recipe = renamed.attribute("recipe", "config")


class Options(TypedDict, total=False):
    """What every algorithm takes by keyword; explained at `scalar_algorithm`."""

    estimator: str | estimators.Difference
    aggregator: aggregators.Aggregator | aggregators.Function | None
    local_steps: int
    num_perturbations: int
    smoothing: float
    distribution: str
    trainable: trees.Trainable
    nonfinite: str
    seed_pool: int | None
    per_client_directions: int | None
    upper: Split | Sequence[Split] | None
    lazy: bool
