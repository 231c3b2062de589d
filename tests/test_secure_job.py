"""The option --secure of the jobs."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="needs the extra secure")
pytest.importorskip("Crypto", reason="needs the extra secure")
pytest.importorskip("dp_accounting", reason="needs the extra dp")

import numpy as np

import hiso_jax as hj
from hiso_jax import privacy
from hiso_jax.federation import private
from hiso_jax.train import digits, job, report
from tests.helpers import here, outcome, refuse

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.slow
@pytest.mark.ci
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


PROBLEM = digits.digits(5)
OPTIONS: dict[str, Any] = dict(rounds=3, clients=5, clients_per_round=4, eval_every=3, dropout=0.1,
                               snapshot_every=2, sampling="balanced", clip=2.0)  # fmt: skip


class Crash(BaseException):
    """What nothing in a job handles."""


def run(out: Path, **options: Any) -> int:
    try:
        given = digits.Options(out=out, **OPTIONS | options)
        job.run(given, PROBLEM, digits.LEARNING_RATES)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("options", [
    pytest.param(dict(secure=True, clip=None), id="masked", marks=pytest.mark.slow),
    pytest.param(
        dict(secure=True, epsilon=8.0), id="distributed", marks=[pytest.mark.slow, pytest.mark.ci]
    ),
    pytest.param(dict(epsilon=8.0), id="central", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_private_job_that_crashes_in_every_round_ends_as_one_that_did_not(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before its record is written, and behind it: same bits, same epsilon, and one noise a sum."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(report, "draw_split", lambda *_: None)
    noised: dict[Any, set[tuple[bytes, bytes]]] = {}
    real_noise, real_append = privacy.Terms._noised, hj.Ledger.append

    def spy(terms: Any, whole: Any, secret: Any, who: bytes, name: bytes, round: int) -> Any:
        shown = real_noise(terms, whole, secret, who, name, round)
        noised.setdefault((who, name, round), set()).add((whole.tobytes(), shown.tobytes()))
        return shown

    crashed: set[tuple[int, str]] = set()

    def append(ledger: hj.Ledger, *given: Any) -> Any:
        for when in ("before", "behind"):
            if (point := (ledger.rounds, when)) not in crashed:
                crashed.add(point)
                if when == "behind":
                    real_append(ledger, *given)
                raise Crash
        return real_append(ledger, *given)

    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(privacy.Terms, "_noised", spy)
        patch.setattr(hj.Ledger, "append", append)
        for attempt in range(2 * OPTIONS["rounds"]):
            resume = {} if attempt == 0 else dict(resume=out)
            with pytest.raises(Crash):
                run(out, **options, **resume)
        assert run(out, **options, resume=out) == 0
    assert len(crashed) == 2 * OPTIONS["rounds"]
    kind = "central" if not options.get("secure") else "distributed"
    assert (len(noised) > 0) == ("epsilon" in options)
    assert all(len(found) == 1 for found in noised.values())
    secret = (out / "secret").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(privacy, "secret", lambda path: secret)
        assert run(tmp_path / "b", **options) == 0
    assert outcome(out) == outcome(tmp_path / "b")
    found = []
    for name in ("a", "b"):
        path = tmp_path / name / "ledger.sqlite"
        with hj.Ledger.open(path, read_only=True) as ledger:
            records = ledger.records()
            terms = private.terms_of(ledger)
            found.append((records.scalars.tobytes(), records.digests, records.reported,
                          ledger.events(), private.accountant_of(ledger).epsilon()))  # fmt: skip
            assert terms.masked == bool(options.get("secure"))
            assert terms.kind == (kind if "epsilon" in options else None)
    assert found[0] == found[1]
    if "epsilon" in options:
        assert any(found[0][3]) and 4 < found[0][4] <= 8.0  # some rounds may be void


def test_a_budget_that_is_spent_ends_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Whatever was calibrated: here the noise is less."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    real = privacy.calibrate
    monkeypatch.setattr(privacy, "calibrate", lambda *given, **more: 0.7 * real(*given, **more))
    assert run(tmp_path / "a", epsilon=8.0, dropout=0.0) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "the budget is 8" in said and "of 3 rounds" in said
    with hj.Ledger.open(tmp_path / "a/ledger.sqlite", read_only=True) as ledger:
        spent = private.accountant_of(ledger).epsilon()
        assert 0 < ledger.rounds < 3 and spent <= 8.0
    assert json.loads((tmp_path / "a/summary.json").read_text())["epsilon_spent"] == spent
    shown = f"{spent:.3g}"
    assert f"epsilon spent, delta 1e-05 │ {shown}" in said
    page = (tmp_path / "a/report.html").read_text()
    assert f"epsilon spent, delta 1e-05</td><td>{shown}</td>" in page
    assert (tmp_path / "a/model.safetensors").exists()


@pytest.mark.parametrize("given, text", [
    (("--epsilon", "8"), "--clip: needed, for --epsilon and --clip go together"),
    (("--clip", "8"), "--epsilon: needed, for --epsilon and --clip go together"),
    (("--epsilon", "8", "--clip", "0"), "--clip: expected a finite number > 0"),
    (("--epsilon", "8", "--clip", "1", "--delta", "2"), "--delta: expected"),
    (("--epsilon", "8", "--clip", "1", "--delta", "1"), "--delta: expected"),
    (("--epsilon", "8", "--clip", "1", "--upper-directions", "auto"), "--upper-directions: auto"),
    (("--epsilon", "8", "--clip", "1", "--method", "fedavg", "--learning-rate", "0.1"),
     "--epsilon: fedavg sends models"),
])  # fmt: skip
def test_budgets_that_cannot_be_kept_are_refused(given: tuple[str, ...], text: str, tmp_path: Path):
    assert text in " ".join(refuse("digits", *given, "--out", str(tmp_path / "a")).split())
    assert not (tmp_path / "a").exists()


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
