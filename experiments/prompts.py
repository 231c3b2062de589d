"""Prompts and label words for a language model, compared on training examples without training.

    python -m experiments.prompts experiments/prompts.toml
    python -m experiments.prompts experiments/prompts_rte.toml --task rte --data RTE_FOLDER

The file has candidates, each a prompt and a word for each label. What is printed: accuracy, loss,
and accuracy if every label's logit is measured from its median, which shows how much of the error
is a preference for one of the words.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.markup import escape
from rich.table import Table

from hiso_jax import models
from hiso_jax.tasks import data, docstrings, splits, text
from hiso_jax.tasks.prompts import Task
from hiso_jax.train import finetune, llm, report

AT_ONCE = 40
"""Examples computed at a time."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare prompts and label words on examples of the training split."""

    candidates: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """TOML with [[candidate]] tables of `prompt` and `verbalizer`."""
    data: Path | None = None
    """Data of a task in place of the docstrings, as `hiso llm` takes them."""
    task: str = "sst2"
    """Which task they are of."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV without a header line."""
    model: str | None = None
    """Folder, GGUF file or hub id of a decoder; by default SmolLM2."""
    examples: int = 240
    """Training examples, drawn at random."""
    length: int = 48
    """Tokens that a prompt is cut to."""


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, mean loss, and accuracy with each label's median taken off.

    Args:
      logits: float [N, labels].
      labels: int [N].

    Example:
      >>> score(np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([1, 0]))["calibrated"]
      1.0
    """
    log = np.asarray(jax.nn.log_softmax(logits))
    middle = logits - np.median(logits, 0)
    return {
        "accuracy": float((logits.argmax(1) == labels).mean()),
        "loss": float(-log[np.arange(len(labels)), labels].mean()),
        "calibrated": float((middle.argmax(1) == labels).mean()),
    }


def _task(options: Options, prompt: str, words: tuple[str, ...]) -> Task:
    if options.data is None:
        return Task(prompt, verbalizer=words)
    asked = finetune.Options(
        task=options.task, data=options.data, columns=options.columns, prompt=prompt,
        verbalizer=words,
    )  # fmt: skip
    return finetune.task_of(asked)


def _train(options: Options, task: Task) -> data.Rows:
    """The training split, as the job reads it."""
    if options.data is not None:
        return data.read(task, options.data, options.columns, seed=0).parts["train"]
    examples = [e._asdict() for e in docstrings.load()]
    return [examples[i] for i in splits.train_dev_test(len(examples), seed=0)[0]]


def run(options: Options) -> list[dict[str, Any]]:
    """Measure every candidate; return a row for each, the lowest loss first."""
    candidates = tomllib.loads(options.candidates.read_text()).get("candidate", [])
    if not candidates:
        raise ValueError(f"{options.candidates}: expected [[candidate]] tables, got none")
    folder = options.model or str(llm.bundled_model())
    tokenizer, model = models.load_tokenizer(folder), models.from_pretrained(folder)
    tasks = [_task(options, each["prompt"], tuple(each["verbalizer"])) for each in candidates]
    train = _train(options, tasks[0])
    picks = np.random.default_rng(0).permutation(len(train))[: options.examples]
    rows = [train[i] for i in picks]

    @jax.jit
    def logits_of(params: Any, ids: jax.Array, mask: jax.Array, tokens: jax.Array) -> jax.Array:
        return model.head(params, model.hidden(params, ids, mask)[:, -1], tokens)

    out = []
    with report.progress() as bar:
        task_bar = bar.add_task("candidates", total=len(candidates), status="compiling")
        for done, (candidate, task) in enumerate(zip(candidates, tasks, strict=True), 1):
            shared, firsts = text.word_tokens(task, tokenizer)
            batch = text.words(task, tokenizer, rows, options.length, shared)
            parts = [
                logits_of(model.params, *(batch[k][i : i + AT_ONCE] for k in
                                          ("input_ids", "attention_mask")), jnp.asarray(firsts))
                for i in range(0, len(rows), AT_ONCE)
            ]  # fmt: skip
            out.append(candidate | score(np.concatenate(parts), batch["label"]))
            bar.update(task_bar, completed=done, status=candidate["prompt"].replace("\n", " / "))
    return sorted(out, key=lambda row: row["loss"])


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `run`; prompts may have brackets, which are no markup."""
    out = Table("prompt", "words", "accuracy", "calibrated", "loss")
    for row in rows:
        out.add_row(
            escape(repr(row["prompt"])), escape(", ".join(row["verbalizer"])),
            f"{row['accuracy']:.1%}", f"{row['calibrated']:.1%}", f"{row['loss']:.2f}",
        )  # fmt: skip
    return out


if __name__ == "__main__":
    with report.door():
        report.console.print(table(run(tyro.cli(Options))))
