"""What the rounds of a run add up to: epsilon of the events in a ledger, and noise for an epsilon.

An event is what one round has released, as plain data in the ledger's row of that round. The
accountant sees nothing else, so a run that was resumed, a replay and an audit find the same
epsilon.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from hiso_jax._engine import checks, extras

Event = Mapping[str, Any]
"""``{"noise": z, "participation": "known"}``, or ``"poisson"`` with its ``"rate"``: a Gaussian
mechanism whose standard deviation is z sensitivities."""


History = frozenset[tuple[tuple[float, float], int]]
"""((noise in sensitivities, chance of taking part), number of such rounds)."""


class BudgetSpent(RuntimeError):
    """The next round would give away more than the run may."""


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError:
        raise ImportError(extras.needs("accounting", "dp-accounting", "dp")) from None
    return dp_accounting


def check_event(event: Event) -> None:
    """Raise ValueError unless an event is one that the accountant knows."""
    kinds = {"known": {"noise", "participation"}, "poisson": {"noise", "participation", "rate"}}
    if event.keys() != kinds.get(event.get("participation", ""), None):
        raise ValueError(f"event: expected noise, participation 'known' or 'poisson', and for the "
                         f"latter its rate, got {dict(event)}")  # fmt: skip
    checks.number("event: noise", event["noise"], 0, above=True)
    if "rate" in event:
        checks.number("event: rate", event["rate"], 0, 1, above=True)


def _item(event: Event) -> tuple[float, float]:
    return float(event["noise"]), float(event.get("rate", 1.0))


def _longer(history: History, item: tuple[float, float]) -> History:
    """A history with one more round."""
    rounds = dict(history)
    return frozenset((rounds | {item: rounds.get(item, 0) + 1}).items())


def epsilon_of(rounds: Mapping[tuple[float, float], int], delta: float) -> float:
    """Epsilon of Gaussian mechanisms, by Renyi divergences.

    Args:
      rounds: (noise in sensitivities, chance of taking part) -> how many.
      delta: in (0, 1).

    Raises:
      ImportError: without the extra ``dp``.

    Example:
      >>> round(epsilon_of({(11.6, 1.0): 100}, 1e-5), 1), epsilon_of({}, 1e-5)
      (4.0, 0.0)
    """
    checks.number("delta", delta, 0, 1, above=True, below=True)
    if not rounds:
        return 0.0
    library = _library()
    accountant = library.rdp.RdpAccountant()
    # It warns of every order that it leaves out, dozens a look; others give the bound.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return _composed(library, accountant, rounds, delta)
    finally:
        logger.setLevel(level)


def _composed(
    library: Any, accountant: Any, rounds: Mapping[tuple[float, float], int], delta: float
) -> float:
    for (noise, rate), count in sorted(rounds.items()):
        event = library.GaussianDpEvent(noise)
        if rate < 1:
            event = library.PoissonSampledDpEvent(rate, event)
        accountant.compose(library.SelfComposedDpEvent(event, count))
    return float(accountant.get_epsilon(delta))


class Accountant:
    """What each client has given away so far.

    Where everybody knows who took part, a client is charged for its own rounds only, and the
    run's epsilon is that of the client with most. Where the draw is secret, each is charged for
    all rounds, each by its chance of taking part.

    Args:
      delta: of (epsilon, delta)-differential privacy.

    Example:
      >>> accountant = Accountant(1e-5)
      >>> for names in (["ann", "bob"], ["ann"]):
      ...     accountant.spend({"noise": 8.0, "participation": "known"}, names)
      >>> accountant.epsilon() == epsilon_of({(8.0, 1.0): 2}, 1e-5), accountant.most
      (True, ['ann'])
    """

    def __init__(self, delta: float = 1e-5):
        self.delta = float(checks.number("delta", delta, 0, 1, above=True, below=True))
        self._own: dict[str, History] = {}
        self._lived: Counter[History] = Counter()  # how many clients have each
        self._all: History = frozenset()
        self._known: dict[History, float] = {}

    @classmethod
    def of(
        cls, events: Iterable[Event | None], reported: Iterable[Iterable[str]], delta: float = 1e-5
    ) -> "Accountant":
        """The accountant of rounds that are recorded.

        Args:
          events: of each round, as ``ledger.events()`` gives them; None: nothing was released.
          reported: names of each round, as ``ledger.records().reported``.
          delta: as of `Accountant`.
        """
        accountant = cls(delta)
        for event, names in zip(events, reported, strict=True):
            if event is not None:
                accountant.spend(event, names)
        return accountant

    def spend(self, event: Event, names: Iterable[str]) -> None:
        """Charge a round to those who took part, or to all if the draw is secret."""
        check_event(event)
        item = _item(event)
        if event["participation"] == "poisson":
            self._all = _longer(self._all, item)
            return
        after: dict[History, History] = {}
        for name in names:
            before = self._own.get(name, frozenset())
            if before not in after:
                after[before] = _longer(before, item)
            self._own[name] = after[before]
            self._lived[before] -= bool(before)
            self._lived[after[before]] += 1
        self._lived = +self._lived

    def epsilon(self, event: Event | None = None, names: Iterable[str] = ()) -> float:
        """Epsilon so far; or what it would be after one more round."""
        all_, lived = self._all, set(self._lived)
        if event is not None:
            check_event(event)
            if event["participation"] == "poisson":
                all_ = _longer(all_, _item(event))
            else:  # one more round never takes anything back: those before may stay
                before = {self._own.get(name, frozenset()) for name in names}
                lived |= {_longer(own, _item(event)) for own in before}
        return max(self._epsilon(own, all_) for own in lived or {frozenset()})

    @property
    def most(self) -> list[str]:
        """The clients that have given away most, where it is known who took part."""
        top = self.epsilon()
        return [name for name, own in self._own.items() if self._epsilon(own, self._all) == top]

    def _epsilon(self, own: History, all_: History) -> float:
        rounds = dict(Counter(dict(own)) + Counter(dict(all_)))
        if (key := frozenset(rounds.items())) not in self._known:
            self._known[key] = epsilon_of(rounds, self.delta)
        return self._known[key]

    def check(self, event: Event, names: Iterable[str], budget: float) -> None:
        """Raise BudgetSpent if one more round of these would exceed the budget."""
        names = list(names)
        after = self.epsilon(event, names)
        if after > budget:
            raise BudgetSpent(f"one more round with {len(names)} clients would make epsilon "
                              f"{after:.4g} at delta {self.delta:g}; the budget is {budget:g}, and "
                              f"{self.epsilon():.4g} of it is spent")  # fmt: skip


def calibrate(
    epsilon: float,
    delta: float = 1e-5,
    *,
    rounds: int,
    clients: int,
    asked: int,
    participation: str = "known",
    own_rounds: int | None = None,
) -> float:
    """The smallest noise, in sensitivities, with which a run stays within epsilon.

    Args:
      epsilon: > 0.
      delta: in (0, 1).
      rounds: of the run.
      clients: of whom some are asked.
      asked: clients a round.
      participation: ``"known"``: everybody may know who takes part, and a client answers for
        its own rounds only. ``"poisson"``: nobody but the server does, each takes part by a
        secret draw of its own with chance ``asked / clients``.
      own_rounds: most rounds of a client, if known; by default those of
        ``federation.draw(balanced=True)``: one in every ``clients // asked`` rounds. A random draw
        gives some clients more.

    Example:
      >>> given = dict(rounds=300, clients=1000, asked=50)
      >>> [round(calibrate(8.0, participation=p, **given), 1) for p in ("known", "poisson")]
      [2.5, 0.9]
    """
    checks.number("epsilon", epsilon, 0, above=True)
    checks.number("delta", delta, 0, 1, above=True, below=True)
    for name, value in (("rounds", rounds), ("clients", clients), ("asked", asked)):
        checks.count(name, value)
    if asked > clients:
        raise ValueError(f"asked: expected at most clients={clients}, got {asked}")
    checks.choice("participation", participation, ("known", "poisson"))
    if participation == "poisson":
        if own_rounds is not None:
            raise ValueError("own_rounds: nobody knows them where participation is poisson")
        count, rate = rounds, asked / clients
    else:
        count = math.ceil(rounds / (clients // asked)) if own_rounds is None else own_rounds
        checks.count("own_rounds", count)
        rate = 1.0
    low, high = 0.1, 1.0
    while epsilon_of({(high, rate): count}, delta) > epsilon:
        low, high = high, 2 * high
        if high > 1e9:
            raise ValueError(f"epsilon: no noise reaches {epsilon} in {count} rounds")
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        if epsilon_of({(middle, rate): count}, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high
