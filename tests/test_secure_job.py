"""The option --secure of the jobs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="needs the extra secure")
pytest.importorskip("Crypto", reason="needs the extra secure")

import numpy as np

import hiso_jax as hj
from hiso_jax.federation import private
from tests.helpers import here, outcome, refuse


def test_a_masked_run_is_that_of_exact_sums_whatever_the_secrets(tmp_path: Path):
    """Its records differ from those of float sums by less than the grid's step."""
    options = ("--rounds", "4", "--eval-every", "4", "--dropout", "0.2", "--snapshot-every", "1")
    here("digits", *options, "--secure", "--out", str(tmp_path / "a"))
    here("digits", *options, "--out", str(tmp_path / "plain"))
    found = []
    for name in ("a", "plain"):
        with hj.Ledger.open(tmp_path / name / "ledger.sqlite", read_only=True) as ledger:
            found.append(ledger.records())
            assert ("privacy" in ledger.header) == (name == "a")
            if name == "a":
                assert private.terms_of(ledger).masked
    few = [len(names) < 6 for names in found[1].reported]  # of eight, six are needed
    assert True in few and False in few
    for void, masked, plain in zip(few, found[0].reported, found[1].reported, strict=True):
        assert masked == ({} if void else plain)
    assert np.isnan(found[0].scalars).all((1, 2)).tolist() == few
    first = [records.scalars[0] for records in found]
    np.testing.assert_allclose(*first, atol=2.0**-20 + 1e-6 * np.abs(first[1]).max())
    again = tmp_path / "b"
    here("digits", *options, "--secure", "--out", str(again))
    assert outcome(again) == outcome(tmp_path / "a")  # other secrets, the same sums
    assert (again / "secret").read_bytes() != (tmp_path / "a" / "secret").read_bytes()
    saved = json.loads((again / "options.json").read_text())
    assert saved["options"]["secure"] is True


@pytest.mark.parametrize("given, text", [
    (("--per-client-directions",), "--secure: scalars of --per-client-directions are never"),
    (("--clients-per-round", "1"), "--secure: the sum of one hides nothing"),
    (("--method", "fedavg", "--learning-rate", "0.1"), "--secure: fedavg sends models"),
])  # fmt: skip
def test_rounds_that_cannot_be_masked_are_refused(
    given: tuple[str, ...], text: str, tmp_path: Path
):
    assert text in refuse("digits", "--secure", *given, "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
