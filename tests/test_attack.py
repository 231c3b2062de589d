"""A distinguishing attack: below what is claimed, and above it with half the noise.

It knows nothing of the mechanisms' formulas: it sees thousands of released sums, of a set of
clients and of the same without one (or with one replaced), and looks for the best cut between the
two on half of them; what the cut tells apart is counted on the other half. A mechanism that is
(epsilon, delta)-private bounds it: P(told | with) <= exp(epsilon) P(told | without) + delta.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dp_accounting", reason="needs the extra dp")

from hiso_jax import privacy

DELTA, COUNT = 0.01, 2500
MECHANISMS = {
    "central": privacy.central(1.0, 2.0, clients=3),
    "distributed": privacy.distributed(1.0, 2.0, clients=3, least=3),
    "local": privacy.local(1.0, 4.0, clients=1),
}


def sums(terms: privacy.Terms, last: float, who: bytes) -> np.ndarray:
    """What is released in COUNT rounds of the same clients; the last one's scalar is `last`."""
    assert terms.mechanism is not None
    scalars = [last] if terms.mechanism.kind == "local" else [0.3, -0.6, last]
    out = np.empty(COUNT)
    for round in range(COUNT):
        vectors = [
            terms.contribute([[s]], client=f"{i}", round=round, secret=who * 32 + bytes([i]))
            for i, s in enumerate(scalars)
        ]
        total = terms.release(terms.grid.add(vectors), round=round, secret=who * 32 + b"server")
        out[round] = terms.decode(total, (1, 1))[0, 0]
    return out


def excess(terms: privacy.Terms, epsilon: float) -> tuple[float, float]:
    """The largest P(told | with) - exp(epsilon) P(told | without), and its standard error."""
    both = terms.mechanism is not None and terms.mechanism.relation == "replace_one"
    # What one client can change most: a scalar at the clip for none, or for its opposite.
    near, far = sums(terms, 50.0, b"n"), sums(terms, -50.0 if both else 0.0, b"f")
    half = COUNT // 2
    cuts = np.quantile(near[:half], np.linspace(0.01, 0.99, 99))
    worth = [(near[:half] > c).mean() - np.exp(epsilon) * (far[:half] > c).mean() for c in cuts]
    cut = cuts[int(np.argmax(worth))]
    told, wrong = (near[half:] > cut).mean(), (far[half:] > cut).mean()
    error = np.sqrt((told * (1 - told) + np.exp(2 * epsilon) * wrong * (1 - wrong)) / half)
    return float(told - np.exp(epsilon) * wrong), float(error)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_attack_stays_below_the_claim_and_is_above_it_with_half_the_noise(name: str):
    mechanism = MECHANISMS[name]
    accountant = privacy.Accountant(DELTA)
    accountant.spend(mechanism.event, ["2"])
    epsilon = accountant.epsilon()
    found, error = excess(privacy.Terms.of(mechanism), epsilon)
    assert found <= DELTA + 3 * error
    half: Any = dataclasses.replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
    found, error = excess(privacy.Terms.of(half), epsilon)
    assert found > DELTA + 3 * error  # the attack would have seen it
