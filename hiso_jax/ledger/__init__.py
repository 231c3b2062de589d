"""What stays of a run: the ledger of its records, its digests, and the models rebuilt from them."""

from hiso_jax.ledger.digests import digest
from hiso_jax.ledger.replay import Replay
from hiso_jax.ledger.store import Ledger, Records
from hiso_jax.ledger.tables import CorruptLedger, LedgerError, LedgerMismatch, LedgerWriteError

__all__ = ["CorruptLedger", "Ledger", "LedgerError", "LedgerMismatch", "LedgerWriteError",
           "Records", "Replay", "digest"]  # fmt: skip
