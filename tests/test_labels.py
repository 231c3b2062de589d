"""Labels, prompts, answers and clients' names: one spelling each, whatever a file has."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiso_jax._engine import checks
from hiso_jax.tasks import labels, metrics, prompts, splits
from hiso_jax.tasks.prompts import TASKS, Task

# What a file may hold in a field: anything but half of a pair of UTF-16.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=100)
@given(values=st.lists(st.one_of(
    st.none(), st.booleans(), st.integers(-20, 20), st.floats(allow_infinity=False), TEXT,
    st.integers(-20, 20).map(float), st.sampled_from(["NA", "01", "1.0", "-1", "true", "10", "2"]),
), min_size=1, max_size=20))  # fmt: skip
def test_labels_have_one_spelling_and_an_order(values: list[Any]):
    known = labels.classes(values)
    for value in values:
        text, number = labels.spell(value), labels.find(value, known)
        if text is None:
            assert value is None or (number is None and (value != value or not str(value).strip()))
            continue
        assert number is not None and labels.key(known[number]) == labels.key(text)
    numbers = [float(k) for k in known if labels._NUMBER.fullmatch(k)]
    assert numbers == sorted(numbers)  # 2 comes before 10
    assert list(known[len(numbers) :]) == sorted(known[len(numbers) :])
    assert labels.classes(reversed(values)) == known or len({*map(labels.key, known)}) == len(known)


@pytest.mark.parametrize("values, wanted", [
    ([1, 2, 3], ("1", "2", "3")), (["10", "9", "2"], ("2", "9", "10")), ([1.0, None, 0.0], ("0", "1")),
    ([-1, 0, 1], ("-1", "0", "1")), (["01", "1"], ("01", "1")), ([True, False], ("False", "True")),
    (["up ", " up", "down"], ("down", "up")), ([0.5, 1.5], ("0.5", "1.5")),
    ([float("nan"), "", None, "x"], ("x",)), ([np.int64(3), np.float32(2)], ("2", "3")),
    (["TRUE", "true", False], ("False", "TRUE")), ([-0.0, 0], ("0",)),
])  # fmt: skip
def test_classes(values: list[Any], wanted: tuple[str, ...]):
    assert labels.classes(values) == wanted


def test_a_number_is_never_taken_for_a_place():
    stars = Task("{x}", label="y", verbalizer=tuple("12345"), values=tuple("12345"))
    for value in (1, 5, 1.0, "3"):
        assert stars.label_of({"y": value}) == int(value) - 1
    for value in (0, 6, -1, "one", None, "", float("nan"), True):
        with pytest.raises(ValueError, match="column 'y': expected one of"):
            stars.label_of({"y": value})
    spelled = stars._replace(verbalizer=("no", "yes"), values=("no", "yes"))
    with pytest.raises(ValueError, match="expected one of"):
        spelled.label_of({"y": 0})  # nobody said that 0 is no
    assert TASKS["rte"].label_of({"label": 1}) == 1  # the hub's way to say not_entailment
    assert TASKS["boolq"].label_of({"label": True}) == 1


@settings(deadline=None, max_examples=200)
@given(names=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3, unique=True),
       cue=st.text(max_size=8))  # fmt: skip
def test_any_name_can_stand_in_a_prompt(names: list[str], cue: str):
    prompt = "".join(prompts.field(name) + prompts.literal(cue) for name in names)
    task = Task(prompt)
    assert task.columns == names
    assert task.read({n: f"<{i}>" for i, n in enumerate(names)}) == "".join(
        f"<{i}>{cue}" for i in range(len(names))
    )


@pytest.mark.parametrize("prompt", ["{} label", "{review", "review}", "a {b} {", "{a{b}}}}}"])
def test_a_prompt_whose_braces_do_not_match(prompt: str):
    with pytest.raises(ValueError, match="prompt: no (column|partner)"):
        Task(prompt).columns  # noqa: B018


def test_what_is_missing_is_empty_in_a_prompt():
    for hole in (None, float("nan"), ""):
        assert Task("{a} and {b}").read({"a": hole, "b": 0}) == " and 0"


def test_answers_in_the_forms_of_the_field():
    for value in (
        ["a", "b"],
        {"text": ["a", "b"]},
        {"spans": ["a", "b"]},
        [{"text": "a"}, {"text": "b"}],
    ):
        assert prompts.answers_in(value) == ["a", "b"]
    assert prompts.answers_in(None) == prompts.answers_in([]) == [""] and prompts.answers_in(3) == [
        "3"
    ]


def test_what_pandas_calls_missing():
    pandas = pytest.importorskip("pandas")
    values = [pandas.NA, pandas.NaT, None, float("nan"), np.float32("nan")]
    assert labels.classes([*values, "x"]) == ("x",)
    assert [Task("{a}").read({"a": value}) for value in values] == [""] * 5


def test_answers_that_are_none():
    """SQuAD 2.0: nothing is the right answer to a question that has none."""
    for value in ([], {"text": []}, {"spans": []}, ""):
        assert TASKS["squad"].answers({"answers": value}) == [""]
    scores = metrics.squad(["", "x", "The"], [[], ["x"], []])
    assert scores == {"exact_match": 1.0, "f1": 1.0}
    assert metrics.squad(["x"], [[]]) == {"exact_match": 0.0, "f1": 0.0}


@settings(deadline=None, max_examples=100)
@given(names=st.lists(st.one_of(st.integers(0, 5), TEXT, st.booleans(), st.none()), max_size=30))
def test_natural_clients_are_who_they_are_called(names: list[Any]):
    holes = [i for i, name in enumerate(names) if labels.spell(name) is None]
    if holes:
        with pytest.raises(ValueError, match=f"names: example {holes[0]} has none"):
            splits.natural(names)
        return
    found = splits.natural(names)
    texts = [labels.spell(name) for name in names]
    keys = [text and checks.nfc(text) for text in texts]
    assert [checks.nfc(name) for name in found] == list(dict.fromkeys(keys))
    assert all({keys[i] for i in own} == {checks.nfc(name)} for name, own in found.items())
    assert all(texts[own[0]] == name for name, own in found.items())
    assert sorted(i for own in found.values() for i in own) == list(range(len(names)))


def test_one_text_that_unicode_writes_in_two_ways():
    """Composed and decomposed; the first spelling is shown. What only looks alike is told."""
    one, two = "Caf\u00e9", "Cafe\u0301"
    assert labels.classes([two, one, "tea"]) == (two, "tea")
    assert labels.find(one, (two, "tea")) == labels.find(two, (one, "tea")) == 0
    assert splits.natural([one, "x", two])[one].tolist() == [0, 2]
    assert labels.alike(["pos", "neg", one]) == []
    for other in ("pos\u200b", "POS", "\uff50os"):
        (note,) = labels.alike(["pos", "neg", other])
        assert "'pos' and" in note and "two classes" in note


def test_many_clients_take_time_in_proportion():
    """By the number of operations, not of seconds: no client looks at all rows."""

    class Counted(str):
        hashed = 0

        def __hash__(self) -> int:
            Counted.hashed += 1
            return super().__hash__()

        def __eq__(self, other: Any) -> bool:
            return super().__eq__(other)

    def work(clients: int) -> int:
        Counted.hashed = 0
        splits.natural([Counted(f"u{i % clients}") for i in range(10 * clients)])
        return Counted.hashed

    assert work(400) <= 4 * work(100) + 10
    assert math.isclose(sum(map(len, splits.by_size(20_000, 5_000))), 20_000)
