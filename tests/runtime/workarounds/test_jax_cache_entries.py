"""The compilation cache's entries: with the workaround they are whole, and a damaged one is compiled anew."""

import os
import subprocess
import sys
from pathlib import Path

from qfleet.runtime.workarounds import jax_cache_entries

COMPILE = """
import sys, warnings
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if sys.argv[2] == "whole":
    from qfleet.runtime.workarounds.jax_cache_entries import keep_cache_entries_whole
    keep_cache_entries_whole()
names = set()
def note_written_entries(event, arguments):
    if event == "open" and str(arguments[0]).endswith("-cache") and "w" in str(arguments[1]):
        names.add(str(arguments[0]))
sys.addaudithook(note_written_entries)
warnings.simplefilter("always")
print(jax.jit(lambda x: 2 * x + 1)(20.0))
print(*names)
"""


def compile_in_a_process(folder: Path, mode: str) -> tuple[str, list[str], str]:
    """Returns a program's result, the names of entries opened for writing under their final name, and stderr."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COMPILE, str(folder), mode]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=120)
    result, written = done.stdout.splitlines()
    return result, written.split(), done.stderr


def cut_entries_in_half(folder: Path) -> int:
    entries = list(folder.glob("*-cache"))
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    return len(entries)


def test_an_entry_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    result, written_in_place, stderr = compile_in_a_process(tmp_path, "whole")
    assert (result, written_in_place, stderr) == ("41.0", [], "")
    assert all(path.name.endswith("-cache") for path in tmp_path.iterdir()), "nothing unfinished is left"


def test_a_damaged_entry_is_replaced_without_a_word(tmp_path: Path) -> None:
    compile_in_a_process(tmp_path, "whole")
    whole = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert cut_entries_in_half(tmp_path) > 0
    result, _, stderr = compile_in_a_process(tmp_path, "whole")
    assert (result, stderr) == ("41.0", "")
    assert {path.name for path in tmp_path.iterdir()} == set(whole)
    assert all(path.stat().st_size > 0.9 * whole[path.name] for path in tmp_path.iterdir()), "they are whole again"


def test_jax_still_writes_in_place_and_keeps_what_is_damaged(tmp_path: Path) -> None:
    _, written_in_place, _ = compile_in_a_process(tmp_path, "default")
    cut_entries_in_half(tmp_path)
    _, _, stderr = compile_in_a_process(tmp_path, "default")
    assert written_in_place and "Error reading persistent compilation cache entry" in stderr, (
        "this workaround may be no longer needed: JAX wrote whole entries, or replaced a damaged one; if this is so in "
        f"every supported version of JAX, delete {jax_cache_entries.__file__}, its test and its call"
    )
