"""Files to rows, by rules that do not depend on what the first lines hold.

CSV and TSV are text throughout; a column that holds whole numbers and nothing else is numbers.
No word stands for a missing value: what is missing is an empty field, or null in JSON. What
does not fit is refused with the path and the line, never repaired in silence.
"""

import codecs
import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)
# The longer ones first: UTF-32 begins as UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_POINTER = b"version https://git-lfs"


def read_file(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> Rows:
    r"""Read a CSV, TSV, JSONL, JSON, Parquet or text file; ``docs/data.md`` has the rules.

    Args:
      path: of the file; SQuAD's nested JSON and JSON lists of strings are understood too.
      columns: names, for a CSV or TSV without a header line.

    Returns:
      A dict a row, all with the same keys; None where JSON or Parquet has no value.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a suffix that is not known, or content that does not fit; with path and line.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.csv"
      >>> _ = path.write_text('text,label,code\n"good, or null",1,01\nNA,,7\n')
      >>> for row in read_file(path):
      ...     print(row)
      {'text': 'good, or null', 'label': 1, 'code': '01'}
      {'text': 'NA', 'label': None, 'code': '7'}
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ValueError(f"{path}: expected a suffix of {tuple(FORMATS)}, got {path.suffix!r}")
    if columns and kind not in (".csv", ".tsv"):
        raise ValueError(f"columns: only CSV and TSV can lack a header line; {path} is neither")
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path}: a Git LFS pointer, not the data; fetch it: git lfs pull")
    try:
        rows = FORMATS[kind](path, tuple(columns))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    return alike(rows)


def alike(rows: Rows) -> Rows:
    """The rows with the same keys in all of them; what one lacks is None."""
    if all(row.keys() == rows[0].keys() for row in rows):
        return rows
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _decoded(path: Path) -> str:
    """The text of a file: UTF-8, or what its byte order mark says."""
    raw = path.read_bytes()
    marked = any(raw.startswith(mark) for mark, _ in _MARKS)
    if not marked and b"\0" in raw[:2]:
        raise ValueError("the file begins as UTF-16 does, but has no byte order mark; save it as "
                         "UTF-8")  # fmt: skip
    mark, encoding = next((m for m in _MARKS if raw.startswith(m[0])), (b"", "utf-8"))
    try:
        return (raw[len(mark) :] if encoding == "utf-8" else raw).decode(encoding)
    except UnicodeDecodeError as error:
        line, found = raw.count(b"\n", 0, error.start) + 1, error.object[error.start : error.end]
        raise ValueError(
            f"line {line} is not {encoding.upper()} (bytes {found.hex()}); save the file as UTF-8; "
            "it may be in Latin-1 or Windows-1252"
        ) from None


def _separator(text: str, columns: Sequence[str]) -> str:
    """What separates the fields of a CSV's first line: a comma, else a semicolon or a tab."""
    for sign in ",;\t":
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)
        try:
            count = len(next((fields for fields in lines if fields), []))
        except csv.Error:
            continue  # quotes that do not end where a field would
        if count == (len(columns) or count) and count > 1:
            return sign
    return ","


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Texts may be longer than the 131,072 letters that the module csv takes."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv(path: Path, columns: tuple[str, ...]) -> Rows:
    text = _decoded(path)
    with _long_fields():
        return _table(text, columns, delimiter=_separator(text, columns), strict=True)


def _tsv(path: Path, columns: tuple[str, ...]) -> Rows:
    # A quote is a letter like any other, as in GLUE's files, which do not pair them.
    with _long_fields():
        return _table(_decoded(path), columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(text: str, columns: tuple[str, ...], **dialect: Any) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    lines: list[list[str]] = []
    header: list[str] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not header:
                header = _header(list(columns) or fields)
                if not columns or fields == header:
                    continue
            elif fields == header and len(header) > 1:
                raise ValueError(f"line {reader.line_num}: the header again; are these two files?")
            if len(fields) != len(header):
                hint = "" if len(header) > 1 else f"; the header is {header[0]!r:.80}"
                what = "columns: " if columns else ""
                raise ValueError(
                    f"{what}line {reader.line_num}: expected {len(header)} fields, got "
                    f"{len(fields)}{hint}; a field with separators in it needs quotes"
                )
            lines.append(fields)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    if not header:
        raise ValueError("the file is empty; expected a line with the names of the columns")
    rows: Rows = [dict(zip(header, fields, strict=True)) for fields in lines]
    for i, name in enumerate(header):
        if _whole(fields[i] for fields in lines):
            for row in rows:
                row[name] = int(row[name]) if row[name] else None
    return rows


def _header(fields: list[str]) -> list[str]:
    # Index columns and Excel's empty ones have no name; pandas calls them so.
    names = [name if name.strip() else f"Unnamed: {i}" for i, name in enumerate(fields)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"columns {twice} are there twice; rename one")
    return names


def _whole(column: Iterable[str]) -> bool:
    """Whether every field that is not empty is a whole number as Python writes it, and one is."""
    some = False
    for text in column:
        if text:
            some = True
            if not _WHOLE.fullmatch(text):
                return False
    return some


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} is there "
                         "twice in one object")  # fmt: skip
    return found


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json(path: Path, columns: tuple[str, ...] = ()) -> Rows:
    """JSON, or JSON lines whatever the suffix."""
    del columns
    text = _decoded(path)
    if not text.strip():
        raise ValueError("the file is empty")
    try:
        content = _parse(text)
    except json.JSONDecodeError as error:
        rows = _json_lines(text)
        if rows is None:
            raise ValueError(f"not JSON: {error}") from None
        return rows
    if isinstance(content, dict):
        return _from_object(content, lines=path.suffix.lower() != ".json")
    if not isinstance(content, list):
        raise ValueError(f"expected a list of objects, got {content!r:.60}")
    return [_row(value, f"entry {i + 1}") for i, value in enumerate(content)]


def _json_lines(text: str) -> Rows | None:
    """The objects of JSON lines; None if the first line is none."""
    rows: Rows = []
    # Not splitlines, which cuts at signs that may stand inside of a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _parse(line)
        except json.JSONDecodeError as error:
            if not rows:
                return None
            raise ValueError(f"line {number}: not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        rows.append(_row(value, f"line {number}"))
    return rows


def _row(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object or a text, got {value!r:.60}")
    return value


def _from_object(content: dict[str, Any], lines: bool) -> Rows:
    inner = content.get("data")
    if isinstance(inner, list) and inner and all(isinstance(x, dict) for x in inner):
        others = [n for n, x in content.items() if n != "data" and isinstance(x, list) and x]
        if others and not any("paragraphs" in x for x in inner):
            raise ValueError(f"expected rows under 'data' only, got some under {others!r:.80} as "
                             "well; give each split a file of its own")  # fmt: skip
        return _squad(inner) if any("paragraphs" in x for x in inner) else inner
    values = list(content.values())
    nested = [isinstance(value, (list, dict)) for value in values]
    if not lines and values and all(nested):
        raise ValueError(
            "expected a list of objects, one a row, or an object a line; got one object of "
            f"{list(content)!r:.80}"
        )
    return [content]


def _squad(articles: Sequence[dict[str, Any]]) -> Rows:
    rows: Rows = []
    for number, article in enumerate(articles, 1):
        try:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    found = qa.get("answers")  # files to be scored elsewhere have none
                    rows.append({
                        "title": article.get("title", ""), "context": paragraph["context"],
                        "question": qa["question"], "id": qa.get("id"),
                        "answers": None if found is None else [a["text"] for a in found],
                    })  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(f"article {number}: not as SQuAD has it: {error}") from None
    return rows


def _parquet(path: Path, columns: tuple[str, ...] = ()) -> Rows:
    del columns
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file).read()
        names = table.column_names
        if len(set(names)) != len(names):
            raise ValueError(f"columns are there twice: {names}")
        return table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file: {error}") from None
    except OverflowError as error:  # dates beyond those of Python
        raise ValueError(f"a value that Python cannot hold: {error}") from None


def _text(path: Path, columns: tuple[str, ...] = ()) -> Rows:
    del columns
    lines = re.split(r"\r\n|\n|\r", _decoded(path))
    return [{"text": line} for line in lines if line.strip()]


FORMATS: dict[str, Callable[[Path, tuple[str, ...]], Rows]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _json, ".ndjson": _json, ".json": _json,
    ".parquet": _parquet, ".txt": _text,
}  # fmt: skip
"""What reads files of each suffix, small or capital letters."""
