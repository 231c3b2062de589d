"""Files that one process holds at a time; whatever kills it, the lock goes with it."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# What file systems without locks answer: NFS and Lustre without a lock daemon, some of FUSE.
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def held(path: Path, *, wait: bool = True) -> Iterator[str]:
    """Hold the lock of a file, which is made with its folder if it is not there, and stays.

    Gives why nothing holds it, where the file system has no locks; else an empty text.

    Args:
      path: of a file that is never renamed or replaced.
      wait: for another process that holds it.

    Raises:
      BlockingIOError: another process holds it, and `wait` is not set.
      OSError: the file cannot be written to.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / ".lock"
      >>> with held(path), held(path, wait=False):
      ...     pass
      Traceback (most recent call last):
      BlockingIOError: ...lock: another process holds it
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # NFS gives an exclusive lock only on what is open for writing, so not on a folder itself.
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    why = ""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(f"{path}: another process holds it") from None
            if error.errno not in _NO_LOCKS:
                raise
            why = os.strerror(error.errno)
        yield why
    finally:
        os.close(handle)
