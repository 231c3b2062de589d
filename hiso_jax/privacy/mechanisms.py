"""Who adds the noise: a server that is trusted, all clients together, or each for itself.

A `Mechanism` bounds what one client can change, and says how much noise hides it. `Terms` are a
mechanism, the grid it works on and the budget: what a ledger's header says of privacy.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Self

import numpy as np

from hiso_jax._engine import checks
from hiso_jax.privacy import fixed, noise
from hiso_jax.privacy.fixed import Grid

FINEST = 2**8
"""Standard deviation of a party's noise in steps, at least: sums of it are then alike."""


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Clipping and noise, of `central`, `distributed` or `local`.

    Attributes:
      kind: who adds the noise: ``"central"``, ``"distributed"`` or ``"local"``.
      clip: largest L2 norm of a client's scalars of a round.
      noise_multiplier: standard deviation of the noise over `clip`: on the sum; of a local
        mechanism, on each client's scalars.
      clients: what the sum is divided by: the number that is expected to answer.
      relation: ``"zero_out"``: a client's scalars may be zeros instead, sensitivity `clip`;
        ``"replace_one"``: any others, twice that.
      rate: chance of a client to be in a round by the server's secret draw; None where it is
        known who takes part.
      least: fewest clients of whose sum a distributed mechanism reveals: each adds 1 / least of
        the noise's variance.
    """

    kind: str
    clip: float
    noise_multiplier: float
    clients: int
    relation: str = "zero_out"
    rate: float | None = None
    least: int = 1

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, ("central", "distributed", "local"))
        checks.choice("relation", self.relation, ("zero_out", "replace_one"))
        checks.number("clip", self.clip, 0, above=True)
        checks.number("noise_multiplier", self.noise_multiplier, 0, 1e6, above=True)
        checks.count("clients", self.clients)
        checks.count("least", self.least)
        if self.rate is not None:
            checks.number("rate", self.rate, 0, 1, above=True)
            if self.kind != "central":
                raise ValueError(
                    f"rate: a secret draw hides nothing from whom asks; a {self.kind} mechanism "
                    "protects from the server too, so it is accounted without one"
                )

    @property
    def event(self) -> dict[str, Any]:
        """What a round releases, for the accountant."""
        both = 1 if self.relation == "zero_out" else 2
        known = {"noise": self.noise_multiplier / both, "participation": "known"}
        return (
            known if self.rate is None else known | {"participation": "poisson", "rate": self.rate}
        )

    def variance(self, grid: Grid) -> int:
        """Of the noise that one party adds, in steps squared, rounded up.

        Raises:
          ValueError: it is too small for the grid's step, or too large for 64 bits.
        """
        share = self.least if self.kind == "distributed" else 1
        whole = (Fraction(self.noise_multiplier) * Fraction(self.clip) / Fraction(grid.step)) ** 2
        variance = math.ceil(whole / share)
        if not FINEST**2 <= variance <= 2**84:
            raise ValueError(
                f"step: the noise of one party has a standard deviation of {variance**0.5:.3g} "
                f"steps, expected {FINEST} to 2^42; take another step than {grid.step:g}"
            )
        return variance


def central(clip: float, noise_multiplier: float, *, clients: int, relation: str = "zero_out",
            rate: float | None = None) -> Mechanism:  # fmt: skip
    """The server, which is trusted, clips and adds noise to the sum before anybody sees it.

    Args:
      clip: largest L2 norm of a client's scalars.
      noise_multiplier: standard deviation of the noise on the sum over `clip`.
      clients: expected number in a round, which the sum is divided by.
      relation: ``"zero_out"`` or ``"replace_one"``.
      rate: of a secret Poisson draw (`draw`); None if it is known who takes part.

    Example:
      >>> central(1.0, 4.0, clients=50).event
      {'noise': 4.0, 'participation': 'known'}
    """
    return Mechanism("central", clip, noise_multiplier, clients, relation, rate)


def distributed(clip: float, noise_multiplier: float, *, clients: int, least: int,
                relation: str = "zero_out") -> Mechanism:  # fmt: skip
    """Each client adds its share of the noise under its masks; nobody has to be trusted alone.

    The sum of `least` shares has the noise that is claimed; of fewer nothing is revealed. Against
    m clients that tell the server their noise, take ``least`` smaller by m than what answers.

    Args:
      clip: largest L2 norm of a client's scalars.
      noise_multiplier: standard deviation of the noise on the sum over `clip`.
      clients: expected number in a round, which the sum is divided by.
      least: fewest honest clients in a sum.
      relation: ``"zero_out"`` or ``"replace_one"``.

    Example:
      >>> distributed(1.0, 4.0, clients=50, least=40, relation="replace_one").event
      {'noise': 2.0, 'participation': 'known'}
    """
    return Mechanism("distributed", clip, noise_multiplier, clients, relation, None, least)


def local(clip: float, noise_multiplier: float, *, clients: int) -> Mechanism:
    """Each client adds all the noise that it needs; its own scalars may be seen.

    Args:
      clip: largest L2 norm of a client's scalars.
      noise_multiplier: standard deviation of the noise of a client over `clip`.
      clients: expected number in a round, which the sum is divided by.

    Example:
      >>> local(1.0, 4.0, clients=50).event  # any data for any other
      {'noise': 2.0, 'participation': 'known'}
    """
    return Mechanism("local", clip, noise_multiplier, clients, "replace_one")


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a run promises: the ``privacy`` of a ledger's header.

    Attributes:
      grid: what integers stand for.
      mechanism: None: sums are exact and show what they show.
      masked: replies are masked, and the server sees their sum only (`hiso_jax.secure`).
      epsilon: budget of the run; None for no limit.
      delta: of the budget.

    Example:
      >>> terms = Terms.of(central(2.0, 5.0, clients=10), epsilon=8.0)
      >>> Terms.from_config(terms.config) == terms, terms.grid.step == 2.0**-19
      (True, True)
    """

    grid: Grid = dataclasses.field(default_factory=Grid)
    mechanism: Mechanism | None = None
    masked: bool = False
    epsilon: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        checks.number("delta", self.delta, 0, 1, above=True, below=True)
        mechanism = self.mechanism
        if self.epsilon is not None:
            checks.number("epsilon", self.epsilon, 0, above=True)
            if mechanism is None:
                raise ValueError("epsilon: a budget needs a mechanism, got none")
        if mechanism is None:
            return
        mechanism.variance(self.grid)
        if mechanism.clip > self.grid.bound:
            raise ValueError(f"clip: expected at most the grid's bound {self.grid.bound:g}, got "
                             f"{mechanism.clip:g}")  # fmt: skip
        if mechanism.kind == "distributed" and not self.masked:
            raise ValueError("masked: a distributed mechanism's shares of noise hide nothing in "
                             "replies that are not masked; expected True, got False")  # fmt: skip
        if mechanism.kind == "central" and self.masked:
            raise ValueError("masked: a central mechanism clips what it sees; masked replies need "
                             "a distributed one")  # fmt: skip
        if self.grid.max_weight != 1:
            raise ValueError(
                f"max_weight: weights would multiply what one client can change; under a "
                f"mechanism expected 1, got {self.grid.max_weight}"
            )

    @classmethod
    def of(cls, mechanism: Mechanism, epsilon: float | None = None, delta: float = 1e-5) -> Self:
        """Terms with a grid of about a millionth of the clip."""
        step = 2.0 ** (math.frexp(mechanism.clip)[1] - 1 - 20)
        grid = Grid(step, 2.0 * mechanism.clip, 2**20)
        return cls(grid, mechanism, mechanism.kind == "distributed", epsilon, delta)

    def check(self, spec: Any) -> None:
        """Raise unless an algorithm's records are what these terms are about.

        Args:
          spec: a `hiso_jax.Spec`.

        Clients with directions of their own are warned about: their scalars are never added up, so
        each client's have all the noise that a sum would have had, and the same epsilon.

        Raises:
          ValueError: its aggregator is no mean: a median or Krum depends on single clients in
            ways that no noise on a sum hides; or clients have directions of their own, and only a
            sum is protected.
        """
        if (name := spec.combine.aggregator.config) != "mean()" and (
            spec.directions.clients is None
        ):
            raise ValueError(f"aggregator: only sums are added up on a grid, so it has to be "
                             f"mean(), got {name}")  # fmt: skip
        if spec.directions.clients is None:
            return
        if self.masked or self.mechanism is None or self.mechanism.rate is not None:
            raise ValueError(
                f"per_client_directions: scalars of {spec.directions.clients} clients with "
                "directions of their own are never added up, so a mask hides nothing, and their "
                "places show whom a secret draw has drawn; use shared directions and a larger "
                "num_perturbations"
            )
        warnings.warn(
            "per_client_directions: every client's scalars are released by themselves, each with "
            "the noise of a whole sum; at the same epsilon shared directions have as many times "
            "the squared signal over noise as clients take part",
            UserWarning, stacklevel=3,
        )  # fmt: skip

    def contribute(
        self, scalars: Any, *, client: str, round: int, secret: bytes | None = None, weight: Any = 1
    ) -> np.ndarray:
        """What a client gives to the sum: clipped, on the grid, with its share of noise.

        The same scalars give the same noise in the same round again.

        Args:
          scalars: [K, P], finite.
          client: its name.
          round: its number.
          secret: the client's own of this run, from `hiso_jax.privacy.of_run`, if it adds noise.
          weight: must be 1 under a mechanism.

        Returns:
          int64 [K P + 1].

        Raises:
          ValueError: scalars, weight or secret are out of range; names the client.
        """
        secret_of = lambda name: secret  # noqa: E731
        given = np.asarray(scalars)[None]
        return self.contribute_all(given, [client], round, secret_of, [weight])[0]

    def contribute_all(
        self,
        scalars: Any,
        clients: Sequence[str],
        round: int,
        secret_of: Callable[[str], bytes | None],
        weights: Sequence[Any],
    ) -> list[np.ndarray]:
        """`contribute` of many clients at once, where one machine has them all.

        Args:
          scalars: [C, K, P], finite.
          clients: names, [C].
          round: its number.
          secret_of: a client's secret of this run by its name, asked if it adds noise.
          weights: [C].
        """
        mechanism = self.mechanism
        if mechanism is None:
            return [self.grid.encode(*one) for one in zip(scalars, weights, clients, strict=True)]
        for client, weight in zip(clients, weights, strict=True):
            if weight != 1:
                raise ValueError(
                    f"weight: client {client!r}: weights multiply what one client can "
                    f"change; under a mechanism expected 1, got {weight!r}"
                )
        whole = fixed.clip_all(scalars, mechanism.clip, self.grid, clients)
        if mechanism.kind == "central":
            return list(whole)
        return [
            self._noised(own, secret_of(client), b"client", client.encode(), round)
            for own, client in zip(whole, clients, strict=True)
        ]

    def release(
        self, total: np.ndarray, *, round: int, secret: bytes | None = None, client: str = ""
    ) -> np.ndarray:
        """The sum that may be shown, int64 [K P + 1]; a central mechanism adds its noise.

        Args:
          total: int64 [K P + 1].
          round: its number.
          secret: the server's of this run, from `hiso_jax.privacy.of_run`.
          client: whose it is, where it is no sum: directions of the clients' own.
        """
        if self.mechanism is None or self.mechanism.kind != "central":
            return total
        return self._noised(total, secret, b"server", client.encode(), round)

    def decode(self, total: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The record of a released sum, float32 [K, P].

        Under a mechanism it is divided by the expected number of clients, since the true one
        would be another release.
        """
        divisor = None if self.mechanism is None else self.mechanism.clients
        return self.grid.decode(total, shape, divisor)

    @property
    def kind(self) -> str | None:
        """Who adds noise; None: nobody."""
        return None if self.mechanism is None else self.mechanism.kind

    @property
    def least(self) -> int:
        """Fewest clients of whose sum anything may be revealed; 0: as the masks have it."""
        return 0 if self.mechanism is None else self.mechanism.least

    def check_sum(self, total: np.ndarray, clients: int) -> None:
        """Raise ValueError unless so many clients, with their noise, could have made a sum."""
        self.grid.check_sum(total, clients, clients * self.noise_bound)

    @property
    def noise_bound(self) -> int:
        """What the noise of one client may add to a number, but for a chance below 1e-800."""
        if self.mechanism is None or self.mechanism.kind == "central":
            return 0
        return 64 * math.isqrt(self.mechanism.variance(self.grid))

    def _noised(
        self, whole: np.ndarray, secret: bytes | None, who: bytes, name: bytes, round: int
    ) -> np.ndarray:
        assert self.mechanism is not None
        key = noise.check_secret("secret", secret)
        variance = self.mechanism.variance(self.grid)
        # Two sizes of one noise, of runs that share a secret, would show what both hide.
        about = f"{round} {variance}".encode()
        purpose = (b"hiso-noise", who, name, about, whole.astype("<i8").tobytes())
        drawn = noise.discrete_gaussian(noise.Bits(key, *purpose), variance, len(whole) - 1)
        return whole + np.append(drawn, 0)

    @property
    def config(self) -> dict[str, Any]:
        """As data, for a ledger's header."""
        mechanism = None if self.mechanism is None else dataclasses.asdict(self.mechanism)
        return dict(grid=self.grid.config, mechanism=mechanism, masked=self.masked,
                    epsilon=self.epsilon, delta=self.delta)  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of `config`."""
        mechanism = config["mechanism"]
        return cls(Grid.from_config(config["grid"]),
                   None if mechanism is None else Mechanism(**mechanism),
                   bool(config["masked"]), config["epsilon"], config["delta"])  # fmt: skip


def draw(names: Iterable[str], rate: float, *, round: int, secret: bytes) -> list[str]:
    """Who takes part in a round: each by a coin of its own, which only the secret's owner knows.

    Args:
      names: of all clients.
      rate: chance of each, in (0, 1].
      round: its number.
      secret: the server's of this run, from `hiso_jax.privacy.of_run`.

    Example:
      >>> drawn = draw(map(str, range(1000)), 0.1, round=0, secret=bytes(range(32)))
      >>> 60 < len(drawn) < 140
      True
    """
    checks.number("rate", rate, 0, 1, above=True)
    key = noise.check_secret("secret", secret)
    below = Fraction(rate) * 2**64
    coin = lambda name: noise.Bits(key, b"hiso-draw", str(round).encode(), name.encode()).bits(64)  # noqa: E731
    return [name for name in checks.clients("names", names) if coin(name) < below]
