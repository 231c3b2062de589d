"""A model is rebuilt with a rule that the library does not have."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hiso_jax as hj
from hiso_jax.ledger import rebuild
from hiso_jax.rules import Rule
from hiso_jax.train import replay
from tests.helpers import quadratic_loss


def signed() -> Rule:
    """Moves by the sign of the ascent direction."""
    update = lambda state, delta, scalars, last: ({n: jnp.sign(x) for n, x in delta.items()}, state)  # noqa: E731
    return Rule(lambda leaves: {}, lambda state, u: u, update, {"rule": "signed"})


def other() -> dict[str, int]:
    return {}


def test_a_rule_of_ones_own_is_rebuilt(tmp_path: Path):
    alg = hj.scalar_algorithm(quadratic_loss, 0.1, rule=signed(), num_perturbations=3)
    state = alg.init({"w": jnp.zeros(40)}, jax.random.key(0))
    save_file({"w": np.zeros(40, np.float32)}, tmp_path / "base.safetensors")
    with hj.Ledger.create(tmp_path / "run.sqlite", alg, state) as ledger:
        for _ in range(3):
            state, metrics = jax.jit(alg.round)(state, jnp.ones((2, 1, 40)))
            ledger.append(metrics.record, hj.digest(state))
    paths = [tmp_path / name for name in ("run.sqlite", "base.safetensors", "out.safetensors")]
    with pytest.raises(ValueError, match="signed"):
        rebuild.rebuild(*paths)
    assert not paths[2].exists()
    replay.run(*paths, replay.rule_of("tests.test_rebuild:signed"))
    assert (load_file(paths[2])["w"] == np.asarray(state.params["w"])).all()
    for wrong, said in [
        ("tests.test_rebuild:none", "has no attribute"), ("no_such_module:a", "No module named"),
        ("tests.test_rebuild:other", "to make a Rule, got dict"), ("signed", "expected module:function"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"--rule: .*{said}"):
            replay.rule_of(wrong)
