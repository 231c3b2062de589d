"""Prompted tasks as data: what a model reads, which words are its answers, what is measured.

Templates and words are MeZO's (arXiv 2305.17333, table 14), which DeComFL and HiSo use too.
"""

import string
from collections.abc import Mapping
from typing import Any, NamedTuple


class Task(NamedTuple):
    """A task on rows with named columns.

    Attributes:
      prompt: what the model reads; columns in braces.
      label: column of the label, or of the answer.
      words: the answer to each label, in the order of `values`; None: the column is the answer.
      values: how the column says each label; None: 0, 1, ...
      metric: ``"accuracy"``, ``"f1"`` (macro), ``"squad"`` (exact match and F1), ``"rouge"``.
      sentences: one a label, for encoders: the label whose sentence is nearest is chosen.
      hub: arguments of ``datasets.load_dataset``; empty: local files only.
    """

    prompt: str
    label: str = "label"
    words: tuple[str, ...] | None = None
    values: tuple[Any, ...] | None = None
    metric: str = "accuracy"
    sentences: tuple[str, ...] | None = None
    hub: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that the prompt reads."""
        return [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name]

    def read(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Example:
          >>> TASKS["sst2"].read({"sentence": "a joy .", "label": 1})
          'a joy . It was'
        """
        return self.prompt.format(**{name: row[name] for name in self.columns})

    def label_of(self, row: Mapping[str, Any]) -> int:
        """Number of the row's label.

        Raises:
          ValueError: the column holds something else than one of `values`.
        """
        count = len(self.words or self.sentences or ())
        values, value = self.values or tuple(range(count)), row[self.label]
        if isinstance(value, int) and isinstance(values[0], str) and 0 <= value < count:
            return value  # the hub counts what files spell
        for number, known in enumerate(values):
            if value == known or str(value) == str(known):
                return number
        raise ValueError(f"column {self.label!r}: expected one of {values}, got {value!r}")

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """All that is right to go on with; the first is what is learned."""
        if self.words is not None:
            return [self.words[self.label_of(row)]]
        value = row[self.label]
        # On the hub, SQuAD has {"text": [answer, ...]} and DROP {"spans": [...]}.
        if isinstance(value, Mapping):
            value = value["text"] if "text" in value else value["spans"]
        return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


_YES_NO = ("Yes", "No")
TASKS: dict[str, Task] = {
    "sst2": Task(
        "{sentence} It was",
        words=("terrible", "great"),
        sentences=("this was a terrible movie", "this was a great movie"),
        hub=("stanfordnlp/sst2",),
    ),
    "qqp": Task(
        "Are these two questions asking the same thing?\n"
        "Question 1: {question1}\nQuestion 2: {question2}\nYes or No?",
        words=("No", "Yes"),
        metric="f1",
        hub=("nyu-mll/glue", "qqp"),
    ),
    "rte": Task(
        '{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n',
        words=_YES_NO,
        values=("entailment", "not_entailment"),
        hub=("nyu-mll/glue", "rte"),
    ),
    "cb": Task(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        words=("Yes", "No", "Maybe"),
        values=("entailment", "contradiction", "neutral"),
        metric="f1",
        hub=("aps/super_glue", "cb"),
    ),
    "boolq": Task("{passage} {question}?\n", words=("No", "Yes"), hub=("aps/super_glue", "boolq")),
    "wic": Task(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        words=("No", "Yes"),
        hub=("aps/super_glue", "wic"),
    ),
    "wsc": Task(
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to '
        "{span1_text}? Yes or No?\n",
        words=("No", "Yes"),
        hub=("aps/super_glue", "wsc.fixed"),
    ),
    "multirc": Task(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?\n",
        words=("No", "Yes"),
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
