"""``hiso nvflare site``: what a machine's own administrator writes into its startup kit, once.

NVFlare runs no class of a job that the machine has not allowed; hiso_jax's are two. Where the
data are, and which functions of one's own a job may name, goes into a file of hiso_jax beside that.
Neither is ever sent.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from hiso_jax._engine import files
from hiso_jax.nvflare.parties import FILE

CLASSES = ("hiso_jax.nvflare.engine.HisoController", "hiso_jax.nvflare.engine.HisoExecutor")
"""What NVFlare must be allowed to run."""
RESOURCES = "resources.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """Prepare the startup kit of the server (without --data) or of a site for jobs of hiso."""

    kit: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="KIT")]
    """Folder of the startup kit, with startup/ and local/ in it."""
    data: Path | None = None
    """File or folder of this site's examples; none for the server."""
    model: str | None = None
    """Folder, GGUF file or hub id of the base model here, if not where the job says."""
    folder: Path | None = None
    """Where to keep ledger, snapshots and models; by default hiso/ in the kit."""
    functions: tuple[str, ...] = ()
    """module:function that jobs may name with --party and --method, apart from hiso's own."""
    stream_logs: bool = False
    """Let NVFlare copy this machine's error log to the server, as it does by default; the text
    of an error may hold data."""


def prepare(options: Options) -> list[Path]:
    """Write what a machine needs; return the files.

    What is there already is kept: classes that were allowed, and settings that are not given.

    Raises:
      FileNotFoundError: there is no kit, or no data.
      ValueError: a file of the kit is not what NVFlare writes, or a function is none.

    Example:
      >>> prepare(Options(kit=Path("gone")))
      Traceback (most recent call last):
          ...
      FileNotFoundError: kit: gone: no startup kit of NVFlare: expected a folder with startup/ ...
    """
    local = options.kit / "local"
    if not local.is_dir() or not (options.kit / "startup").is_dir():
        raise FileNotFoundError(f"kit: {options.kit}: no startup kit of NVFlare: expected a folder "
                                "with startup/ and local/ in it")  # fmt: skip
    if options.data is not None and not options.data.exists():
        raise FileNotFoundError(f"--data: {options.data}: no such file or folder")
    for function in options.functions:
        if not all(function.partition(":")):
            raise ValueError(f"--functions: expected module:function, got {function!r}")
    path, settings = local / RESOURCES, local / FILE
    found = path if path.exists() else local / f"{RESOURCES}.default"
    resources: dict[str, Any] = _read(found) if found.exists() else {"format_version": 2}
    allowed = resources.get("class_allow_list", [])
    if not isinstance(allowed, list):
        raise ValueError(f"{found}: class_allow_list: expected a list, got {allowed!r:.80}")
    resources["class_allow_list"] = [*allowed, *(c for c in CLASSES if c not in allowed)]
    model = options.model  # a path, or the name of one on the hub
    if model is not None and Path(model).exists():
        model = str(Path(model).absolute())
    resources["allow_log_streaming"] = options.stream_logs
    resources = _moved(resources, str(options.kit.absolute() / "store"))
    own = _read(settings) if settings.exists() else {}
    own |= {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in (dataclasses.asdict(options) | {"model": model}).items()
        if name not in ("kit", "stream_logs") and value not in (None, ())
    }
    for target, content in ((path, resources), (settings, own)):
        with files.atomic_write(target) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")
    return [path, settings]


SHARED = "/tmp/nvflare"
"""Where NVFlare keeps a server's jobs: gone when the machine starts again, and one for all."""


def _moved(content: Any, folder: str) -> Any:
    """Settings with NVFlare's paths in the shared folder in a folder of the kit's own."""
    if isinstance(content, dict):
        return {name: _moved(value, folder) for name, value in content.items()}
    if isinstance(content, list):
        return [_moved(value, folder) for value in content]
    if isinstance(content, str) and (content == SHARED or content.startswith(f"{SHARED}/")):
        return folder + content.removeprefix(SHARED)
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected an object in JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object in JSON, got {found!r:.80}")
    return found
