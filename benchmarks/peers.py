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
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import round as ours
from benchmarks import timing
from hiso_jax import directions, models

console = Console()


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


class Loop:
    """HiSo in PyTorch: noise regenerated from seeds, weights perturbed in place."""

    def __init__(self, folder: str, options: Options, data: dict[str, np.ndarray], shared: bool):
        import torch
        from transformers import OPTForCausalLM

        self.torch, self.options, self.shared = torch, options, shared
        self.model = OPTForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        self.weights = [p for p in self.model.parameters()]
        self.curvature = [torch.ones_like(p) for p in self.weights]
        self.data = {k: torch.from_numpy(v.astype(np.int64)) for k, v in data.items()}
        self.round, self.rate, self.smoothing, self.decay = 0, 1e-6, 1e-3, 0.95

    def noise(self, step: int, perturbation: int) -> Iterator[Any]:
        """Directions of all weights, one after another, from the seed."""
        torch = self.torch
        seed = hash((self.round, step, perturbation)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        for weight, h in zip(self.weights, self.curvature, strict=True):
            if self.options.distribution == "rademacher":
                z = torch.empty_like(weight).random_(0, 2, generator=generator).mul_(2).sub_(1)
            else:
                z = torch.empty_like(weight).normal_(generator=generator)
            yield z.mul_(torch.rsqrt(h))

    def shift(self, step: int, perturbation: int, scale: float) -> None:
        """Add a direction to the weights, in place."""
        for weight, z in zip(self.weights, self.noise(step, perturbation), strict=True):
            weight.add_(z, alpha=scale)

    def loss(self, client: int, step: int) -> float:
        """Loss of a client's batch: the label's word at the last position."""
        ids, label = (self.data[k][client, step] for k in ("input_ids", "label"))
        logits = self.model(ids, logits_to_keep=1, use_cache=False).logits[:, -1, list(ours.WORDS)]
        return float(self.torch.nn.functional.cross_entropy(logits, label))

    def scalars(self, clients: list[int], step: int) -> np.ndarray:
        """Scalars [clients, P], every perturbation added and taken off once."""
        base = np.array([self.loss(c, step) for c in clients])
        found = []
        for p in range(self.options.num_perturbations):
            self.shift(step, p, self.smoothing)
            moved = np.array([self.loss(c, step) for c in clients])
            self.shift(step, p, -self.smoothing)
            found.append((moved - base) / self.smoothing)
        return np.stack(found, 1)

    def step(self, scalars: np.ndarray, step: int, last: bool) -> None:
        """Move the weights by scalars [P], and with the last step of a round the curvature."""
        torch, count = self.torch, len(scalars)
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
        """A whole round; returns its record [K, P]."""
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
        self.round += 1
        return record


def measure(options: Options) -> dict[str, Any]:
    """Seconds of a round of each, and how many times faster ours is."""
    model = models.from_config(ours.config(options.shape), jax.random.key(0))
    data = ours.batches(options)
    step, state = ours.program(model, options), [ours.start(model, options)]

    def mine() -> jax.Array:
        state[0], metrics = step(state[0], data)
        return metrics.record

    loops: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models.save_pretrained(model, folder)
        loops["sequential"] = Loop(folder, options, data, shared=False)
        if options.local_steps == 1:
            loops["shared"] = Loop(folder, options, data, shared=True)
    first = jax.tree.map(lambda x: x[0, 0], data)
    with loops["sequential"].torch.inference_mode():  # pyright: ignore
        theirs = loops["sequential"].loss(0, 0)  # pyright: ignore
    if abs(theirs - float(ours.loss_of(model)(model.params, first))) > 1e-4:
        raise AssertionError("the two do not compute the same loss")
    seconds = timing.interleaved({"ours": mine} | loops, options.repeats)
    return dict(
        dataclasses.asdict(options),
        machine=timing.machine(),
        seconds=seconds,
        **{f"times_faster_than_{n}": seconds[n] / seconds["ours"] for n in loops},
    )


def main(options: Options) -> None:
    """Measure and print."""
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
