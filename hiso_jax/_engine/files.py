"""Files are written whole or not at all, and told from others by what is in them."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What a file system that cannot do something says; anything else is a fault of the disk.
_NOT_THERE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


# What tempfile adds to a name; the word before it says whose it is.
_PART, _RANDOM = "-part-", "?" * 8


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, sweeps: bool = False) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it to `path` on success.

    On an error or an interrupt the temporary file is removed and `path` is what it was. Afterwards
    no power cut brings back what was there before. Network and FUSE mounts that know no
    permissions or no fsync are written to like any other.

    Args:
      path: of the file.
      sweeps: remove what killed processes have left of this file, where no two write it at once.

    Raises:
      IsADirectoryError: `path` is a folder.
      OSError: it cannot be written or put in its place; the path is in the message.

    Example:
      >>> import tempfile, pathlib
      >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
      >>> with atomic_write(target) as part:
      ...     _ = part.write_text("all of it")
      >>> target.read_text()
      'all of it'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file's path, got a folder's", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Matplotlib and others choose the format by the suffix, so it stays. A name may be as long
    # as the file system allows, and this one is longer.
    prefix = f".{path.stem[:32]}{_PART}"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        began = part.stat().st_mtime_ns
        yield part
        sync(part)
        with contextlib.suppress(OSError):  # permissions are a courtesy to others
            os.chmod(part, 0o666 & ~_umask())
        try:
            os.replace(part, path)
        except OSError as error:
            why = error.strerror or error
            text = f"the file system does not rename the finished file to its place: {why}"
            raise OSError(error.errno, text, str(path)) from error
        settle(path)
        if sweeps:
            sweep(path.parent, began, f"{glob.escape(prefix)}{_RANDOM}{glob.escape(path.suffix)}")
    finally:
        with contextlib.suppress(OSError):  # what went wrong before says more
            part.unlink(missing_ok=True)


def sync(part: Path) -> None:
    """Let what was written to a file reach the disk.

    Raises:
      OSError: it did not.
    """
    with open(part, "rb") as written:
        try:
            os.fsync(written.fileno())
        except OSError as error:
            if error.errno not in _NOT_THERE:  # no room, say: the file is not whole
                raise


def settle(path: str | os.PathLike[str]) -> None:
    """Let what was made, renamed or deleted at a path survive a power cut, where folders sync."""
    with contextlib.suppress(OSError):
        folder = os.open(Path(path).resolve().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(folder: Path, before: int, *patterns: str) -> None:
    """Remove what killed processes have left half written.

    Args:
      folder: in which nobody else writes files of these names now.
      before: nanoseconds, by the file system's own clock: what has changed since then stays.
      patterns: of their names.
    """
    for left in [found for pattern in patterns for found in folder.glob(pattern)]:
        with contextlib.suppress(OSError):
            if left.lstat().st_mtime_ns < before:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` and rename it on success.

    What killed processes have left of it goes.

    Example:
      >>> import pathlib, tempfile
      >>> target = pathlib.Path(tempfile.mkdtemp()) / "out"
      >>> with whole_folder(target) as part:
      ...     _ = (part / "a.txt").write_text("all of it")
      >>> (target / "a.txt").read_text()
      'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}{_PART}"
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        began = part.stat().st_mtime_ns
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                sync(file)
        with contextlib.suppress(OSError):  # some mounts have no modes
            part.chmod(0o755)
        part.rename(path)
        settle(path)
        sweep(path.parent, began, f"{glob.escape(prefix)}{_RANDOM}")
    finally:
        shutil.rmtree(part, ignore_errors=True)


ENDS = 2**16
"""Bytes at each end of a file that its fingerprint is made of."""


def fingerprint(path: Path) -> str:
    """What tells a file, or a folder of files, from others: names, sizes and both ends of each.

    Its own name, and files whose names begin with a dot, do not count.

    Raises:
      OSError: it cannot be read.
    """
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and not file.name.startswith("."):
            size = file.stat().st_size
            with open(file, "rb") as content:
                ends = content.read(ENDS)
                content.seek(max(0, size - ENDS))
                ends += content.read(ENDS)
            name = "" if file == path else str(file.relative_to(path))
            total.update(f"{name}\0{size}\0".encode() + hashlib.sha256(ends).digest())
    return total.hexdigest()[:16]
