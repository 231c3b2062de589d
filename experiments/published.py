"""DeComFL's published setting has a constant rate; the jobs' rates fall to 0."""

from typing import Any

import hiso_jax as hj


def constant(loss_fn: Any, learning_rate: Any, **options: Any) -> hj.Algorithm:
    """Momentum on the server at the peak rate: ``--method experiments.published:constant``."""
    return hj.scalar_algorithm(
        loss_fn, float(learning_rate(0)), rule=hj.rules.momentum(), **options
    )
