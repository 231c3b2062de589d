"""What is offered to `optax.contrib` passes its own tests and examples with the installed optax."""

import doctest
import importlib.util
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest

import hiso_jax as hj

FOLDER = Path(__file__).parents[1] / "contrib" / "optax"
PUBLIC = ("ScaleByZerothOrderState", "hiso", "mezo", "scale_by_zeroth_order",
          "zeroth_order_value_and_grad")  # fmt: skip


def load(name: str) -> ModuleType:
    """A file of the folder as the module of optax that it would be."""
    spec = importlib.util.spec_from_file_location(f"optax.contrib.{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    setattr(optax.contrib, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def offered() -> Iterator[ModuleType]:
    """The module, in optax while the tests of this file run."""
    with pytest.MonkeyPatch.context() as patch:
        module = load("_zeroth_order")
        for name in PUBLIC:
            patch.setattr(optax.contrib, name, getattr(module, name), raising=False)
        yield module
    for name in ("_zeroth_order", "_zeroth_order_test"):
        sys.modules.pop(f"optax.contrib.{name}", None)
        vars(optax.contrib).pop(name, None)


@pytest.mark.slow
@pytest.mark.ci
def test_its_own_tests_pass(offered: ModuleType):
    suite = unittest.defaultTestLoader.loadTestsFromModule(load("_zeroth_order_test"))
    result = unittest.TestResult()
    suite.run(result)
    assert [text for _, text in result.failures + result.errors] == []
    assert result.testsRun >= 14 and not result.skipped


def test_its_examples_run(offered: ModuleType):
    failed, tried = doctest.testmod(offered)
    assert tried >= 15 and not failed


def test_it_takes_the_step_of_the_optax_face(offered: ModuleType):
    """Given the same directions: signs, of which hiso_jax's are put in the place of the sampler's."""
    params = {"w": jnp.array([1.0, -2.0, 0.5, 3.0])}
    value_fn = lambda p: (p["w"] ** 2).sum() + p["w"][0]  # noqa: E731
    ours = hj.hiso(0.1, num_perturbations=1, distribution="rademacher")
    state = ours.init(params)
    key = hj.directions.as_key(state.key)
    sign = hj.directions.noise(
        hj.directions.direction_key(key, 0, 0, 0), params, "rademacher"
    )["w"]  # fmt: skip
    theirs = offered.hiso(0.1, num_perturbations=1, sampler=lambda key, shape, dtype: sign)
    given = dict(params=params, value_fn=value_fn)
    one, after = ours.update(None, state, **given)
    other, there = theirs.update(None, theirs.init(params), **given)
    np.testing.assert_allclose(one["w"], other["w"], rtol=1e-5)
    np.testing.assert_allclose(after.rule.curvature["w"], there[0].nu["w"], rtol=1e-4)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_what_it_makes_public_is_listed(offered: ModuleType):
    readme = (FOLDER / "README.md").read_text()
    assert [n for n in PUBLIC if f"import {n}\n" not in readme] == []
    own = {n for n, thing in vars(offered).items()
           if n[0] != "_" and getattr(thing, "__module__", "") == offered.__name__}  # fmt: skip
    assert own == {*PUBLIC}
