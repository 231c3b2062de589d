"""Names of earlier versions go on working, and say what they are called now."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import hiso_jax as hj
from hiso_jax.federation import Traffic
from hiso_jax.rules import Rule
from hiso_jax.tasks.prompts import Task
from hiso_jax.train import compare, curves, digits, settings
from tests.helpers import quadratic_loss


def test_arguments_and_attributes():
    with pytest.deprecated_call(match="own_directions is now called per_client_directions"):
        old = hj.decomfl(quadratic_loss, 0.1, own_directions=3)  # pyright: ignore
    new = hj.decomfl(quadratic_loss, 0.1, per_client_directions=3)
    assert old.config == new.config
    with pytest.deprecated_call(match="recipe is now called config"):
        assert old.recipe == new.config
    with pytest.deprecated_call():
        assert Traffic((1, 6), own_directions=3).record_bytes == 8
    nothing = lambda *_: {}  # noqa: E731
    with pytest.deprecated_call():
        rule = Rule(nothing, nothing, nothing, recipe={"rule": "mine"})  # pyright: ignore
    assert rule.config == {"rule": "mine"}
    with pytest.deprecated_call():
        task = Task("{a}", words=("no", "yes"))  # pyright: ignore
    assert task == Task("{a}", verbalizer=("no", "yes"))


@pytest.mark.parametrize(
    "old, new",
    [
        ("seal", "no_fma"),
        ("apart", "compiled_alone"),
        ("move", "axpy"),
        ("flush", "flush_subnormals"),
    ],
)
def test_functions_of_exact(old: str, new: str):
    with pytest.deprecated_call(match=f"{old} is now called {new}"):
        assert getattr(hj.exact, old) is getattr(hj.exact, new)
    with pytest.raises(AttributeError, match="sealed"):
        hj.exact.sealed  # pyright: ignore # noqa: B018


def test_privatise():
    with pytest.deprecated_call():
        old = hj.privacy.privatise  # pyright: ignore
    assert old is hj.privacy.privatize
    scalars = old(jnp.full((1, 4), 10.0), jax.random.key(0), clip=2.0, noise_multiplier=0)
    assert scalars.tolist() == [[1.0] * 4]


def test_modules():
    assert hj.fingerprint is hj.digests  # pyright: ignore
    assert hj.simulation.Clients is hj.federation.Clients  # pyright: ignore


def test_options_on_the_command_line_and_in_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert settings.modern(["--own-directions", "--words=a", "--num-clients", "3", "--seed", "1"]) == [
        "--per-client-directions", "--verbalizer=a", "--clients", "3", "--seed", "1",
    ]  # fmt: skip
    assert capsys.readouterr().out.count("is now called") == 3
    assert compare.varied(digits.Options, ("own_directions=true",)) == {
        "per_client_directions": (True,)
    }
    saved = {"job": "digits", "options": {"own_directions": True}, "learning_rates": {}}
    (tmp_path / "options.json").write_text(json.dumps(saved))
    assert settings.read(tmp_path)["options"] == {"per_client_directions": True}
    (tmp_path / "rows.jsonl").write_text('{"method": "rms", "own_directions": true}\n')
    assert curves.read(tmp_path / "rows.jsonl")[0]["per_client_directions"] is True
