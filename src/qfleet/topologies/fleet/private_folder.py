"""A folder for the sockets and logs of a Ray that is started here, which only this user can enter.

Ray makes its own folders writable by everybody, so that another user of the machine could put a socket in place of one
of Ray's.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qfleet.config import ConfigError

logger = logging.getLogger("qfleet")

_PREFIX = "qfleet-ray-"

_LOCK = "lock"
"""File that is locked for as long as the folder's process lives."""

_RAY_BYTES = 72
"""Length of what Ray adds to the folder's path: `/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store`."""

_MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path that a Unix socket may have."""

_PATIENCE_SECONDS = 5.0
"""Time that Ray's processes have to end before the rest of the folder is left for the next start to remove."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Makes a folder of mode 0700 and yields a path inside it. Removes it at the end, with all that is in it.

    Folders of processes that were killed are removed first.

    Raises:
      ConfigError: if there is no place for it.
    """
    parent = _parent()
    _remove_abandoned(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # its mode is 0700
    except OSError as error:
        raise ConfigError(
            f"a local Ray needs a folder for temporary files, got {parent} ({error.strerror}); set TMPDIR to another"
        ) from error
    try:
        with _locked(folder):
            yield folder / "r"  # Ray changes the mode of the folder that it is given, so that must be another one
    finally:
        _remove(folder)


def _parent() -> Path:
    """Returns the user's folder for temporary files, or /tmp if paths there would be too long for a socket."""
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    longest = len(os.fsencode(os.path.join(parent, _PREFIX + 8 * "x", "r"))) + _RAY_BYTES
    return Path(parent if longest <= _MAX_SOCKET_BYTES else "/tmp")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    unlocked = folder / f"un{_LOCK}ed"
    descriptor = os.open(unlocked, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        unlocked.rename(folder / _LOCK)  # so that no other process finds it unlocked
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Removes the folders of this user whose processes have ended without doing so."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is another user's, or another process removes it
            status = folder.lstat()
            if status.st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)  # fails for a folder that is being made
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes a folder in which processes that are about to end may still write."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                logger.warning("the folder %s of Ray's files can't be removed (%s); delete it", folder, error)
                return
            time.sleep(0.1)
