"""Labels: one spelling for each, which are missing, their order, and the class of a row.

Files write one label in many ways: 1 in JSON, "1" in CSV, 1.0 where pandas met a hole. They are
the same label here. Text stays text: "01" is not "1", and "NA" or "null" in a file are words.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from hiso_jax._engine.checks import nfc, spell

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)


def key(text: str) -> str:
    """By what labels are compared: their text, but True, true and TRUE are one.

    So are the ways in which Unicode writes a letter with its accents.
    """
    low = text.casefold()
    return low if low in ("true", "false") else nfc(text)


def order(text: str) -> tuple[bool, float, str]:
    """By what labels are sorted: numbers by value, then texts.

    Example:
      >>> sorted(["10", "b", "9", "-1", "a", "01"], key=order)
      ['-1', '01', '9', '10', 'a', 'b']
    """
    number = _NUMBER.fullmatch(text) is not None
    return not number, float(text) if number else 0.0, text


def classes(values: Iterable[Any]) -> tuple[str, ...]:
    """The different labels among values, sorted, each as it is first spelled; none is missing.

    Example:
      >>> classes([2, "1", 10.0, None, "2", "x"])
      ('1', '2', '10', 'x')
    """
    found: dict[str, str] = {}
    for value in values:
        if (text := spell(value)) is not None:
            found.setdefault(key(text), text)
    return tuple(sorted(found.values(), key=order))


def alike(known: Iterable[str]) -> list[str]:
    r"""Notes on labels that differ in capitals, in signs that are not seen, or in form only.

    Example:
      >>> alike(["pos", "neg", "pos\u200b"])
      ["labels 'pos' and 'pos\\u200b' are two classes, and look alike"]
    """
    first: dict[str, str] = {}
    notes = []
    for text in known:
        bare = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        bare = "".join(sign for sign in bare if unicodedata.category(sign) != "Cf").strip()
        if (other := first.setdefault(bare, text)) != text:
            notes.append(f"labels {other!r} and {text!r} are two classes, and look alike")
    return notes


@functools.lru_cache(64)
def _numbers(known: tuple[Any, ...]) -> dict[str, int]:
    texts = [spell(value) for value in known]
    return {key(text): number for number, text in enumerate(texts) if text is not None}


def find(value: Any, known: tuple[Any, ...], counted: bool = False) -> int | None:
    """Number of a label among the known ones, or None.

    Args:
      value: of a row.
      known: label of each class.
      counted: a whole number may stand for the class of that number, where the known labels are
        words: the hub counts what files spell.

    Example:
      >>> find(2, ("1", "2")), find("2.0", (1, 2)), find(0, ("no", "yes")), find(True, (0, 1))
      (1, 1, None, 1)
      >>> find(0, ("no", "yes"), counted=True), find(0, ("1", "2"), counted=True)
      (0, None)
    """
    text = spell(value)
    if text is None:
        return None
    numbers = _numbers(known)
    if (number := numbers.get(key(text))) is not None:
        return number
    if numbers.keys() == {"0", "1"}:
        return {"true": numbers["1"], "false": numbers["0"]}.get(key(text))
    words = not any(_NUMBER.fullmatch(name) for name in numbers)
    if counted and words and text.isdecimal() and int(text) < len(known):
        return int(text)
    return None
