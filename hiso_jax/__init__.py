"""Federated zeroth-order fine-tuning in which clients send only scalars.

Modules that are not imported here (``models``, ``tasks``, ``federation``, ``train`` and more) are
when they are first asked for: those of models and tasks take seconds.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

from hiso_jax import aggregators, directions, estimators, privacy, rules
from hiso_jax._engine import exact, extras, lazy, meshes, trees
from hiso_jax._engine.exact import compiler_options
from hiso_jax.algorithm import Spec
from hiso_jax.algorithms import (
    decomfl,
    federated_hiso,
    fedkseed,
    fzoo,
    hizoo,
    meazo,
    mezo,
    scalar_algorithm,
)
from hiso_jax.ledger import (
    CorruptLedger,
    Ledger,
    LedgerError,
    LedgerMismatch,
    LedgerWriteError,
    digest,
)
from hiso_jax.protocol import Algorithm, Metrics, State
from hiso_jax.split import Split, Upper
from hiso_jax.transform import hiso, scale_by_zeroth_order, value_and_grad, zo_sgd

if TYPE_CHECKING:  # imported when asked for, see below
    from hiso_jax import federation as simulation
    from hiso_jax.federation import server
    from hiso_jax.ledger import digests, pool, replay, snapshots

__all__ = [
    "Algorithm",
    "CorruptLedger",
    "Ledger",
    "LedgerError",
    "LedgerMismatch",
    "LedgerWriteError",
    "Metrics",
    "Spec",
    "Split",
    "State",
    "Upper",
    "aggregators",
    "compiler_options",
    "decomfl",
    "digest",
    "digests",
    "directions",
    "estimators",
    "exact",
    "federated_hiso",
    "fedkseed",
    "fzoo",
    "hiso",
    "hizoo",
    "lazy",
    "meazo",
    "meshes",
    "mezo",
    "pool",
    "privacy",
    "replay",
    "rules",
    "scalar_algorithm",
    "scale_by_zeroth_order",
    "server",
    "simulation",
    "snapshots",
    "trees",
    "value_and_grad",
    "zo_sgd",
]

_SHORT = {
    "digests": "ledger.digests",
    "fingerprint": "ledger.digests",  # its name until 0.2
    "pool": "ledger.pool",
    "replay": "ledger.replay",
    "server": "federation.server",
    "simulation": "federation",
    "snapshots": "ledger.snapshots",
}
"""Modules of a folder that are public under a name of their own."""


def __getattr__(name: str) -> ModuleType:
    """Import a module of this package that is not imported yet (PEP 562)."""
    path = f"{__name__}.{_SHORT.get(name, name)}"
    if name.isidentifier() and not name.startswith("_") and importlib.util.find_spec(path):
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if name not in ("models", "tasks", "train") or "hiso_jax" in str(error.name):
                raise
            needed = extras.needs(f"hiso_jax.{name}", str(error.name), name)
            raise ModuleNotFoundError(needed, name=error.name) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(
        {*globals(), *_SHORT, *(module.name for module in pkgutil.iter_modules(__path__))}
    )
