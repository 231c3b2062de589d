"""The same round in PyTorch, as one would write it there, side by side in one run.

python -m benchmarks.peers --shape opt-125m --json        # needs PyTorch: make parity
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import round as ours
from benchmarks import timing
from hiso_jax import directions, models


@dataclasses.dataclass(frozen=True)
class Options(ours.Options):
    """A HiSo round of this library and of two loops in PyTorch on transformers' OPT.

    `sequential` is what MeZO and the simulations built on it do: one client after another draws
    every perturbation anew from its seed, adds it to the weights in place, and takes it off again.
    `shared` is as fast as we could make it: with one local step a perturbation is the same
    for all clients, so it is added once for all of them.
    """

    distribution: directions.Distribution = "normal"
    """Noise; PyTorch has its own normal one for near_normal."""
    repeats: int = 1
    """Times that each is timed, in turns, after one that is not."""


def torch_model(options: Options, folder: str | None = None, device: str = "cpu") -> Any:
    """OPT of transformers in PyTorch, with the weights of a folder, or else random ones."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    kind: dict[str, Any] = dict(attn_implementation="sdpa", dtype=getattr(torch, options.dtype))
    if folder is None:
        with torch.device(device):  # where a billion random numbers take no time
            model: Any = AutoModelForCausalLM.from_config(ours.config(options.shape), **kind)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **kind)
    return model.to(device).eval()


class Loop:
    """A round in PyTorch: noise regenerated from seeds, weights perturbed in place.

    Args:
      model: from `torch_model`; loops may share one.
      options: with ``method="decomfl"`` it is MeZO's loop, without curvature or sums of noise.
      data: from `benchmarks.round.batches`.
      shared: whether a perturbation is added once for all clients, as K = 1 allows.
      together: whether all clients then go through the model as one batch.
    """

    def __init__(
        self,
        model: Any,
        options: Options,
        data: dict[str, np.ndarray],
        shared: bool,
        together: bool = False,
    ):
        import torch  # pyright: ignore[reportMissingImports]

        self.torch, self.options, self.shared, self.together = torch, options, shared, together
        self.model, self.weights = model, list(model.parameters())
        self.device = self.weights[0].device
        self.curvature = None
        if options.method == "hiso":
            self.curvature = [torch.ones_like(p, dtype=torch.float32) for p in self.weights]
        kept = {k: torch.from_numpy(v.astype(np.int64)) for k, v in data.items()}
        self.data = {k: v.to(self.device) for k, v in kept.items()}
        self.round, self.rate, self.smoothing, self.decay = 0, 1e-6, 1e-3, 0.95

    def noise(self, step: int, perturbation: int) -> Iterator[Any]:
        """Directions of all weights, one after another, from the seed."""
        torch = self.torch
        seed = hash((self.round, step, perturbation)) % 2**63
        generator = torch.Generator(self.device).manual_seed(seed)
        for i, weight in enumerate(self.weights):
            if self.options.distribution == "rademacher":
                z = torch.empty_like(weight).random_(0, 2, generator=generator).mul_(2).sub_(1)
            else:
                z = torch.empty_like(weight).normal_(generator=generator)
            yield z if self.curvature is None else z.mul_(torch.rsqrt(self.curvature[i]))

    def shift(self, step: int, perturbation: int, scale: float) -> None:
        """Add a direction to the weights, in place."""
        for weight, z in zip(self.weights, self.noise(step, perturbation), strict=True):
            weight.add_(z, alpha=scale)

    def losses(self, clients: list[int], step: int) -> Any:
        """Losses of clients' batches, on the device: the label's word at the last position."""
        if not self.together:
            return self.torch.stack([self._losses(slice(c, c + 1), step)[0] for c in clients])
        return self._losses(slice(clients[0], clients[-1] + 1), step)

    def _losses(self, clients: slice, step: int) -> Any:
        ids, label = (self.data[k][clients, step] for k in ("input_ids", "label"))
        logits = self.model(ids.flatten(0, 1), logits_to_keep=1, use_cache=False).logits
        picked = logits[:, -1, list(ours.WORDS)].float()
        each = self.torch.nn.functional.cross_entropy(picked, label.flatten(), reduction="none")
        return each.reshape(label.shape).mean(1)

    def scalars(self, clients: list[int], step: int) -> np.ndarray:
        """Scalars [clients, P], every perturbation added and taken off once."""
        base = self.losses(clients, step)
        found = []
        for p in range(self.options.num_perturbations):
            self.shift(step, p, self.smoothing)
            moved = self.losses(clients, step)
            self.shift(step, p, -self.smoothing)
            found.append((moved - base) / self.smoothing)
        return self.torch.stack(found, 1).cpu().numpy()

    def step(self, scalars: np.ndarray, step: int, last: bool) -> None:
        """Move the weights by scalars [P], and with the last step of a round the curvature."""
        torch, count = self.torch, len(scalars)
        if self.curvature is None:
            for p, scalar in enumerate(scalars):
                self.shift(step, p, -self.rate * float(scalar) / count)
            return
        delta = [torch.zeros_like(w) for w in self.weights]
        for p, scalar in enumerate(scalars):
            for d, z in zip(delta, self.noise(step, p), strict=True):
                d.add_(z, alpha=float(scalar) / count)
        for w, h, d in zip(self.weights, self.curvature, delta, strict=True):
            w.add_(d, alpha=-self.rate)
            if last:
                h.mul_(self.decay).addcmul_(d, d, value=1 - self.decay).add_(
                    1e-8 * (1 - self.decay)
                )

    def __call__(self) -> np.ndarray:
        """A whole round; returns its record [K, P] when the device is done."""
        options = self.options
        every, steps = list(range(options.clients)), options.local_steps
        with self.torch.inference_mode():
            if steps == 1 and self.shared:
                sent = self.scalars(every, 0)[:, None]
            elif steps == 1:
                sent = np.stack([self.scalars([c], 0) for c in every])
            else:
                kept = [w.clone() for w in self.weights]
                sent = np.zeros((options.clients, steps, options.num_perturbations))
                for c in every:
                    for k in range(steps):
                        sent[c, k] = self.scalars([c], k)[0]
                        if k + 1 < steps:
                            self.step(sent[c, k], k, False)
                    for w, old in zip(self.weights, kept, strict=True):
                        w.copy_(old)
            record = sent.mean(0)
            for k in range(steps):
                self.step(record[k], k, k + 1 == steps)
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        self.round += 1
        return record


def measure(options: Options) -> dict[str, Any]:
    """Seconds of a round of each, and how many times faster ours is."""
    import torch  # pyright: ignore[reportMissingImports]

    model = models.from_config(
        ours.config(options.shape), jax.random.key(0), jnp.dtype(options.dtype)
    )
    data = ours.batches(options)
    step, state = ours.program(model, options), [ours.start(model, options)]

    def mine() -> jax.Array:
        state[0], metrics = step(state[0], data)
        return metrics.record

    with tempfile.TemporaryDirectory() as folder:
        models.save_pretrained(model, folder)
        loops: dict[str, Callable[[], Any]] = {}
        for name in ("sequential", "shared")[: 2 if options.local_steps == 1 else 1]:
            loops[name] = Loop(torch_model(options, folder), options, data, name == "shared")
    with torch.inference_mode():
        theirs = float(loops["sequential"].losses([0], 0)[0])  # pyright: ignore
    if abs(theirs - first_loss(model, data)) > (1e-4 if options.dtype == "float32" else 3e-2):
        raise AssertionError("the two do not compute the same loss")
    seconds = timing.interleaved({"ours": mine} | loops, options.repeats)
    return dict(
        dataclasses.asdict(options),
        machine=timing.machine(),
        seconds=seconds,
        **{f"times_faster_than_{n}": seconds[n] / seconds["ours"] for n in loops},
    )


def first_loss(model: models.Model, data: dict[str, np.ndarray]) -> float:
    """Loss of the first client's first batch, to be compared with PyTorch's."""
    first = jax.tree.map(lambda x: x[0, 0], data)
    return float(jax.jit(ours.loss_of(model))(model.params, first))


def main(options: Options) -> None:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    start = time.perf_counter()
    found = measure(options)
    table = Table(
        title=f"{options.shape}, {options.clients} clients x {options.batch} x {options.length} "
        f"tokens, K = {options.local_steps}, P = {options.num_perturbations}, "
        f"{options.distribution}"
    )
    for column in ("", "seconds a round", "times ours"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in found["seconds"].items():
        table.add_row(name, f"{value:.2f}", f"{value / found['seconds']['ours']:.2f}")
    console.print(found["machine"])
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
