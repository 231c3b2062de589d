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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hiso_jax.nvflare import job as jobs
from hiso_jax.nvflare import machine
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


def provision(folder: Path, sites: list[str], port: int) -> Path:
    """Startup kits by NVFlare's own tool; return the folder that they are in."""
    folder.mkdir(parents=True, exist_ok=True)
    clients = "\n".join(f"- {{name: {name}, type: client, org: ward}}" for name in sites)
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

    def __init__(self, folder: Path, sites: list[str]):
        self.folder, self.sites, self.port = folder, sites, free_port()
        self.kits = provision(folder, sites, self.port)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._session: Any = None
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

    def session(self) -> Any:
        """As the lead who submits jobs; a server that was started again wants a new one."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        if self._session is None:
            self._session = new_secure_session("lead@lab.org", str(self.kits / "lead@lab.org"))
        return self._session

    def forget(self) -> None:
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
            self._session = None

    def connected(self) -> list[str]:
        try:
            info = self.session().get_system_info()
        except Exception:
            self.forget()
            return []
        return sorted(client.name for client in info.client_info)

    def wait(self, *names: str) -> None:
        """Until those sites, or all, are connected."""
        wanted = set(names or self.sites)
        until(lambda: wanted <= set(self.connected()), f"{sorted(wanted)} connected")

    def submit(self, **options: Any) -> str:
        """Write a job with the options of the command line, and submit it."""
        given: dict[str, Any] = dict(
            sites=tuple(self.sites), party="tests.parties:party", rounds=6, deadline=60.0,
            clients_per_round=len(self.sites), snapshot_every=3,
        )  # fmt: skip
        out = self.folder / "job"
        shutil.rmtree(out, ignore_errors=True)
        jobs.write(dataclasses.replace(jobs.Options(), out=out, **given | options))
        return until(lambda: self._submit(out), "submitted")

    def _submit(self, out: Path) -> str | None:
        try:
            return self.session().submit_job(str(out))
        except Exception:
            self.forget()
            return None

    def status(self, job: str) -> str:
        try:
            return str(self.session().get_job_meta(job)["status"])
        except Exception:
            self.forget()
            return ""

    def finish(self, job: str, patience: float = PATIENCE) -> str:
        """Wait for the end of a job; return how it ended."""
        return until(
            lambda: (s := self.status(job)).startswith("FINISHED") and s, f"{job} ended", patience
        )

    def kept(self, name: str, run: str = "hiso") -> Path:
        """What a machine keeps of a run."""
        return self.kit(name) / "hiso" / run

    def rows(self) -> list[dict[str, Any]]:
        """The rounds that the server has written down."""
        path = self.kept("server") / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def result(self, name: str = "server") -> dict[str, Any]:
        return json.loads((self.kept(name) / "result.json").read_text())

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        self.forget()
        self.kill(*self.processes)

    def __enter__(self) -> "Flare":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
