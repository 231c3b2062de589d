"""Random small data sets: each trains for a round, or is refused in one line."""

import collections
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import hiso_jax as hj
from hiso_jax.train import finetune

TEXTS = ["good film", "a bad, long film", 'he said "no"', "", "NA", "null", "1", "2.5", "x" * 300,
         "caf\u00e9 \U0001f600", "two\nlines", " spaces ", "tab\there", "=1+1", "{b}", "\u2028"]  # fmt: skip
LABELS: list[list[Any]] = [
    *[["up", "down"], [0, 1], [1, 2], [True, False], ["up", "down", ""], [0, 1, None]] * 3, [-1, 1], [0.0, 1.0], [True, False], ["0", "1", "unknown"],
    ["01", "1"], list(range(12)), ["up"], [None, "up", "down"], ["", "up", "down"],
    [float("nan"), 1.0, 2.0], ["up ", "up", "down"], ["TRUE", "false"], [[1], [2]], [-1],
    ["a text as long as one likes", "another text"], [10**20, 5], [0.25, 0.5, 0.75],
]  # fmt: skip
NAMES = [
    "text",
    "label",
    "reviews.text",
    "a[0]",
    "{b}",
    "is it?",
    "gr\u00f6\u00dfe",
    "",
    " ",
    "text ",
    "0",
]
SPLITS = [["train"], ["train", "dev"], ["Train", "Validation", "TEST"], ["data_train", "data-test"],
          ["train", "valid", "extra"], ["train", "TRAIN"], ["dev", "test"], ["train", "dev", "val"]]  # fmt: skip
SUFFIXES = [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".CSV", ".ndjson"]
ODD = [".txt", ".xlsx", ".csv.gz", ""]
Rng = np.random.Generator


def pick(rng: Rng, values: list[Any]) -> Any:
    return values[rng.integers(len(values))]


def write(rng: Rng, path: Path, names: list[str], rows: list[list[Any]]) -> None:
    """The rows in the format of the suffix, now and then spoilt."""
    kind, sign = path.suffix.lower(), pick(rng, [",", ",", ";", "\t"])
    records = [dict(zip(names, row, strict=True)) for row in rows]
    if rng.random() < 0.05:
        records = [{k: v for k, v in r.items() if rng.random() < 0.9} for r in records]
    if kind == ".parquet":
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
            return
        except (pyarrow.ArrowException, ValueError, OverflowError):
            kind = ".json"  # a column of several types: then it is no Parquet file at all
    if kind in (".json", ".jsonl", ".ndjson"):
        whole = json.dumps(records) if rng.random() < 0.5 else "\n".join(map(json.dumps, records))
    elif kind == ".txt":
        whole = "\n".join(str(row[0]) for row in rows)
    else:
        sign = "\t" if kind == ".tsv" else sign
        say = lambda v: "" if v is None else str(v)  # noqa: E731
        quoted = lambda v: '"' + say(v).replace('"', '""') + '"'  # noqa: E731
        cell = say if kind == ".tsv" or rng.random() < 0.1 else quoted
        whole = "\n".join(sign.join(map(cell, row)) for row in [names, *rows])
    encoding = pick(rng, ["utf-8"] * 20 + ["utf-8-sig", "utf-16", "latin-1"])
    raw = whole.encode(encoding, "replace")
    if rng.random() < 0.05:
        raw = raw[: rng.integers(len(raw) + 1)]
    if rng.random() < 0.03:
        raw = raw + bytes(rng.integers(0, 256, 5).tolist())
    path.write_bytes(raw)


def make(rng: Rng, folder: Path) -> dict[str, Any]:
    """A data set in a folder, and options that may or may not fit it."""
    names = ["text", "label", "who"]
    if rng.random() < 0.5:
        names = [str(n) for n in rng.choice(NAMES, 3, replace=rng.random() < 0.1)]
    values = pick(rng, LABELS)
    rows = [[pick(rng, TEXTS) + f" {i}" * (rng.random() < 0.8), pick(rng, values), f"c{i % 5}"]
            for i in range(pick(rng, [0, 1, 3, 8, 20, 30, 40, 50, 60, 80]))]  # fmt: skip
    place = folder / pick(rng, ["data", "d[1]", "a b", "\u00fc*", "x::y", "$a$"])
    if rng.random() < 0.6:
        place = place.with_name(place.name + pick(rng, SUFFIXES * 6 + ODD))
        write(rng, place, names, rows)
    else:
        place.mkdir()
        for split in pick(rng, SPLITS[:5] * 3 + SPLITS):
            chosen = [row for row in rows if rng.random() < 0.7]
            write(rng, place / f"{split}{pick(rng, SUFFIXES * 9 + ODD)}", names, chosen)
    options: dict[str, Any] = dict(data=place, length=pick(rng, [16] * 9 + [12]),
                                   clients=pick(rng, [1, 2, 3, 3, 5, 50]))  # fmt: skip
    kind = pick(rng, ["own"] * 6 + ["prompt", "lm", "sst2", "squad"])
    if kind in ("lm", "sst2", "squad"):
        options["task"] = kind
    if kind == "squad":
        options |= dict(room=4, prompt="{" + names[0] + "}\n", label=names[1])
    elif kind == "prompt":
        options |= dict(prompt="{" + names[0] + "} It was", label=names[1])
    else:
        options["text"] = names[0]
    if kind in ("own", "sst2"):
        options["label"] = names[1]
    if kind in ("own", "prompt") and rng.random() < 0.6:
        options["verbalizer"] = ("up", "down", "great", "terrible")[: pick(rng, [2, 2, 2, 3, 4])]
    if rng.random() < 0.3:
        options |= dict(split="column", client_column=names[2])
    elif rng.random() < 0.4:
        options["split"] = pick(rng, ["iid", "size"])
    if rng.random() < 0.05:
        options["columns"] = tuple(names)
    return options


def one_round(options: dict[str, Any], model: Path) -> str:
    """What became of a data set: "trained", or the reason why not."""
    try:
        built = finetune.build(finetune.Options(model=str(model), **options))
    except (ValueError, OSError) as error:
        text = str(error)
        assert text.strip() and "\n" not in text.strip(), (options, text)
        return "refused"
    alg = hj.decomfl(built.loss_fn, 1e-3, num_perturbations=1, distribution="rademacher")
    batch = built.clients.batches(built.clients.names[:1], 0, 2)
    # Not trimmed, so that all have the shapes of few programs.
    step = jax.jit(alg.round, compiler_options={"xla_backend_optimization_level": 0})
    _, metrics = step(alg.init(built.params, jax.random.key(0)), batch)
    assert np.isfinite(metrics.record).all() and np.isfinite(metrics.loss), options
    count = len(built.classes)
    for part in (built.clients.columns, built.dev, built.test):
        assert part["input_ids"].shape[1] == options["length"] and len(part["input_ids"])
        assert not count or set(np.unique(part["label"])) <= set(range(count))
    return "trained"


@pytest.mark.parametrize("first, count", [
    (0, 10), *(pytest.param(10 + i * 199, 199, marks=pytest.mark.slow) for i in range(10)),
])  # fmt: skip
def test_random_data_sets(first: int, count: int, tiny: Path, tmp_path: Path):
    """Seeded: set number n is the same everywhere."""
    became = collections.Counter()
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        folder = tmp_path / f"{number}"
        folder.mkdir()
        try:
            became[one_round(make(rng, folder), tiny)] += 1
        except Exception as error:
            raise AssertionError(f"data set {number}") from error
    print(first, dict(became))
    assert became["trained"] > count / 20 and became["refused"] > count / 20
