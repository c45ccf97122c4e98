"""What a request to a policy's server says, and the answer to it: as JSON, or as NumPy's .npz, which is faster."""

import io
import json
import math
import zipfile
from typing import Any, NamedTuple

import numpy as np

from qfleet.config import ConfigError, suggest
from qfleet.config.values import show
from qfleet.runtime.run_directory import strict_json
from qfleet.serving.engine import Actions

JSON, ARRAYS = "application/json", "application/x-npz"
"""Content types."""

_FIELDS = ("observations", "mask", "sessions", "is_first", "q_values")

_MAX_NAME_LENGTH = 200

_MAX_DEPTH = 20


class Request(NamedTuple):
    """What a request says."""

    observations: Any
    """A batch, as `Policy` takes it."""
    mask: Any
    """Which actions are valid, as `Policy` takes it, or None."""
    sessions: tuple[str, ...]
    """A name for each observation, or nothing."""
    is_first: Any
    """Whether each observation begins an episode; None if none does."""
    wants_q_values: bool


def read_request(content_type: str, body: bytes) -> Request:
    """Returns what a request says.

    Args:
      content_type: `JSON` or `ARRAYS`.
      body: its content.

    Raises:
      ConfigError: if it isn't a request.
    """
    fields = _read_json(body) if content_type == JSON else _read_arrays(body)
    for name in fields:
        if name not in _FIELDS:
            raise ConfigError(
                f"a request has the fields {', '.join(_FIELDS)}, got {show(name)}.{suggest(name, _FIELDS)}"
            )
    if "observations" not in fields:
        raise ConfigError("a request must have the field `observations`, got none; give a list of them")
    sessions = fields.get("sessions")
    names = () if sessions is None else tuple(np.asarray(sessions).tolist())
    if not all(isinstance(name, str) and 0 < len(name) <= _MAX_NAME_LENGTH for name in names):
        raise ConfigError(f"sessions must be names of 1 to {_MAX_NAME_LENGTH} characters, got {show(sessions)}")
    wants_q_values = fields.get("q_values", False)
    if isinstance(wants_q_values, np.ndarray) and wants_q_values.shape == ():
        wants_q_values = wants_q_values.item()
    if not isinstance(wants_q_values, bool):
        raise ConfigError(f"q_values must be true or false, got {show(wants_q_values)}")
    return Request(fields["observations"], fields.get("mask"), names, fields.get("is_first"), wants_q_values)


def write_answer(content_type: str, found: Actions, wants_q_values: bool) -> bytes:
    """Returns the answer to a request in the same form."""
    actions = np.asarray(found.actions)
    if content_type == JSON:
        answer = {"actions": actions, "checkpoint": found.label}
        return strict_json(answer | ({"q_values": found.q_values} if wants_q_values else {})).encode()
    arrays = {"actions": actions, "checkpoint": np.asarray(found.label)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **({"q_values": found.q_values} if wants_q_values else {}))  # type: ignore[arg-type]
    return buffer.getvalue()


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one of the former
        raise ConfigError(f"a request must be JSON, got {show(body[:40])} ({error})") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"a request must be a JSON object, got {show(fields)}")
    return {name: _numbers(name, value) for name, value in fields.items()}


def _numbers(name: str, value: Any, depth: int = 0) -> Any:
    """Returns lists as arrays, also those within an object."""
    if isinstance(value, dict):
        if depth == _MAX_DEPTH:
            field = name.partition(".")[0]
            raise ConfigError(f"{field} must have objects at most {_MAX_DEPTH} deep, got more; send lists of numbers")
        return {key: _numbers(f"{name}.{key}", each, depth + 1) for key, each in value.items()}
    if not isinstance(value, list):
        return value
    try:
        return np.array(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{name} must be a list in which all entries have one shape, got another ({error})"
        ) from error


def _read_arrays(body: bytes) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as members:
            if len(members.infolist()) > len(_FIELDS):
                raise ConfigError(f"a request has at most {len(_FIELDS)} arrays, got {len(members.infolist())}")
            return {info.filename.removesuffix(".npy"): _read_array(members, info) for info in members.infolist()}
    except ConfigError:
        raise
    except Exception as error:  # of two libraries that read what strangers wrote
        raise ConfigError(
            f"a request must be an .npz of arrays, got something else ({error}); use numpy.savez"
        ) from error


def _read_array(members: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Returns an array of a zip file. Neither pickled objects nor more bytes than the request has are read."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ConfigError(f"arrays must not be compressed, got {show(info.filename)}; use numpy.savez")
    data = io.BytesIO(members.read(info))
    version = np.lib.format.read_magic(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, is_fortran, dtype = read_header(data)
    content = data.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content):
        raise ConfigError(f"an array must have as many numbers as its shape says, got {show(info.filename)}, {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
