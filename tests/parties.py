"""Sites of a small run without a network, or behind one; `tests.parties:party` is their factory."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.ledger import header
from hiso_jax.nvflare import parties
from tests.helpers import PROBLEMS, quadratic_loss

NAMES = ["site-1", "site-2", "site-3"]
BATCH = 1


def algorithm(local_steps: int = 1, **options: Any) -> hj.Algorithm:
    given: dict[str, Any] = dict(local_steps=local_steps, num_perturbations=2) | options
    return hj.federated_hiso(quadratic_loss, 0.05, **given)


def begin(alg: hj.Algorithm, params: Any = None, seed: int = 4) -> hj.State:
    params = PROBLEMS["quadratic"].params if params is None else params
    params = jax.tree.map(jnp.copy, params)  # a simulation reuses what it is given
    return alg.init(params, jax.random.key(seed, impl="threefry2x32"))


def rows(name: str) -> np.ndarray:
    """Examples of a client, as many as its number says."""
    number = NAMES.index(name)
    return np.random.default_rng(number).normal(number, 1, (7 + number, 33)).astype(np.float32)


def everybody(names: list[str] = NAMES) -> federation.Clients:
    return federation.Clients({name: {"x": rows(name)} for name in names})


def one(batches: federation.Arrays) -> np.ndarray:
    """The one row of each batch, as the loss takes it."""
    return batches["x"][:, :, 0]


def batches_of(name: str, local_steps: int = 1) -> Any:
    """What a site draws: its own rows only, as client number so and so of the run."""
    own = federation.Clients({name: {"x": rows(name)}})

    def batches(round: int) -> np.ndarray:
        first = NAMES.index(name)
        return one(own.batches([name], round, BATCH, local_steps, 0, first))

    return batches


def site(name: str, alg: hj.Algorithm, folder: Path | None = None, **options: Any) -> Any:
    given: dict[str, Any] = dict(
        begin=lambda: begin(alg), batches=batches_of(name, alg.spec.steps), snapshot_every=3
    )
    return federation.Site(alg, folder=folder, **given | options)


def party(options: dict[str, Any], local: parties.Local) -> parties.Party:
    """The same run behind NVFlare. What a site is to do wrong, for a test, is in its data's name."""
    wrong = "" if local.data is None else local.data.name
    alg = algorithm(smoothing=2e-3) if wrong == "another algorithm" else algorithm()
    params = {"w": jnp.ones(33)} if wrong == "another base" else None
    if local.site is None:
        return parties.Party(alg, lambda: begin(alg))
    drawn = batches_of(local.site)

    def batches(round: int, number: int) -> Any:
        assert NAMES[number] == local.site
        if wrong == "NaN" or (wrong == "NaN once" and round == 1):
            return np.full((1, 1, 33), np.nan, np.float32)
        if wrong == "raises":
            raise FileNotFoundError("/data/patients.csv")
        if wrong == "10 MB":
            return np.zeros((1, 1, 33), np.float32)
        if wrong.startswith("slow"):
            time.sleep(float(wrong.split()[1]))
        return drawn(round)

    if wrong.startswith("stuck"):  # in a round, when its vector is asked for
        from hiso_jax.federation import masked

        take, stuck = masked.Masks._take, int(wrong.split()[1])

        def taken(own: masked.Masks, step: Any) -> list[bytes]:
            if step.round == stuck and step.parts[0] == b"S":
                (local.folder / "stuck").touch()
                time.sleep(600)
            return take(own, step)

        masked.Masks._take = taken

    if wrong == "another version":
        header.version = lambda package: "0.0.9"
    if wrong == "10 MB":
        probe = lambda state, batches, slot=0: jnp.zeros((1, 2_500_000))  # noqa: E731
        alg = alg._replace(probe=probe)
    return parties.Party(alg, lambda: begin(alg, params), batches)
