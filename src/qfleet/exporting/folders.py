"""The folder of an exported policy, which appears as a whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qfleet.config import ConfigError, RunFailed
from qfleet.config.values import show, to_plain
from qfleet.runtime.run_files import temporary_of


def check_new_folder(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a folder that doesn't exist yet, or is empty.

    Raises:
      ConfigError: if there is something else of that name.
    """
    folder = Path(to_plain(str, path, "path")).absolute()
    try:
        if "\0" in str(folder):
            raise ValueError("a null character in it")
        is_free = not any(folder.iterdir()) if folder.is_dir() else not os.path.lexists(folder)
        parent = next(each for each in folder.parents if each.exists())
    except (OSError, ValueError) as error:  # a name that is too long or that none can have, a folder that is closed
        reason = getattr(error, "strerror", error)
        raise ConfigError(
            f"an export needs a folder that can be made, got {show(path)} ({reason}); give another (--out)"
        ) from error
    if not is_free or folder.is_symlink():
        raise ConfigError(
            f"an export needs an absent or empty folder, got {path}, which is there already; move it away, or give "
            f"another (--out)"
        )
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"an export needs a folder that can be made, got {path}, and {parent} is no folder that can be written to; "
            f"give another (--out)"
        )
    return folder


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `folder` once everything in it has been written.

    Raises:
      RunFailed: if it can't be written.
    """
    temporary = temporary_of(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    except OSError as error:
        raise RunFailed(
            f"an export needs a folder that can be written to, got {folder} ({error.strerror or error}); free space or "
            f"fix the permissions there, or give another (--out)"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
