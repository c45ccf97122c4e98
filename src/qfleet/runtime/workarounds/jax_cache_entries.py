"""JAX writes an entry of its compilation cache straight under its final name. Seen in JAX 0.10.2 and 0.11.2.

Two things follow when processes share the cache. A process that reads an entry while another one writes it gets half
of it. And a process that is killed while it writes leaves half an entry, which JAX never replaces: from then on every
start warns and compiles that program anew. JAX has no setting for either, so this module changes private functions.
"""

import contextlib
import functools
import os
import tempfile
from pathlib import Path
from typing import Any


@functools.cache  # once for each process
def keep_cache_entries_whole() -> None:
    """Makes this process write cache entries whole or not at all, and replace those that it can't read."""
    import jax
    from jax._src import compilation_cache
    from jax._src.lru_cache import LRUCache

    read_entry = compilation_cache.get_executable_and_time

    def put(cache: LRUCache, key: str, value: bytes) -> None:
        path = Path(cache.path, f"{key}-cache")
        if path.exists():
            return
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
        try:
            with open(descriptor, "wb") as file:
                file.write(value)
            os.replace(temporary, path)  # a reader finds the whole entry, or none
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def get_executable_and_time(cache_key: str, *rest: Any, **more: Any) -> Any:
        try:
            return read_entry(cache_key, *rest, **more)
        except Exception:  # zlib, zstandard and XLA each raise their own when an entry is damaged
            entry = Path(jax.config.jax_compilation_cache_dir) / f"{cache_key}-cache"  # type: ignore[attr-defined]
            entry.unlink(missing_ok=True)
            return None, None  # JAX compiles the program and writes the entry

    LRUCache.put = put  # type: ignore[method-assign,assignment]
    compilation_cache.get_executable_and_time = get_executable_and_time
