"""Names of tensors in Hugging Face checkpoints, and what unknown ones are."""

import re
from collections.abc import Collection, Container
from typing import Any

# Buffers that old checkpoints hold and no model reads; the pooler is not part of the encoder.
UNUSED = re.compile(
    r"(^|\.)(pooler\.|seq_relationship\.|position_ids$|rotary_emb\.inv_freq$|masked_bias$"
    r"|embeddings\.mask_token$)"
)
# Copies of the embeddings under the names of heads that are tied to them.
TIED = ("lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight")
TIED_BIASES = ("lm_head.decoder.bias", "cls.predictions.decoder.bias")
TABLES = ("embed_tokens.weight", "word_embeddings.weight")
BIASES = ("lm_head.bias", "cls.predictions.bias")
_PREFIXES = ("model.", "bert.", "roberta.")
# What is called alike in both.
_OWN = ("bias", "cls_token", "position_embeddings", "running_mean", "running_var")
_QUANTIZED = re.compile(
    r"(^|[._])(qweight|qzeros|scales|g_idx|SCB|weight_scale(_inv)?|(weight|input)_zero_point"
    r"|input_scale|weight_packed|weight_format|absmax|quant_map|quant_state)($|\.)|_blocks$"
)
_HEAD = re.compile(
    r"(^|\.)(cls\.predictions\.(transform\.|(decoder\.)?bias$)"
    r"|lm_head\.(dense\.|layer_norm\.|(decoder\.)?bias$))"
)
# Patterns of names, and what tensors of such names are.
_KINDS = {
    r"(^|\.)(classifier|score|pre_classifier|classification_head|num_labels)\.":
        "the head of a classifier, which is not supported: train from its base model",
    r"(^|\.)qa_outputs\.":
        "a question-answering head, which is not supported: train from its base model",
    r"lora_|adapter|(^|\.)base_model\.":
        "an adapter, which has to be merged into its base first",
    r"(^|\.)(lm_head\.|cls\.predictions\.)decoder\.|^lm_head\.weight$":
        "a head of its own, which is not supported where the embeddings are the head",
    r"(^|\.)cls\.|(^|\.)lm_head\.": "a head of another family",
    r"crossattention|(^|\.)encoder_attn": "attention to an encoder, which is not supported",
    r"(^|\.)(module|_orig_mod)\.":
        "of a wrapped model: save the state_dict of the model inside the wrapper",
}  # fmt: skip


def tensor_names(leaf: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors that a leaf is made of: one, or one a layer.

    Example:
      >>> tensor_names("pooler/dense/kernel", 2), tensor_names("a/layers/norm/bias", 2)
      (['pooler.dense.weight'], ['a.layers.0.norm.bias', 'a.layers.1.norm.bias'])
    """
    *module, last = leaf.split("/")
    name = ".".join([*module, last if last in _OWN else "weight"])
    if not is_stacked(leaf):
        return [name]
    return [re.sub(r"\.(layers?)\.", rf".\1.{i}.", f".{name}", count=1)[1:] for i in range(layers)]


def find(name: str, there: Container[str]) -> str | None:
    """Return the name by which a checkpoint has a tensor.

    With or without the prefix of the class that saved it; norms may have TensorFlow's names,
    as BERT was published; what is tied may be there under the name of its copy only.

    Example:
      >>> find("embeddings.LayerNorm.weight", {"bert.embeddings.LayerNorm.gamma"})
      'bert.embeddings.LayerNorm.gamma'
    """
    short = name.removeprefix("model.").removeprefix("vit.")
    own = [name, short, *(prefix + name for prefix in _PREFIXES)]
    own += [re.sub(r"(norm[^.]*)\.weight$", r"\1.gamma", n, flags=re.I) for n in own]
    own += [re.sub(r"(norm[^.]*)\.bias$", r"\1.beta", n, flags=re.I) for n in own]
    if short.endswith(TABLES):
        own += TIED
    if short in BIASES:
        own.append(short.replace(".bias", ".decoder.bias"))
    return next((n for n in own if n in there), None)


def is_turned(leaf: str) -> bool:
    """Whether Hugging Face has it transposed: dense kernels are [out, in] there."""
    return leaf.endswith("/kernel")


def is_stacked(leaf: str) -> bool:
    """Whether a leaf has the layers as its first axis, which are tensors of their own there."""
    return "/layer/" in leaf or "/layers/" in leaf


def has_head(there: Collection[str], kind: str = "bert") -> bool:
    """Whether an encoder's checkpoint has its head, or parts of it.

    Of a ViT that is its classifier, of others the masked-language-model head.

    Told by the tensors: what a config says of the class that saved it is often missing, or
    names a class (``BertForPreTraining``) that has this head among others.
    """
    if kind == "vit":
        return any(name.startswith("classifier.") for name in there)
    return any(_HEAD.search(name) for name in there)


def is_quantized(name: str) -> bool:
    """Whether only a quantized checkpoint has a tensor of that name."""
    return bool(_QUANTIZED.search(name))


def missing(wanted: Collection[str], there: Collection[str]) -> str:
    """Say which tensors are missing, and what there is instead."""
    text = f"tensors missing: {_few(wanted)}"
    if all(_HEAD.search(name) for name in wanted):
        return f"{text}: of the masked-language-model head only a part is there"
    return f"{text}{_what(there)}; it has {_few(there)}"


def unknown(surplus: Collection[str]) -> str:
    """Say which tensors are unknown, and what such tensors are."""
    return f"unknown tensors: {_few(surplus)}{_what(surplus)}"


def _what(names: Collection[str]) -> str:
    for pattern, what in _KINDS.items():
        if found := [n for n in names if re.search(pattern, n)]:
            return f"; {min(found)!r} is {what}"
    return ""


def _few(names: Any) -> str:
    first = sorted(names)[:4]
    return f"{first}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
