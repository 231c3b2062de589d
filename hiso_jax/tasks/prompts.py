"""Prompted tasks as data: what a model reads, which words are its answers, what is measured.

Templates and words are MeZO's (arXiv 2305.17333, table 14), which DeComFL and HiSo use too.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hiso_jax._engine import checks, renamed
from hiso_jax.tasks import labels

_PIECES = re.compile(r"\{\{|\}\}|\{((?:\\.|[^{}\\])*)\}|[{}]", re.DOTALL)


def field(column: str) -> str:
    r"""What stands for a column in a prompt: its name in braces, whatever is in the name.

    Example:
      >>> field("reviews.text"), field("{b}")
      ('{reviews.text}', '{\\{b\\}}')
    """
    return "{" + re.sub(r"[{}\\]", r"\\\g<0>", column) + "}"


def literal(text: str) -> str:
    """What stands for a text itself in a prompt: its braces twice.

    Example:
      >>> literal("a {b}")
      'a {{b}}'
    """
    return text.replace("{", "{{").replace("}", "}}")


@functools.lru_cache(64)
def _pieces(prompt: str) -> tuple[tuple[str, str | None], ...]:
    """The texts of a prompt, each with the column behind it, if one is.

    Raises:
      ValueError: a brace without its partner, or nothing between two.
    """
    start, text, pieces = 0, "", []
    for found in _PIECES.finditer(prompt):
        text += prompt[start : found.start()]
        start = found.end()
        if found[0] in ("{{", "}}"):
            text += found[0][0]
        elif found[1]:
            pieces.append((text, re.sub(r"\\([{}\\])", r"\1", found[1])))
            text = ""
        else:
            what = "no column between" if found[0] == "{}" else "no partner for"
            raise ValueError(
                f"prompt: {what} {found[0]!r} at letter {found.start() + 1} of {prompt!r}; columns "
                "stand in braces, a brace itself is written twice"
            )
    return *pieces, (text + prompt[start:], None)


class Task(NamedTuple):
    """A task on rows with named columns.

    Attributes:
      prompt: what the model reads; columns in braces, by their names as they are (`field`).
      label: column of the label, or of the answer.
      verbalizer: a word for each label, in the order of `values`; None: the column is the answer.
      values: how the column says each label, as `hiso_jax.tasks.labels` reads it; None: 0, 1, ...
      metric: ``"accuracy"``, ``"f1"`` (macro), ``"squad"`` (exact match and F1), ``"rouge"``.
      label_descriptions: one a label, for encoders: the label whose sentence is nearest is chosen.
      hub: arguments of ``datasets.load_dataset``; empty: local files only.
    """

    prompt: str
    label: str = "label"
    verbalizer: tuple[str, ...] | None = None
    values: tuple[Any, ...] | None = None
    metric: str = "accuracy"
    label_descriptions: tuple[str, ...] | None = None
    hub: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that the prompt reads.

        Raises:
          ValueError: the prompt's braces do not match.
        """
        return [column for _, column in _pieces(self.prompt) if column is not None]

    @property
    def ends_in_column(self) -> bool:
        """Whether nothing of the prompt is behind its last column.

        Raises:
          ValueError: the prompt's braces do not match.
        """
        return not _pieces(self.prompt)[-1][0]

    def read(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row; what is missing in it is empty.

        Example:
          >>> TASKS["sst2"].read({"sentence": "a joy .", "label": 1})
          'a joy . It was'
        """
        text = ""
        for before, column in _pieces(self.prompt):
            value = None if column is None else row[column]
            text += before + ("" if checks.is_missing(value) else str(value))
        return text

    @property
    def is_class(self) -> bool:
        """Whether the label is one of few, not an answer that is written out."""
        return self.metric in ("accuracy", "f1")

    @property
    def classes(self) -> tuple[Any, ...]:
        """How rows say each label."""
        return self.values or tuple(range(len(self.verbalizer or self.label_descriptions or ())))

    def label_of(self, row: Mapping[str, Any]) -> int:
        """Number of the row's label.

        Raises:
          ValueError: the column holds something else than one of `values`.
        """
        value, counted = row.get(self.label), bool(self.hub)
        number = labels.find(value, self.classes, counted)
        if number is None:
            raise ValueError(
                f"column {self.label!r}: expected one of {self.classes!r:.300}, got {value!r:.60}"
            )
        return number

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """All that is right to go on with; the first is what is learned.

        A question that has no answer has the empty one.
        """
        if self.verbalizer is not None:
            return [self.verbalizer[self.label_of(row)]]
        return answers_in(row[self.label])


Task.__new__ = renamed.arguments(  # pyright: ignore
    words="verbalizer", sentences="label_descriptions"
)(Task.__new__)


def answers_in(value: Any) -> list[str]:
    """The answers that a column holds: a text, several, or as SQuAD and DROP have them.

    Raises:
      ValueError: an object of another kind.

    Example:
      >>> answers_in({"text": ["a", "b"]}), answers_in([{"text": "a"}]), answers_in([])
      (['a', 'b'], ['a'], [''])
    """
    if isinstance(value, Mapping):
        known = [name for name in ("text", "spans") if name in value]
        if not known:
            raise ValueError(f"expected an answer, a list of them, or an object with 'text' or "
                             f"'spans', got {value!r:.60}")  # fmt: skip
        return answers_in(value[known[0]])
    if isinstance(value, (list, tuple)):
        return [answer for each in value for answer in answers_in(each)] or [""]
    if isinstance(value, bytes):
        raise ValueError(f"expected text, got {value!r:.60}")
    return ["" if checks.is_missing(value) else str(value)]


_YES_NO = ("Yes", "No")
TASKS: dict[str, Task] = {
    "sst2": Task(
        "{sentence} It was",
        verbalizer=("terrible", "great"),
        label_descriptions=("this was a terrible movie", "this was a great movie"),
        hub=("stanfordnlp/sst2",),
    ),
    "qqp": Task(
        "Are these two questions asking the same thing?\n"
        "Question 1: {question1}\nQuestion 2: {question2}\nYes or No?",
        verbalizer=("No", "Yes"),
        metric="f1",
        hub=("nyu-mll/glue", "qqp"),
    ),
    "rte": Task(
        '{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n',
        verbalizer=_YES_NO,
        values=("entailment", "not_entailment"),
        hub=("nyu-mll/glue", "rte"),
    ),
    "cb": Task(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        verbalizer=("Yes", "No", "Maybe"),
        values=("entailment", "contradiction", "neutral"),
        metric="f1",
        hub=("aps/super_glue", "cb"),
    ),
    "boolq": Task(
        "{passage} {question}?\n", verbalizer=("No", "Yes"), hub=("aps/super_glue", "boolq")
    ),
    "wic": Task(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        verbalizer=("No", "Yes"),
        hub=("aps/super_glue", "wic"),
    ),
    "wsc": Task(
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to '
        "{span1_text}? Yes or No?\n",
        verbalizer=("No", "Yes"),
        hub=("aps/super_glue", "wsc.fixed"),
    ),
    "multirc": Task(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?\n",
        verbalizer=("No", "Yes"),
        metric="f1",
        hub=("aps/super_glue", "multirc"),
    ),
    "squad": Task(
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        label="answers",
        metric="squad",
        hub=("rajpurkar/squad",),
    ),
    "drop": Task(
        "Passage: {passage}\nQuestion: {question}\nAnswer:",
        label="answers_spans",
        metric="squad",
        hub=("ucinlp/drop",),
    ),
    "xsum": Task(
        "Document: {document}\nSummary:",
        label="summary",
        metric="rouge",
        hub=("EdinburghNLP/xsum",),
    ),
    "lm": Task("", label="text", metric="perplexity"),
}
"""By name. Hub columns of class labels are numbers: `values` are for files that spell them."""
