"""NVFlare with real processes on loopback: one server, sites, mutual TLS, and what kills them."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hiso_jax.nvflare import job as jobs
from hiso_jax.nvflare import machine, session
from hiso_jax.train import rows
from tests.helpers import ROOT

PROJECT = """
api_version: 3
name: three
participants:
- {{name: localhost, type: server, org: lab, fed_learn_port: {port}, admin_port: {port}}}
{clients}
- {{name: lead@lab.org, type: admin, org: lab, role: lead}}
builders:
- {{path: nvflare.lighter.impl.workspace.WorkspaceBuilder,
    args: {{template_file: [master_template.yml]}}}}
- {{path: nvflare.lighter.impl.static_file.StaticFileBuilder, args: {{config_folder: config}}}}
- {{path: nvflare.lighter.impl.cert.CertBuilder}}
- {{path: nvflare.lighter.impl.signature.SignatureBuilder}}
"""
PATIENCE = 240.0
"""Seconds for what takes a few where nothing else runs."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def until(what: Callable[[], Any], say: str, patience: float = PATIENCE) -> Any:
    """Wait until something holds; return it."""
    end = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < end, f"{say}: not within {patience:.0f} s"
        time.sleep(0.1)
    return found


def provision(
    folder: Path, sites: list[str], port: int, through: dict[str, int] | None = None
) -> Path:
    """Startup kits by NVFlare's own tool; return the folder that they are in.

    Sites reach the server at its port, or at the one that `through` has for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    way = {
        name: f", connect_to: {{host: localhost, port: {at}}}"
        for name, at in (through or {}).items()
    }
    clients = "\n".join(
        f"- {{name: {name}, type: client, org: ward{way.get(name, '')}}}" for name in sites
    )
    (folder / "project.yml").write_text(PROJECT.format(port=port, clients=clients))
    command = [
        sys.executable, "-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", "made", "--force"
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, capture_output=True)
    return folder / "made/three/prod_00"


def environment(folder: Path) -> dict[str, str]:
    """Of a process of NVFlare: a home of its own, the tests on its path, and the tests' compiler.

    Losses, which nobody promises the bits of, are those of a simulation in this process then.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    fewer = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "JAX_PLATFORMS": "cpu"}
    return dict(os.environ) | fewer | {"HOME": str(folder), "PYTHONPATH": str(ROOT), "PATH": path}


class Flare:
    """Processes of a federation, by name; ``server`` is one of them."""

    def __init__(self, folder: Path, sites: list[str], through: dict[str, int] | None = None):
        self.folder, self.sites, self.port = folder, sites, free_port()
        self.kits = provision(folder, sites, self.port, through)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.lead = session.Lead(self.kits / "lead@lab.org")
        for name in ("server", *sites):
            self.prepare(name)

    def kit(self, name: str) -> Path:
        return self.kits / {"server": "localhost"}.get(name, name)

    def prepare(self, name: str, wrong: str = "", **settings: Any) -> None:
        """Prepare a machine; a site may be told what to do wrong, see `tests.parties.party`."""
        own = dict(functions=("tests.parties:party",)) | settings
        machine.prepare(machine.Options(self.kit(name), **own))
        if wrong:
            path = self.kit(name) / "local/hiso.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"data": wrong}))

    def start(self, *names: str) -> None:
        for name in names or ("server", *self.sites):
            with open(self.folder / f"{name}.log", "ab") as log:
                self.processes[name] = subprocess.Popen(
                    ["bash", str(self.kit(name) / "startup/sub_start.sh"), "--once"],
                    cwd=self.kit(name), env=environment(self.folder), stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip

    def kill(self, *names: str) -> None:
        """SIGKILL to everything that a machine runs, as a power cut."""
        for name in names:
            for each in [*self.children(name), self.processes[name].pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            self.processes.pop(name).wait()

    def children(self, name: str) -> list[int]:
        """Processes of the jobs of a machine."""
        import psutil

        try:
            found = psutil.Process(self.processes[name].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE]

    def kill_job(self, name: str) -> None:
        """SIGKILL to the process of the job only."""
        for each in until(lambda: self.children(name), f"a job of {name}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def wait(self, *names: str) -> None:
        """Until those sites, or all, are connected."""
        wanted = set(names or self.sites)
        until(lambda: wanted <= set(self.lead.connected()), f"{sorted(wanted)} connected")

    def write(self, **options: Any) -> Path:
        """Write a job with the options of the command line."""
        given: dict[str, Any] = dict(
            sites=tuple(self.sites), party="tests.parties:party", rounds=6, deadline=60.0,
            clients_per_round=len(self.sites), snapshot_every=3,
        )  # fmt: skip
        out = self.folder / "job"
        shutil.rmtree(out, ignore_errors=True)
        jobs.write(dataclasses.replace(jobs.Options(), out=out, **given | options))
        return out

    def submit(self, **options: Any) -> str:
        """The same, and submit it."""
        out = self.write(**options)
        return until(lambda: self.lead.submit(out), "submitted")

    def finish(self, job: str, patience: float = PATIENCE) -> str:
        """Wait for the end of a job; return how it ended."""
        return until(
            lambda: (s := self.lead.status(job)).startswith("FINISHED") and s,
            f"{job} ended",
            patience,
        )

    def kept(self, name: str, run: str = "hiso") -> Path:
        """What a machine keeps of a run."""
        return self.kit(name) / "hiso" / run

    def rows(self, run: str = "hiso") -> list[dict[str, Any]]:
        """The rounds that the server has written down."""
        return rows.read(self.kept("server", run) / "rounds.jsonl")

    def result(self, name: str = "server") -> dict[str, Any]:
        return json.loads((self.kept(name) / "result.json").read_text())

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        self.lead.close()
        self.kill(*self.processes)

    def __enter__(self) -> "Flare":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Proxy:
    """Hands on what comes to its port, until it is cut."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.target, self.bytes = self._listener.getsockname()[1], 0, 0
        self._open: set[socket.socket] = set()
        self._whole, self._closed = True, False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close all connections, and take no new ones."""
        self._whole = False
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._whole = True

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._whole:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._hand_on, args=pair, daemon=True).start()

    def _hand_on(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while self._whole and (content := source.recv(2**16)):
                self.bytes += len(content)
                to.sendall(content)
        for each in (source, to):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            self._open.discard(each)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        self.cut()
        self._listener.close()
