"""Snapshots: states on disk, so that a resumed run need not replay from its beginning.

They are a convenience: the ledger alone rebuilds every state, and says which snapshot
is good. One is written whole or not at all, and never trusted without its digest.
"""

import os
from pathlib import Path

import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from hiso_jax._engine import files, trees
from hiso_jax.ledger import digests
from hiso_jax.ledger.store import Ledger
from hiso_jax.protocol import Algorithm, State


def _path(folder: str | os.PathLike[str], round: int) -> Path:
    return Path(folder) / f"round-{round:08d}.safetensors"


def save(folder: str | os.PathLike[str], algorithm: Algorithm, state: State, keep: int = 2) -> Path:
    """Write what moves of a state (trainable leaves, rule state); delete all but the last `keep`.

    Returns:
      The path of the file, ``round-00000050.safetensors`` after fifty rounds.

    Raises:
      OSError: it cannot be written; the path is in the message.
    """
    path = _path(folder, int(state.round))
    moving = {"params": algorithm.trainable(state.params), "rule": state.rule}
    with files.atomic_write(path) as part:
        try:
            save_file({n: jnp.asarray(x) for n, x in trees.named(moving).items()}, part)
        except SafetensorError as error:  # how its writer says that the disk is full
            raise OSError(f"{path}: the snapshot cannot be written: {error}") from error
    for old in sorted(Path(folder).glob("round-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def restore(
    folder: str | os.PathLike[str], algorithm: Algorithm, state: State, ledger: Ledger
) -> State:
    """Return the latest state of the run that a snapshot holds, or `state` if none is good.

    Args:
      folder: of the snapshots; need not exist.
      algorithm: the run's.
      state: fresh from init; gives structure, and the leaves that are not trained.
      ledger: of the run; a snapshot must have the digest that it gives for its round.
    """
    wanted = ledger.records().digests
    for round in range(ledger.rounds, 0, -1):
        path, digest = _path(folder, round), wanted[round - 1]
        if digest is None or (found := read(path, algorithm, state)) is None:
            continue
        if digests.text(digests.digest(found)) == digest:
            return found
    return state


def read(path: Path, algorithm: Algorithm, state: State) -> State | None:
    """Return the state that a snapshot holds, unchecked; None if it is not there or is damaged.

    Args:
      path: as `save` returns it.
      algorithm: the run's; only ``trainable`` is used.
      state: fresh from init; gives structure, and the leaves that are not trained.
    """
    like = {"params": algorithm.trainable(state.params), "rule": state.rule}
    try:
        with safe_open(path, "flax") as tensors:
            leaves = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (OSError, SafetensorError, ValueError):
        return None
    moving = trees.merge(like, leaves)
    return state._replace(
        params=trees.merge(state.params, moving["params"]),
        round=jnp.asarray(int(path.stem.rpartition("-")[2]), jnp.int32),
        rule=moving["rule"],
    )
