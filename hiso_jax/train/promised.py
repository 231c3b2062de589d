"""What a job's options promise of privacy: --secure, --epsilon, --delta and --clip."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from hiso_jax import privacy, secure


def terms(options: Any, draws: Iterable[list[str]], least: int = 0) -> privacy.Terms | None:
    """What the ledger of a run is to say, with the noise that its rounds need; None: nothing.

    Args:
      options: of a job, with ``secure``, ``epsilon``, ``delta``, ``clip``, ``clients_per_round``.
      draws: who is asked, round by round, which the public seed tells beforehand: the client that
        is drawn most must not give away more than epsilon.
      least: fewest clients that a masked sum is revealed of; by default two thirds.

    Raises:
      ImportError: a budget needs the extra ``dp``.
      ValueError: no noise that fits in 64 bits keeps it.
    """
    if options.epsilon is None:
        return privacy.Terms(masked=True) if options.secure else None
    asked = options.clients_per_round
    most = max(Counter(name for names in draws for name in names).values())
    noise = privacy.calibrate(options.epsilon, options.delta, rounds=most, clients=asked,
                              asked=asked, own_rounds=most)  # fmt: skip
    if options.secure:
        mechanism = privacy.distributed(options.clip, noise, clients=asked,
                                        least=least or secure.two_thirds(asked))  # fmt: skip
    else:
        mechanism = privacy.central(options.clip, noise, clients=asked)
    return privacy.Terms.of(mechanism, options.epsilon, options.delta)
