"""The files of a checkpoint, apart from the arrays that Orbax writes: their names, the index and the checksums."""

import json
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qfleet.config import ConfigError

FORMAT = 2
"""Version of the format that is written and read here."""

INDEX = "index.json"
CHECKSUMS = "checksums.json"


class CheckpointError(ConfigError):
    """A checkpoint is absent or damaged, or was not written by qfleet. The message says which, why and what to do."""


def list_checkpoints(directory: Path) -> list[int]:
    """Returns the environment steps of every complete checkpoint, ascending. Their contents are not verified."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def check_exists(directory: Path, env_steps: int | None) -> int:
    """Returns the environment steps of a complete checkpoint: the given ones, or those of the newest for None.

    Raises:
      CheckpointError: if there is no such checkpoint.
    """
    existing = list_checkpoints(directory)
    steps = max(existing, default=None) if env_steps is None else env_steps
    if steps is None or steps not in existing:
        wanted = "a checkpoint" if steps is None else f"checkpoint {steps}"
        raise CheckpointError(
            f"{wanted} must be in {directory}, which holds {', '.join(map(str, existing)) or 'none'}; "
            f"{'choose one of these' if existing else 'train first, or give another run'}"
        )
    return steps


def read_index(path: Path, items: Iterable[str]) -> dict[str, Any]:
    """Returns the index of a checkpoint, after verifying the index and the files of `items`.

    Raises:
      CheckpointError: if one of these files is missing or has changed, the format is another, or an item was not saved.
    """
    items = list(items)
    check_intact(path, items)
    index: dict[str, Any] = json.loads((path / INDEX).read_bytes())
    if index["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint format must be {FORMAT}, got {index['format']} in {path}; use the qfleet that wrote it"
        )
    for item in items:
        if item not in index["items"]:
            raise CheckpointError(
                f"checkpoint {path} holds {', '.join(index['items'])}, not {item}; it was saved without "
                f"(checkpoint_replay=False does that to the replay)"
            )
    return index


def check_intact(path: Path, items: Iterable[str]) -> None:
    """Raises CheckpointError, which names the newest intact checkpoint before it, if a file of `items` is damaged."""
    damage = find_damage(path, items)
    if not damage:
        return
    older = (step for step in reversed(list_checkpoints(path.parent)) if step < int(path.name))
    intact = next((step for step in older if not find_damage(path.with_name(str(step)))), None)
    remedy = (
        f"continue from the newest intact one before it: --checkpoint {intact}"
        if intact is not None
        else "no older one is intact, so train again or restore the folder from a copy"
    )
    raise CheckpointError(f"a checkpoint must be as qfleet wrote it, got {path}: {damage}; {remedy}")


def find_damage(path: Path, items: Iterable[str] | None = None) -> str:
    """Returns what is wrong with the files of a checkpoint, or ''.

    Args:
      path: folder of the checkpoint.
      items: items whose files are read, in addition to the index. None reads every file.
    """
    try:
        sums = json.loads((path / CHECKSUMS).read_bytes())["files"]
        expected = {name: (int(size), int(crc)) for name, (size, crc) in sums.items()}
    except OSError as error:
        return f"{CHECKSUMS} can't be read ({error.strerror}), so it was cut off or isn't qfleet's"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{CHECKSUMS} is not what qfleet writes"
    if INDEX not in expected:
        return f"{CHECKSUMS} lists no {INDEX}"
    folders = None if items is None else {INDEX, *items}
    for name, written in expected.items():
        if folders is None or name.split("/")[0] in folders:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            found = size_and_crc32(file)
            if found != written:
                sizes = f"{found[0]} bytes instead of {written[0]}" if found[0] != written[0] else "other bytes inside"
                return f"{name} has changed since it was written ({sizes})"
    return ""


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    """Writes the index into the folder of a checkpoint whose items are complete, and the checksums of all files."""
    (path / INDEX).write_text(json.dumps(index, allow_nan=False), encoding="utf-8")
    files = [path / INDEX]
    for item in index["items"]:
        files += sorted(file for file in (path / item).rglob("*") if file.is_file())
    sums = {file.relative_to(path).as_posix(): size_and_crc32(file) for file in files}
    (path / CHECKSUMS).write_text(json.dumps({"files": sums}, indent=1), encoding="utf-8")


def size_and_crc32(file: Path) -> tuple[int, int]:
    """Returns the size of a file in bytes, and its CRC-32."""
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def make_directory(directory: Path) -> None:
    """Makes the folder of checkpoints, and removes what a process left there when it was killed."""
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.orbax-checkpoint-tmp", "*.deleted-tmp"):  # it was writing one, or deleting one
        for path in directory.glob(pattern):
            shutil.rmtree(path)


def delete_all_but_newest(directory: Path, keep: int) -> None:
    """Deletes all checkpoints but the `keep` newest."""
    for env_steps in list_checkpoints(directory)[:-keep]:
        path = directory / str(env_steps)
        doomed = path.with_name(f"{path.name}.deleted-tmp")
        path.rename(doomed)  # first, because a half-deleted checkpoint must not look like a complete one
        shutil.rmtree(doomed)


def set_aside_after(directory: Path, env_steps: int) -> None:
    """Renames checkpoints newer than `env_steps` to `<env_steps>.set-aside`, replacing any that have this name."""
    for newer in list_checkpoints(directory):
        if newer > env_steps:
            path = directory / str(newer)
            aside = path.with_name(f"{newer}.set-aside")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
