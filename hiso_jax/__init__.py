"""Federated zeroth-order fine-tuning in which clients send only scalars.

Modules that are not imported here (``models``, ``tasks``, ``simulation``, ``replay`` and more) are
when they are first asked for: those of models and tasks take seconds.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from hiso_jax import (
    aggregators,
    directions,
    estimators,
    exact,
    fingerprint,
    lazy,
    meshes,
    pool,
    privacy,
    rules,
    server,
    trees,
)
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
from hiso_jax.exact import compiler_options
from hiso_jax.fingerprint import digest
from hiso_jax.ledger import CorruptLedger, Ledger, LedgerError, LedgerMismatch, LedgerWriteError
from hiso_jax.protocol import Algorithm, Metrics, State
from hiso_jax.split import Split, Upper
from hiso_jax.transform import hiso, scale_by_zeroth_order, value_and_grad, zo_sgd

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
    "directions",
    "estimators",
    "exact",
    "federated_hiso",
    "fedkseed",
    "fingerprint",
    "fzoo",
    "hiso",
    "hizoo",
    "lazy",
    "meazo",
    "meshes",
    "mezo",
    "pool",
    "privacy",
    "rules",
    "scalar_algorithm",
    "scale_by_zeroth_order",
    "server",
    "trees",
    "value_and_grad",
    "zo_sgd",
]


def __getattr__(name: str) -> ModuleType:
    """Import a module of this package that is not imported yet (PEP 562)."""
    path = f"{__name__}.{name}"
    if name.isidentifier() and not name.startswith("_") and importlib.util.find_spec(path):
        return importlib.import_module(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
