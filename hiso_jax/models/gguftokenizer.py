"""The tokenizer that a GGUF file holds as metadata, made with transformers and without torch."""

from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax.models.gguffile import GGUFFile

_KEY = "tokenizer.ggml."
# What the file says, and what transformers' conversion calls it.
_NAMES = {
    "model": "tokenizer_type", "pre": "pre_tokenizer_type", "scores": "scores",
    "token_type": "token_type", "add_space_prefix": "add_prefix_space",
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id", "padding_token_id": "pad_token_id",
}  # fmt: skip
_SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unk_token_id",
            "pad_token": "pad_token_id"}  # fmt: skip


def tokenizer_of(path: Path) -> Any:
    """The tokenizer of a GGUF file, whose ids are those of ``AutoTokenizer(gguf_file=)``.

    Args:
      path: of the file.

    Returns:
      A transformers tokenizer.

    Raises:
      ValueError: the file holds none, or one of a kind that transformers does not convert.
    """
    with GGUFFile(path) as file:
        found = {new: file.fields.get(_KEY + old) for old, new in _NAMES.items()}
        tokens, merges = (file.words(_KEY + name) for name in ("tokens", "merges"))
        template, architecture = file.fields.get("tokenizer.chat_template"), file.architecture
        begins, ends = (file.fields.get(f"{_KEY}add_{name}_token") for name in ("bos", "eos"))
    if not tokens or found["tokenizer_type"] is None:
        raise ValueError(f"{path}: no tokenizer is in it (metadata {_KEY}tokens and {_KEY}model); "
                         "load that of the folder the file was made from")  # fmt: skip
    held = {k: x.tolist() if isinstance(x, np.ndarray) else x for k, x in found.items()}
    held = {k: x for k, x in held.items() if x is not None} | {"tokens": tokens}
    held |= {"merges": merges} if merges else {}
    try:
        return _convert(architecture, held, template, begins, ends)
    except Exception as error:  # of any type, as from other broken files of tokenizers
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path}: no tokenizer can be made of its metadata, {_KEY}model is "
                         f"{held['tokenizer_type']!r:.40} ({reason:.200})") from error  # fmt: skip


def _convert(architecture: str, held: dict[str, Any], template: Any, begins: Any, ends: Any) -> Any:
    from transformers import PreTrainedTokenizerFast  # slow imports, and only needed here

    # Not AutoTokenizer: from transformers 5.24 on it imports torch to read a GGUF file.
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ImportError:  # of before
        from transformers.integrations.ggml import (  # pyright: ignore
            convert_gguf_tokenizer,  # pyright: ignore
        )
    backend, more = convert_gguf_tokenizer(architecture, held)
    tokens = held["tokens"]
    special = {name: tokens[held[key]] for name, key in _SPECIAL.items() if key in held}
    if begins is None:  # as llama.cpp takes it
        begins = held["tokenizer_type"] == "llama"
    given = {"bos_token": None, "eos_token": None} | more | special
    given |= {"add_bos_token": bool(begins), "add_eos_token": bool(ends)}
    given |= {"chat_template": template} if template else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)
