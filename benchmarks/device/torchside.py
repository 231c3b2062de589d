"""MeZO's loop in PyTorch against ours on one device, each in a process of its own.

Two frameworks in a process disagree about CUDA's libraries and about who holds the memory, so that
one is started after the other has ended:

python -m benchmarks.device.torchside ours '{"shape": "opt-1m", ...}' FOLDER
python -m benchmarks.device.torchside theirs '{"shape": "opt-1m", ...}' FOLDER gpu
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.device.results import Skip

CHECKED = ("opt-1m", "opt-10m", "opt-30m", "opt-125m")
"""Shapes whose weights are handed over in a folder and whose losses are compared; larger ones
would take longer to write and read than to measure, and PyTorch has random weights of its own."""
LAWS = ("normal", "rademacher")
LONGEST = 120
"""Seconds of a side."""


def _options(options: dict[str, Any], law: str = "normal") -> Any:
    from benchmarks import peers

    given: dict[str, Any] = dict(method="decomfl", distribution=law, clients=2, batch=32, length=32)
    return peers.Options(**(given | options))


def _say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def ours(options: dict[str, Any], folder: str) -> None:
    """Seconds of our round, a line a law; the weights go to `folder`."""
    import jax
    import jax.numpy as jnp

    from benchmarks import peers, timing
    from benchmarks import round as rounds
    from hiso_jax import models

    _say(machine=timing.machine(), platform=jax.default_backend())
    own = _options(options)
    kind = jnp.dtype(own.dtype)
    model = models.from_config(rounds.config(own.shape), jax.random.key(0), kind)
    data = rounds.batches(own)
    if own.shape in CHECKED:
        models.save_pretrained(model, folder)
        _say(loss=peers.first_loss(model, data))
    for law in LAWS:
        own = _options(options, law)
        step, state = rounds.program(model, own), [rounds.start(model, own)]

        def mine(step: Any = step, state: list[Any] = state) -> jax.Array:
            state[0], metrics = step(state[0], data)
            return metrics.record

        _say(setting=law, seconds=timing.interleaved({law: mine}, own.repeats)[law])
        state.clear()


def theirs(options: dict[str, Any], folder: str, platform: str) -> None:
    """Seconds of PyTorch's round, a line a setting, the surest first."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import peers, timing
    from benchmarks import round as rounds

    own = _options(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and platform != "cpu":
        return _say(skip=f"this torch has no CUDA, and ours was measured on {platform}")
    shown = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    _say(machine=f"torch {torch.__version__}, {shown}, {torch.get_num_threads()} threads")
    torch.set_float32_matmul_precision("high")  # TF32, as JAX does without being asked
    data = rounds.batches(own)
    handed = own.shape in CHECKED
    model = peers.torch_model(own, folder if handed else None, device)
    settings = {
        "sequential": lambda: peers.Loop(model, own, data, False),
        "shared": lambda: peers.Loop(model, own, data, True),
        "shared, one batch": lambda: peers.Loop(model, own, data, True, True),
    }
    if handed:
        with torch.inference_mode():
            _say(loss=float(settings["sequential"]().losses([0], 0)[0]))
    if device == "cuda":
        settings["shared, one batch, torch.compile"] = lambda: peers.Loop(
            torch.compile(model), own, data, True, True
        )
    for name, make in settings.items():
        try:
            _say(setting=name, seconds=timing.interleaved({name: make()}, own.repeats)[name])
        except Exception as error:  # of one setting: the others are figures all the same
            _say(setting=name, failed=str(error).splitlines()[0][:200])


def _lines(options: dict[str, Any], folder: str, platform: str | None = None) -> list[Any]:
    """What a side says, as far as it gets: ours, or theirs beside ours on a platform."""
    side, own, environment = "ours", [], dict(os.environ)
    if platform is not None:  # there JAX computes nothing, and shall not take the device
        side, own, environment = "theirs", [platform], environment | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.device.torchside", side, json.dumps(options)]
    try:
        done = subprocess.run([*command, folder, *own], stdout=subprocess.PIPE, text=True,
                              env=environment, timeout=LONGEST)  # fmt: skip
        said, end = done.stdout, f"ended with {done.returncode}"
    except subprocess.TimeoutExpired as over:  # what was had until then are figures all the same
        said = over.stdout.decode() if isinstance(over.stdout, bytes) else over.stdout or ""
        end = f"was stopped after {LONGEST} s"
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if skips := [line["skip"] for line in found if "skip" in line]:
        raise Skip(skips[0])
    if not any("seconds" in line for line in found):
        raise RuntimeError(f"{side}: the process {end}; see log.txt")
    return found


def measure(**options: Any) -> dict[str, Any]:
    """Seconds of each setting of both, and how many times faster our best is than theirs."""
    if importlib.util.find_spec("torch") is None:
        raise Skip("torch is not installed")
    with tempfile.TemporaryDirectory() as folder:
        mine = _lines(options, folder)
        platform = next(line["platform"] for line in mine if "platform" in line)
        other = _lines(options, folder, platform)
    machines = [line["machine"] for line in (*mine, *other) if "machine" in line]
    losses = [line["loss"] for line in (*mine, *other) if "loss" in line]
    bound = 1e-3 if options["dtype"] == "float32" else 5e-2
    if len(losses) == 2 and abs(losses[0] - losses[1]) > bound:
        raise AssertionError(f"the two do not compute the same loss: {losses}")
    seconds = [{x["setting"]: x["seconds"] for x in side if "seconds" in x}
               for side in (mine, other)]  # fmt: skip
    best = [min(own, key=lambda k: own[k]) for own in seconds]
    failed = {x["setting"]: x["failed"] for x in (*mine, *other) if "failed" in x}
    sizes = dataclasses.asdict(_options(options))
    del sizes["distribution"]
    theirs = seconds[1][best[1]]
    return sizes | {
        "ours": seconds[0], "theirs": seconds[1], "best": best, "machines": machines,
        "compared_losses": losses, "failed": failed,
        "times_faster": theirs / seconds[0][best[0]],
        # The same law of noise for both: what remains is the two loops.
        "times_faster_same_law": theirs / seconds[0]["normal"],
    }  # fmt: skip


if __name__ == "__main__":
    side, given, *rest = sys.argv[1:]
    {"ours": ours, "theirs": theirs}[side](json.loads(given), *rest)
