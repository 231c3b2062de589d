"""Times of several programs, taken in turns, so that a noisy machine is noisy for all."""

import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def interleaved(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each program; the first call of each is not counted."""
    for program in programs.values():
        jax.block_until_ready(program())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def machine() -> str:
    """What the figures were taken on, in a line."""
    with open("/proc/cpuinfo") as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    cpu = f"{len(names)} x {names[0]}" if names else platform.processor()
    device = jax.devices()[0].device_kind
    return f"{cpu}, {device}, Python {platform.python_version()}, jax {jax.__version__}"
