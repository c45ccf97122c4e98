"""JAX's persistent compilation cache. It is on by default, because compiling takes most of a short run's start-up."""

import logging
import os
import tempfile
from pathlib import Path

from qfleet.runtime.workarounds.jax_cache_entries import keep_cache_entries_whole

_log = logging.getLogger("qfleet")


class CacheUnusable(Exception):
    """There can be no compilation cache. The message gives the reason."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs on disk for later processes. Call this before the first compilation.

    Processes may share the folder and may be killed at any moment: an entry is there whole or not at all.

    A cache that the user has configured in JAX is left as it is.

    Returns:
      The folder in use. None if it can't be written to, or others can write to it; the run then logs a warning and
      compiles everything itself.
    """
    import jax

    configured: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if configured:
        return Path(configured)
    try:
        directory = usable_cache_folder()
    except CacheUnusable as error:
        _log.warning("qfleet: there is no compilation cache, so every start compiles anew: %s; %s", error, error.remedy)
        return None
    keep_cache_entries_whole()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def usable_cache_folder() -> Path:
    """Returns the folder for compiled programs, which is made if there is none. This doesn't import JAX.

    The programs go to the folder that the user has named to JAX, or to `$QFLEET_CACHE_DIR`. If neither is set, they go
    to qfleet's folder in the user's cache folder. The folder never shrinks; it can be deleted at any time. Whoever
    writes to the folder decides what this process runs. So it must be the user's own, and nobody else may write to it;
    one that is made here has mode 0700.

    Raises:
      CacheUnusable: if the folder can't be written to, or others can write to it.
    """
    if configured := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(configured)
    chosen = os.environ.get("QFLEET_CACHE_DIR")
    directory = Path(chosen or "the user's cache folder")  # for the message, if there is no such folder
    try:
        if chosen:
            directory = Path(chosen).expanduser().absolute()
        else:
            import platformdirs

            directory = Path(platformdirs.user_cache_dir("qfleet")) / "xla"
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        if reason := _why_unsafe(directory):
            remedy = f"delete {directory}, or set QFLEET_CACHE_DIR to a folder of your own with mode 0700"
            raise CacheUnusable(f"{directory} {reason}, and who writes there can run code here", remedy)
        with tempfile.TemporaryFile(dir=directory):
            pass  # only writing a file shows whether one can: root, read-only mounts and quotas defy permission bits
    except (OSError, RuntimeError) as error:  # the second one says that the user has no home folder
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        remedy = "set QFLEET_CACHE_DIR to a writable folder"
        raise CacheUnusable(f"can't write to {directory} ({reason})", remedy) from error
    return directory


def _why_unsafe(directory: Path) -> str:
    """Returns why others may have written to a folder, or ''."""
    status = directory.stat()
    if status.st_uid != os.getuid():
        return f"belongs to user {status.st_uid}"
    return "is writable by other users" if status.st_mode & 0o022 else ""
