"""JAX's persistent compilation cache, on by default: compiling is most of a short run's start-up."""

import logging
import os
import tempfile
from pathlib import Path

_log = logging.getLogger("qfleet")


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs on disk for later processes; call it before the first compilation.

    They go to `$QFLEET_CACHE_DIR`, or else to qfleet's folder in the user's cache folder. The folder only ever
    grows, and can be deleted at any time. A cache that the user has configured in JAX is left as it is.

    Returns:
      The folder in use, or None if it can't be written to, which costs a warning and compile time, not the run.
    """
    import jax

    configured: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if configured:
        return Path(configured)
    chosen = os.environ.get("QFLEET_CACHE_DIR")
    if chosen:
        directory = Path(chosen).expanduser().absolute()
    else:
        import platformdirs

        directory = Path(platformdirs.user_cache_dir("qfleet")) / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass  # permission bits don't tell (root, read-only mounts, quotas); creating a file does
    except OSError as error:
        _log.warning(
            "qfleet: no compilation cache, every start compiles anew: can't write to %s (%s); "
            "set QFLEET_CACHE_DIR to a writable folder",
            directory,
            error.strerror or error,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
