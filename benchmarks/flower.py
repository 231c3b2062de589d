"""What a round costs in Flower, with nothing to do in it: beside `benchmarks.network`.

In an environment of its own, since Flower pins what others need: ``pip install flwr==1.42.0``, then

    python benchmarks/flower.py
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = """\
[project]
name = "nil"
version = "1.0.0"
description = "Rounds without work"
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "app.nil:server"
clientapp = "app.nil:client"

[tool.flwr.app.config]
rounds = 12
clients = 2
out = ""
"""
APP = '''\
"""Clients answer with their process, the server notes how long a round took."""

import json
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message, context):
    return Message(RecordDict({"it": ConfigRecord({"process": os.getpid()})}), reply_to=message)


@server.main()
def main(grid, context):
    options, rows = context.run_config, []
    while len(nodes := list(grid.get_node_ids())) < options["clients"]:
        time.sleep(0.2)
    for number in range(options["rounds"]):
        begin, asked = time.perf_counter(), RecordDict({"it": ConfigRecord({"round": number})})
        messages = [Message(asked, dst_node_id=node, message_type="query") for node in nodes]
        replies = list(grid.send_and_receive(messages, timeout=60))
        seconds = time.perf_counter() - begin
        rows.append([seconds, [reply.content["it"]["process"] for reply in replies]])
        part = Path(options["out"] + ".part")
        part.write_text(json.dumps(rows))
        part.replace(options["out"])
'''


def measure(folder: Path, clients: int, rounds: int) -> list[tuple[float, list[int]]]:
    """Seconds and clients' processes of each round; all processes are ended."""
    (folder / "app").mkdir()
    (folder / "app/__init__.py").touch()
    (folder / "app/nil.py").write_text(APP)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "home").mkdir()
    (folder / "home/config.toml").write_text(
        '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:8000"\n'
        "insecure = true\n"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"FLWR_HOME": str(folder / "home"), "PATH": path}
    out, started = folder / "rows.json", []
    try:
        with open(folder / "log", "w") as log:
            quiet: dict[str, Any] = dict(cwd=folder, env=env, stdout=log, stderr=log)
            link = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
            started.append(subprocess.Popen(link, start_new_session=True, **quiet))
            _until_open(8000)
            for number in range(clients):
                node = ["flower-supernode", "--insecure", "--superlink", "127.0.0.1:8000",
                        "--port", str(9194 + number)]  # fmt: skip
                started.append(subprocess.Popen(node, start_new_session=True, **quiet))
            settings = f'rounds={rounds} clients={clients} out="{out}"'
            end = time.monotonic() + 60 * (rounds + 2)
            while subprocess.run(["flwr", "run", ".", "here", "-c", settings], **quiet).returncode:
                if time.monotonic() > end:  # it listens before it answers
                    raise TimeoutError((folder / "log").read_text()[-2000:])
                time.sleep(2)
            rows: list = []
            while len(rows) < rounds:
                if time.monotonic() > end:
                    raise TimeoutError((folder / "log").read_text()[-2000:])
                time.sleep(1)
                rows = json.loads(out.read_text()) if out.exists() else []
        return rows
    finally:
        for process in started:
            os.killpg(process.pid, 9)
            process.wait()


def _until_open(port: int) -> None:
    for _ in range(120):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"nothing listens on port {port}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    if shutil.which("flower-superlink", path=str(Path(sys.executable).parent)) is None:
        sys.exit("flwr is not installed beside this Python: pip install flwr==1.42.0")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.clients, options.rounds)
    seconds = [row[0] for row in rows]
    processes = {process for row in rows for process in row[1]}
    print(f"{options.clients} clients, {options.rounds} rounds: {statistics.median(seconds):.2f} s "
          f"a round in the median, {min(seconds):.2f} to {max(seconds):.2f}; "
          f"{len(processes)} client processes")  # fmt: skip


if __name__ == "__main__":
    main()
