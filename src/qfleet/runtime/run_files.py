"""Reading the files of a run's folder, which somebody else may have made or damaged.

Everything that reads such a file uses these functions. They accept a regular file of bounded size and nothing else: a
pipe would make the reader wait for ever, a device like /dev/zero would take all memory, and a symbolic link could lead
to any file of the user.
"""

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 16 * 2**20
"""Largest size of a JSON file. What its parser makes of it takes some 20 times as much memory."""

MAX_GIVEN_BYTES = 2**20
"""Largest size of a file of settings that the user has written."""

MAX_LINE_BYTES = 2**20
"""Largest length of a line in a file of many lines."""

MAX_DEPTH = 100
"""Largest number of lists and objects within each other, so that whatever handles the value can recurse."""


class UnusableFile(ValueError):
    """A file that is there but is no regular file, is too large, or holds something else. The message says which."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, without waiting and without following a symbolic link.

    Raises:
      OSError: if there is no such file, or it can't be read.
      UnusableFile: if it is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise UnusableFile(f"it must be a regular file, got {_kind(path)}") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnusableFile(f"it must be a regular file, got {_kind(path)}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the content of a JSON file.

    Raises:
      OSError: as `open_regular` does.
      UnusableFile: if it isn't a regular file, holds more than `max_bytes`, or isn't strict JSON.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnusableFile(f"it must hold at most {max_bytes:,} bytes, got more")
    return parse_json(content)


def read_given(path: str) -> bytes:
    """Returns what a file that the user has named holds. It may be a pipe, or a link.

    Raises:
      OSError: if it can't be read.
      ValueError: if no file can have such a path, or it holds more than `MAX_GIVEN_BYTES`.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_GIVEN_BYTES + 1)
    if len(content) > MAX_GIVEN_BYTES:
        raise UnusableFile(f"it must hold at most {MAX_GIVEN_BYTES:,} bytes, got more")
    return content


def parse_json(content: bytes) -> Any:
    """Returns the value of strict JSON in UTF-8.

    Raises:
      UnusableFile: if it is something else, such as NaN, or is nested too deeply.
    """
    try:
        value = json.loads(content.decode(), parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise UnusableFile("it is nested too deeply") from error
    except ValueError as error:
        raise UnusableFile(shortened(str(error))) from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for each in level for item in _items(each)]
    if level:
        raise UnusableFile("it is nested too deeply")
    return value


def read_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, with their ends. It may be of any size, because only one line is held at a time.

    Raises:
      OSError: as `open_regular` does.
      UnusableFile: if it isn't a regular file, or a line is longer than `MAX_LINE_BYTES`.
    """
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise UnusableFile(f"a line must hold at most {MAX_LINE_BYTES:,} bytes, got more")
            yield line


def open_to_append(path: Path) -> Any:
    """Opens a text file to append to, which it makes if there is none. It never follows a symbolic link.

    Raises:
      OSError: if it can't be written to.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it must be a regular file, got {_kind(path)}", str(path))
    return os.fdopen(descriptor, "a", encoding="utf-8")


def temporary_of(path: Path) -> Path:
    """Returns a new name beside a file, to write under until the file is complete. Nobody can have put a link there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk, so that a loss of power does not undo a renaming."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't
            raise
    finally:
        os.close(descriptor)


def shortened(text: str, length: int = 500) -> str:
    """Returns a text in one line, and at most about this long, with its middle left out."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:50]} is too large a number")
    return number


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _kind(path: Path) -> str:
    kinds = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    mode = os.lstat(path).st_mode
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "something else")
