"""The shapes in the types hold: jaxtyping and beartype check calls of every kind.

That takes time, and the library needs neither, so it is done in a process of its own in which
jaxtyping's hook is installed before hiso_jax is imported. There programs are only traced. Other
tests can be run under the hook as well:
`python -m pytest -p tests.test_shapes tests/test_transform.py`.
"""

import gc
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Check whatever of hiso_jax is imported from here on; pytest calls it for a plugin."""
    from jaxtyping import install_import_hook

    assert "hiso_jax" not in sys.modules
    importlib.import_module("tests.test_shapes")  # as a module it is only __main__
    install_import_hook("hiso_jax", "tests.test_shapes.checked")


def checked(function: Any) -> Any:
    """A function whose arguments and result are checked; but beartype knows `Self` in classes only."""
    from beartype import BeartypeConf, beartype

    if Self in inspect.get_annotations(function).values():
        return function
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


@pytest.mark.slow
@pytest.mark.ci
def test_calls_of_every_kind():
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_shapes"], env=os.environ | settings, cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked\n"


def trace_algorithms() -> None:
    """Every rule, law, estimator, aggregator, and way to choose directions; all dtypes."""
    import jax
    import jax.numpy as jnp

    import hiso_jax as hj
    from hiso_jax import aggregators, estimators, rules
    from hiso_jax.algorithm import algorithm

    params: dict[str, Any] = {
        "w": jnp.ones((4, 32, 40)),
        "v": jnp.ones((320, 32), jnp.bfloat16),
        "b": jnp.ones(7),
        "c": jnp.ones((), jnp.float16),
        "number": jnp.arange(3),
    }

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        leaves = [params[name][...] for name in "wvbc"]
        return sum(jnp.sum((x.astype(jnp.float32) - batch.mean()) ** 2) for x in leaves)

    def head(params: Any, kept: Any) -> jax.Array:
        return (params["b"][...] - kept).sum()

    trunk = lambda params, batch: params["w"].sum() + batch.mean()  # noqa: E731
    above = [hj.Split(trunk, head, leaves, 1) for leaves in ({"b": 0, "w": 2}, {"b": 0})]
    schedule = lambda round: 0.1 / (1 + round)  # noqa: E731
    # A rule that has a row with more options has none without: a row is a second of tracing.
    options: list[dict[str, Any]] = [
        *({"rule": rules.RULES[name]()} for name in ("hiso", "fzoo", "meazo")),
        {"rule": rules.hizoo(), "estimator": "three_point", "local_steps": 2,
         "per_client_directions": 5},
        {"rule": rules.hiso(update_steps="all"), "local_steps": 2, "lazy": True},
        {"rule": rules.adam(), "local_steps": 2, "upper": above, "learning_rate": schedule},
        {"rule": rules.rms(), "upper": above[0], "per_client_directions": 5, "local_steps": 2},
        {"rule": rules.identity(), "estimator": "central", "seed_pool": 8},
        {"rule": rules.identity(), "estimator": estimators.forward_difference},
        {"rule": rules.momentum(), "distribution": "rademacher", "nonfinite": "exclude"},
        {"rule": rules.momentum(), "distribution": "near_normal", "lazy": True},
        {"rule": rules.rms(), "aggregator": aggregators.median(), "local_steps": 3},
    ]  # fmt: skip
    assert {given["rule"].config["rule"] for given in options} == set(rules.RULES)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for i, given in enumerate(options):
        spec = hj.scalar_algorithm(loss_fn, **{"learning_rate": 0.1, **given}).spec
        # Blocks, packs and lazy leaves, small as the model is.
        small = dict(flat=bool(i % 2), block=2**13, small=2**10, large=2**8)
        alg = algorithm(spec._replace(layout=spec.layout._replace(**small)))
        state = jax.eval_shape(alg.init, params, key)
        batches = jax.ShapeDtypeStruct((4, spec.steps, 5), jnp.float32)
        new, metrics = jax.eval_shape(alg.round, state, batches)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        assert metrics.scalars.shape == (4, *spec.sent)
        assert metrics.record.shape == spec.record
    scalars = jax.eval_shape(alg.probe, state, batches)
    for aggregator in (aggregators.median(), aggregators.trimmed_mean(0.2), aggregators.krum(0, 2),
                       lambda scalars, weights: scalars[0]):  # fmt: skip
        own = hj.scalar_algorithm(
            loss_fn, 0.1, rule=rules.rms(), local_steps=3, aggregator=aggregator
        )
        assert jax.eval_shape(own.aggregate, scalars, jnp.ones(4)).shape == spec.record
    jax.eval_shape(alg.replay, state, jnp.ones((2, *spec.record)), jnp.ones(2))


def call_the_rest() -> None:
    """The optax face, privacy, a replay in blocks, and arrays of NumPy's and old keys."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import hiso_jax as hj
    from hiso_jax.ledger import replay

    params = {"w": jnp.ones(5), "v": jnp.ones(3, jnp.bfloat16)}
    value_fn = lambda params: (params["w"] ** 2).sum()  # noqa: E731
    for tx in (
        hj.hiso(0.1),
        hj.zo_sgd(lambda count: 0.1),
        hj.scale_by_zeroth_order(hj.rules.rms()),
    ):
        update = lambda state, tx=tx: tx.update(None, state, params, value_fn=value_fn)  # noqa: E731
        jax.eval_shape(update, tx.init(params))
    grad = hj.value_and_grad(lambda params, batch: value_fn(params) + batch, num_perturbations=2)
    jax.eval_shape(grad, params, jnp.float32(1), jax.random.PRNGKey(0))
    for shape in ((2, 3), (4, 2, 3)):
        scalars = np.ones(shape, np.float32)
        hj.privacy.privatize(scalars, jax.random.key(1), clip=1, noise_multiplier=0.5)

    alg = hj.mezo(lambda params, batch: value_fn(params), 0.1)
    state = alg.init(params, jax.random.PRNGKey(0))
    with hj.Ledger.create(":memory:", alg, state) as ledger:
        end = alg.advance(state, np.ones((1, 1)))
        ledger.append(np.ones((1, 1)), hj.digest(end))
        blocks = replay.Replay(ledger)
    base = {name: np.asarray(x) for name, x in params.items()}
    for name, x in base.items():
        blocks.read(name, 0, x)
    blocks.check_base()
    moved = {name: blocks.advance(name, 0, x) for name, x in base.items()}
    assert all((moved[name] == end.params[name]).all() for name in moved)


def refuse_wrong_shapes() -> None:
    """Whoever gets a shape or type wrong inside is told where, and which axis."""
    import jax
    import jax.numpy as jnp
    from jaxtyping import TypeCheckError

    import hiso_jax as hj
    from hiso_jax import directions, rules, steps

    rule, leaves = rules.hiso(), {"w": jnp.ones(5)}
    state, last = rule.init(leaves), jnp.bool_(True)
    flat = lambda scalars, weights: scalars.mean(0)[0]  # noqa: E731  # a record [P]
    scalars, weights = jnp.ones((4, 2, 3)), jnp.ones(4)
    wrong = {
        "record": lambda: steps.admit(rule, jnp.ones(3), jnp.float32(1)),
        "rate": lambda: steps.admit(rule, jnp.ones((1, 3)), jnp.ones(2)),
        "scalars": lambda: rule.update(state, leaves, jnp.ones((1, 3)), last),
        "last": lambda: rule.update(state, leaves, jnp.ones(3), jnp.float32(1)),
        "weights": lambda: hj.aggregators.mean()(scalars, jnp.ones(3)),
        "return value": lambda: hj.aggregators.Aggregator(flat, None)(scalars, weights),
        "key": lambda: directions.direction_key(jnp.ones(2), 0, 0, 0),
        "round": lambda: directions.direction_key(jax.random.key(0), 0.5, 0, 0),
    }
    for name, call in wrong.items():
        with pytest.raises(TypeCheckError, match=f"(?s){name}"):
            call()


if __name__ == "__main__":
    gc.disable()  # a short life, and much that is traced
    pytest_configure(None)  # pyright: ignore[reportArgumentType]
    for check in (trace_algorithms, call_the_rest, refuse_wrong_shapes):
        check()
    print("checked")
