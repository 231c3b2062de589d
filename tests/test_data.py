"""Ordinary files: what they may look like, what comes out of them, and what is refused by name."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiso_jax.tasks import data, reading
from hiso_jax.tasks.prompts import TASKS, Task

TASK = Task("{text}", label="y", verbalizer=("a", "b"))
ROWS = [{"text": f"film {i}", "y": i % 2} for i in range(30)]

# What a file may hold in a field: anything but half of a pair of UTF-16.
# A file with NUL at its second byte is taken for UTF-16 without a mark, and refused.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
FIELD = st.one_of(TEXT, st.sampled_from(
    ["", "NA", "null", "None", "nan", "N/A", "01", "1.0", "-1", "1e3", " 7", '"', "a,b", "a\nb", "=1",
     "12345678901234567890", "٣", "TRUE", "\ufeff", "1" * 5000]), st.integers().map(str))  # fmt: skip
NAME = TEXT.filter(lambda name: name.strip() != "")


@st.composite
def tables(draw: Any) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and rows of texts."""
    names = draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
    row = st.lists(FIELD, min_size=len(names), max_size=len(names))
    return names, draw(st.lists(row, min_size=1, max_size=6))


def written(names: list[str], rows: list[list[str]], separator: str, end: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([names, *rows])
    return out.getvalue()


@settings(deadline=None, max_examples=200)
@given(table=tables(), separator=st.sampled_from(",;\t"), end=st.sampled_from(["\n", "\r\n", "\r"]),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))  # fmt: skip
def test_a_csv_is_the_text_that_was_written(
    table: Any, separator: str, end: str, encoding: str, tmp_path_factory: Any
):
    """Whatever the fields hold: no word is a hole, no number a float, no line is lost."""
    names, rows = table
    if encoding == "utf-8" and names[0].startswith("\ufeff"):
        return  # that is a byte order mark
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(written(names, rows, separator, end).encode(encoding))
    found = reading.read_file(path)
    assert [list(row) for row in found] == [names] * len(rows)
    for number, name in enumerate(names):
        texts, values = [row[number] for row in rows], [row[name] for row in found]
        if any(isinstance(value, int) for value in values):
            assert values == [int(text) if text else None for text in texts]
            assert all(str(int(text)) == text for text in texts if text)
        else:
            assert values == texts


LINES = b'{"text": "a", "y": 1}\n\n{"text": "b\\u2028", "y": null, "more": [1]}\r\n'


@pytest.mark.parametrize("name, content, wanted", [
    ("a.json", LINES, [("a", 1), ("b\u2028", None)]), ("a.jsonl", LINES, [("a", 1), ("b\u2028", None)]),
    ("a.ndjson", b"\xef\xbb\xbf" + LINES, [("a", 1), ("b\u2028", None)]),
    ("a.jsonl", b'[{"text": "a", "y": 1}]', [("a", 1)]), ("A.JSON", b'{"text": "a", "y": 1}', [("a", 1)]),
    ("a.json", b'{"version": 1, "data": [{"text": "a", "y": 1}]}', [("a", 1)]),
    ("a.json", '[{"text": "a", "y": 1}]'.encode("utf-16"), [("a", 1)]),
    ("a.CSV", b"text,y\na,1\n\n", [("a", 1)]), ("a.csv", b"text;y\n\"a;b\";1\n", [("a;b", 1)]),
    ("a.csv", b"text\ty\na\t1\n", [("a", 1)]), ("a.csv", b",text,y\n0,a,1\n", [("a", 1)]),
    ("a.csv", b"text,y,,\na,1,,\n", [("a", 1)]), ("a.tsv", b'text\ty\n"a\t1\n', [('"a', 1)]),
    ("a.csv", b'text,y\n"a\nb",1\n', [("a\nb", 1)]), ("a.csv", b"y,text\r1,a\r", [("a", 1)]),
    ("a.csv", b"text,y\n" + b"x" * 200_000 + b",1\n", [("x" * 200_000, 1)]),
])  # fmt: skip
def test_files_as_people_write_them(name: str, content: bytes, wanted: list[Any], tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    assert [(row["text"], row["y"]) for row in data.read_file(tmp_path / name)] == wanted


@pytest.mark.parametrize("name, content, said", [
    ("a.csv", b"", "is empty"), ("a.json", b" \n", "is empty"), ("a.jsonl", b"", "is empty"),
    ("a.csv", b"text,y\na,1\nb,0,x\n", "line 3: expected 2 fields, got 3"),
    ("a.csv", b"text,y\na\n", "line 2: expected 2 fields, got 1"),
    ("a.csv", b'text,y\n"a,1\nb,0\n', "unexpected end of data"),
    ("a.csv", b"text,text\na,1\n", "'text'] are there twice"),
    ("a.csv", b"text,y\ncaf\xe9,1\n", "line 2 is not UTF-8"), ("a.json", b'[{"a": "\xe9"}]', "not UTF-8"),
    ("a.json", b'[{"a": 1},', "not JSON"), ("a.json", b"3", "expected a list of objects"),
    ("a.json", b'{"text": ["a", "b"], "y": [0, 1]}', "one object of"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: expected an object"),
    ("a.jsonl", b'{"text": "a", "text": "b"}', "'text' is there twice"),
    ("a.json", b"[" * 100_000, "nested too deeply"), ("a.parquet", b"PAR1", "not a Parquet file"),
    ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ("a.csv", b"text,y\na,1\ntext,y\nb,0\n", "line 3: the header again"),
    ("a.csv", "text,y\na,1\n".encode("utf-16-le"), "begins as UTF-16 does"),
    ("a.csv.gz", b"x", "expected a suffix of"), ("a", b"x", "expected a suffix of"),
    ("a.json", b'{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "article 1: not as SQuAD"),
    ("a.json", b'{"data": [{"y": 1}], "test": [{"y": 2}]}', "rows under 'data' only, got some under ['test']"),
])  # fmt: skip
def test_files_that_are_refused_with_path_and_place(
    name: str, content: bytes, said: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        data.read_file(tmp_path / name)
    text = str(error.value)
    assert text.startswith(str(tmp_path / name)) and said in text and "\n" not in text


def test_names_for_files_without_a_header(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("a;1\nb;0\n")
    assert data.read_file(path, ("text", "y"))[0] == {"text": "a", "y": 1}
    path.write_text("text,y\na,1\n")  # it has one after all
    assert data.read_file(path, ("text", "y")) == [{"text": "a", "y": 1}]
    with pytest.raises(ValueError, match="'text'. are there twice"):
        data.read_file(path, ("text", "text"))
    with pytest.raises(ValueError, match="columns: line 1: expected 3 fields, got 2"):
        data.read_file(path, ("text", "y", "z"))
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="columns: only CSV and TSV"):
        data.read_file(tmp_path / "a.jsonl", ("text",))


@pytest.mark.parametrize("name", [
    "a[1].csv", "a*.csv", "a?.csv", "a::b.csv", "exp[lr=1e-3].csv", "ü b#%20{}~.csv", "$a$.csv", "-a.csv",
])  # fmt: skip
def test_a_path_is_no_pattern(name: str, tmp_path: Path):
    for folder in (tmp_path, tmp_path / "x[1]*"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("text,y\nmine,1\n")
        for other in ("a1.csv", "aa.csv", "ab.csv"):
            (folder / other).write_text("text,y\nother,0\n")
        assert [row["text"] for row in data.read_file(folder / name)] == ["mine"]


def test_nothing_is_left_in_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A changed file is read anew, and private rows stay where they are."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = tmp_path / "a.csv"
    for text in ("first", "later"):
        path.write_text(f"text,y\n{text},1\n")
        assert data.read_file(path)[0]["text"] == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def put(folder: Path, *names: str) -> Path:
    """Files of thirty rows that say where they are from."""
    folder.mkdir(exist_ok=True)
    for name in names:
        rows = [row | {"text": name} for row in ROWS]
        lines = [",".join(map(str, row.values())) for row in ({"text": "text", "y": "y"}, *rows)]
        if name.lower().endswith(".csv"):
            (folder / name).write_text("\n".join(lines))
        elif name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        else:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("train, dev, test", [
    ("train.csv", "dev.csv", "test.csv"), ("Train.CSV", "Validation.jsonl", "TEST.csv"),
    ("reviews_train.csv", "reviews-val.csv", "reviews.test.csv"),
    ("training.jsonl", "eval.csv", "testing.parquet"), ("2023 train.csv", "valid2.csv", "test_2.csv"),
])  # fmt: skip
def test_which_file_is_of_which_split(train: str, dev: str, test: str, tmp_path: Path):
    folder = put(tmp_path, train, dev, test, "train.png", "notes.txt", ".train.csv.swp")
    found = data.read(TASK, folder)
    assert {n: {r["text"] for r in rows} for n, rows in found.parts.items()} == {
        "train": {train}, "dev": {dev}, "test": {test}}  # fmt: skip
    assert found.notes == ("not read: notes.txt, train.png",)


def test_parts_of_a_split_are_joined_in_their_order(tmp_path: Path):
    parts = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    found = data.read(TASK, put(tmp_path, *parts, "test.csv"))
    assert {row["text"] for rows in found.parts.values() for row in rows} == {*parts, "test.csv"}
    (tmp_path / parts[1]).unlink()
    with pytest.raises(ValueError, match="of 3 parts there are only"):
        data.read(TASK, tmp_path)


@pytest.mark.parametrize("names, said", [
    (("train.csv", "train.jsonl"), "train.csv, train.jsonl are all of train"),
    (("train.csv", "Train.csv"), "are all of train"),
    (("train.csv", "dev.csv", "validation.csv"), "dev.csv, validation.csv are all of dev"),
    (("a_train.csv", "b_train.csv"), "are all of train"), (("dev.csv", "train_test.csv"), "expected a file train"),
    (("train.csv", "test.csv.gz"), "not a file that is read"), (("train.csv", "test"), "not a file that is read"),
    (("train.csv", "test.tab"), "not a file that is read"), (("train.csv", "dev.csv~"), "not a file that is read"),
    (("train-00000-of-00002.parquet",), "of 2 parts there are only"),
    (("train.csv", "test-00001-of-00002-a1b2c3.parquet"), "of 2 parts there are only"),
    (("train.xlsx", "dev.csv"), "not a file that is read"),
])  # fmt: skip
def test_files_that_could_be_meant_or_not(names: tuple[str, ...], said: str, tmp_path: Path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        data.read(TASK, put(tmp_path, *names))


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere"), lambda path: os.mkfifo(path),
])  # fmt: skip
def test_a_split_that_is_no_file(make: Any, tmp_path: Path):
    make(put(tmp_path, "train.csv") / "test.csv")
    with pytest.raises(ValueError, match="test.csv: not a file that is read"):
        data.read(TASK, tmp_path)


def test_a_file_beside_the_splits_is_named(tmp_path: Path):
    folder = put(tmp_path, "train.csv", "test.csv", "test_labels.csv", "sample_submission.csv")
    found = data.read(TASK, folder)
    assert "not read: sample_submission.csv, test_labels.csv" in found.notes


def holed(*values: Any) -> list[dict[str, Any]]:
    return [{"text": f"{i}", "y": value} for i, value in enumerate(values)]


@pytest.mark.parametrize("hole", [None, "", " ", float("nan"), -1, "-1", -1.0])
def test_rows_without_a_label_are_left_out_and_counted(hole: Any):
    parts = {name: ROWS + holed(hole, hole) for name in ("train", "dev", "test")}
    found = data.read(TASK, parts)
    assert all(len(rows) == 30 for rows in found.parts.values())
    assert f"train: 2 of 32 rows have no y, left out" in found.notes  # noqa: F541
    hidden = data.read(TASK, {"train": ROWS, "dev": ROWS[:9], "test": holed(hole, hole)})
    assert hidden.parts["test"] == ROWS[:9] and len(hidden.notes) == 2
    with pytest.raises(ValueError, match="no row of train has a label, column 'y'"):
        data.read(TASK, {"train": holed(hole, hole)})


def test_minus_one_is_a_label_where_train_has_it():
    own = Task("{text}", label="y")
    rows = holed(-1, 0, 1, -1, 0, 1, -1)
    assert data.read(own, {"train": rows, "dev": rows, "test": rows}).parts["dev"] == rows
    hidden = data.read(own, {"train": ROWS, "dev": ROWS, "test": holed(-1, -1)})
    assert hidden.parts["test"] == ROWS


@pytest.mark.parametrize("change, said", [
    ({"text": ["a", "b"]}, r"row 3: text: expected text, got \['a', 'b'\]"),
    ({"text": b"a"}, "row 3: text: expected text"), ({"text": "\ud800"}, "row 3: text: half of a pair"),
    ({"y": [1]}, r"row 3: y: expected text, a number or a truth value, got \[1\]"),
    ({"y": "\ud800"}, "row 3: y: half of a pair"), ({"who": ["x"]}, "row 3: who: expected text"),
    ({"y": 2}, r"row 3: column 'y': expected one of \(0, 1\), got 2"),
])  # fmt: skip
def test_rows_that_no_model_can_read(change: dict[str, Any], said: str):
    """Of the rows as they were given: the first two are left out, others go to other splits."""
    rows = [dict(row) for row in ROWS]
    for row in rows[:2]:
        row["y"] = None
    rows[2] |= change
    with pytest.raises(ValueError, match=f"data: train, {said}"):
        data.read(TASK._replace(values=(0, 1)), {"train": rows}, names=("who",))


def test_a_column_that_unicode_writes_in_two_ways():
    rows = [{"texte e\u0301crit": row["text"], "y": row["y"]} for row in ROWS]
    task = TASK._replace(prompt="{texte \u00e9crit}")
    found = data.read(task, {"train": rows}).parts
    assert all(task.read(row).startswith("film") for part in found.values() for row in part)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_rows(count: int):
    if count < 3:
        with pytest.raises(ValueError, match="no rows|rows with labels are too few"):
            data.read(TASK, {"train": ROWS[:count]})
    else:
        found = data.read(TASK, {"train": ROWS[:count]}).parts
        assert [len(found[name]) for name in ("train", "dev", "test")] == [1, 1, 1]


def test_datasets_are_read_as_they_are():
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    whole = datasets.DatasetDict({"train": made, "validation": made.select(range(9))})
    found = data.read(TASK, whole).parts
    assert found["test"] == ROWS[:9] and data.read(TASK, made).parts.keys() == {
        "train",
        "dev",
        "test",
    }
    with pytest.raises(ValueError, match="expected a split 'train'"):
        data.read(TASK, {"all": ROWS})
    with pytest.raises(ValueError, match="two splits are called dev"):
        data.read(TASK, {"train": ROWS, "dev": ROWS, "validation": ROWS})
    found = data.read(TASK, {"train": ROWS, "unsupervised": ROWS})
    assert found.notes == ("not read: the splits unsupervised",)
    assert data.read(TASK, ROWS).parts == data.read(TASK, {"train": ROWS}).parts
    for wrong in (3, ({"a": 1},), {"train": [(1, 2)]}):
        with pytest.raises(TypeError, match="path: expected a file|expected rows that are dicts"):
            data.read(TASK, wrong)  # type: ignore


@pytest.mark.parametrize("task, value, said", [
    ("lm", [{"role": "user"}], "expected text"), ("lm", b"x", "expected text"), ("lm", "\ud800", "half of a pair"),
    ("squad", {"value": "x"}, "an object with 'text' or 'spans'"), ("squad", b"x", "expected text"),
    ("xsum", {}, "an object with 'text' or 'spans'"), ("squad", ["\ud800"], "half of a pair"),
])  # fmt: skip
def test_answers_that_no_model_can_write(task: str, value: Any, said: str):
    label = TASKS[task].label
    row = dict.fromkeys([*TASKS[task].columns, label], "a")
    with pytest.raises(ValueError, match=f"train, row 2: {label}: .*{said}"):
        data.read(TASKS[task], {"train": [row, row | {label: value}, row]})
