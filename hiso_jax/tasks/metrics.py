"""Scores of generated answers: SQuAD's exact match and F1, and ROUGE-L."""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and needless space, as SQuAD's own script.

    Example:
      >>> normalize("The  Eiffel Tower!")
      'eiffel tower'
    """
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _f1(guess: str, answer: str) -> float:
    ours, theirs = normalize(guess).split(), normalize(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def squad(guesses: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean ``exact_match`` and ``f1`` in [0, 1] against the best of each example's answers.

    A question that has no answer is answered rightly by nothing, as SQuAD 2.0 counts.

    Example:
      >>> squad(["the tower", "Rome"], [["Tower", "a hut"], ["in Paris"]])
      {'exact_match': 0.5, 'f1': 0.5}
    """
    pairs = [(guess, own or [""]) for guess, own in zip(guesses, answers, strict=True)]
    match = [max(normalize(g) == normalize(a) for a in own) for g, own in pairs]
    f1 = [max(_f1(g, a) for a in own) for g, own in pairs]
    return {"exact_match": float(np.mean(match)), "f1": float(np.mean(f1))}


def rouge(guesses: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean ``rouge_l`` F-measure in [0, 1], with stemming, by the package rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        max(scorer.score(a, g)["rougeL"].fmeasure for a in own)
        for g, own in zip(guesses, answers, strict=True)
    ]
    return {"rouge_l": float(np.mean(scores))}


def check(metric: str) -> None:
    """Raise ValueError if a package that a metric needs is not installed."""
    if metric == "rouge":
        try:
            import rouge_score  # noqa: F401
        except ImportError:
            raise ValueError(
                "this task is scored with rouge-score, which is missing: pip install rouge-score"
            ) from None


METRICS = {"squad": squad, "rouge": rouge}
"""By the name that a task gives; the others are computed from losses and logits."""
