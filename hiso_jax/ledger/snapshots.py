"""Snapshots: states on disk, so that a resumed run need not replay from its beginning.

They are a convenience: the ledger alone rebuilds every state, and says which snapshot
is good. One is written whole or not at all, and never trusted without its digest.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors import flax as tensorfiles

from hiso_jax._engine import files, trees
from hiso_jax.ledger import digests
from hiso_jax.ledger.store import Ledger
from hiso_jax.protocol import Algorithm, State


def _path(folder: str | os.PathLike[str], round: int) -> Path:
    return Path(folder) / f"round-{round:08d}.safetensors"


def save(folder: str | os.PathLike[str], algorithm: Algorithm, state: State, keep: int = 2) -> Path:
    """Write what moves of a state (trainable leaves, rule state); delete all but the last `keep`.

    Those of later rounds are deleted as well: the run that they were of is not this one any more.
    So is what killed processes have left: the folder is one run's, which one process writes to.

    Returns:
      The path of the file, ``round-00000050.safetensors`` after fifty rounds.

    Raises:
      OSError: it cannot be written; the path is in the message.
    """
    path = _path(folder, int(state.round))
    with files.atomic_write(path) as part:
        began = part.stat().st_mtime_ns
        try:
            tensorfiles.save_file(_moving(algorithm, state), part)
        except SafetensorError as error:  # how its writer says that the disk is full
            raise OSError(f"{path}: the snapshot cannot be written: {error}") from error
    files.sweep(path.parent, began, ".round-*", ".tmp*")  # the latter are that writer's
    every = sorted(Path(folder).glob("round-*.safetensors"))
    before = [other for other in every if other <= path]
    for other in {*every} - {*before[-keep:]}:
        other.unlink()
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


def latest(folder: str | os.PathLike[str], algorithm: Algorithm, state: State) -> State:
    """Return the latest state that a snapshot holds, or `state` if there is none.

    For a client, which has no ledger to compare it with: it is unchecked, and whoever has the
    ledger must be told its digest before anything is done with it. Damaged files are passed over.

    Args:
      folder: of the snapshots; need not exist.
      algorithm: the run's.
      state: fresh from init; gives structure, and the leaves that are not trained.
    """
    kinds = lambda state: [(x.shape, x.dtype) for x in jax.tree.leaves(state)]  # noqa: E731
    for path in sorted(Path(folder).glob("round-*.safetensors"), reverse=True):
        found = read(path, algorithm, state)
        if found is not None and kinds(found) == kinds(state):
            return found
    return state


def _moving(algorithm: Algorithm, state: State) -> dict[str, jax.Array]:
    """What moves of a state, by name."""
    moving = {"params": algorithm.trainable(state.params), "rule": state.rule}
    return {name: jnp.asarray(x) for name, x in trees.named(moving).items()}


def size(algorithm: Algorithm, state: State) -> int:
    """Bytes of the numbers in a snapshot."""
    return sum(x.nbytes for x in _moving(algorithm, state).values())


def pack(algorithm: Algorithm, state: State) -> bytes:
    """A snapshot to be sent: the bytes of what `save` writes."""
    return tensorfiles.save(_moving(algorithm, state))


def unpack(content: bytes, round: int, algorithm: Algorithm, state: State) -> State:
    """The state after `round` rounds that `pack` made bytes of, unchecked.

    Args:
      content: what was received.
      round: of the state.
      algorithm: the run's.
      state: fresh from init; gives structure, and the leaves that are not trained.

    Raises:
      ValueError: it is no snapshot, or not of this structure.
    """
    try:
        leaves = tensorfiles.load(content)
    except SafetensorError as error:
        raise ValueError(f"content: not a snapshot: {error}") from None
    ours = _moving(algorithm, state)
    kinds = lambda leaves: {n: (x.shape, x.dtype) for n, x in leaves.items()}  # noqa: E731
    if kinds(leaves) != kinds(ours):
        raise ValueError("content: the snapshot's leaves are not those of this model and rule")
    return _placed(leaves, round, algorithm, state)


def read(path: Path, algorithm: Algorithm, state: State) -> State | None:
    """Return the state that a snapshot holds, unchecked; None if it is not there or is damaged.

    Args:
      path: as `save` returns it.
      algorithm: the run's; only ``trainable`` is used.
      state: fresh from init; gives structure, and the leaves that are not trained.
    """
    try:
        with safe_open(path, "flax") as tensors:
            leaves = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (OSError, SafetensorError, ValueError):
        return None
    return _placed(leaves, int(path.stem.rpartition("-")[2]), algorithm, state)


def _placed(leaves: dict[str, jax.Array], round: int, algorithm: Algorithm, state: State) -> State:
    """The state with what moves of it replaced."""
    like = {"params": algorithm.trainable(state.params), "rule": state.rule}
    moving = trees.merge(like, leaves)
    return state._replace(
        params=trees.merge(state.params, moving["params"]),
        round=jnp.asarray(round, jnp.int32),
        rule=moving["rule"],
    )
