"""A run's folder that somebody damaged or made up: every use of it works or is one clear error, and never hangs.

QFLEET_FUZZ=1000 tries that many random damages instead of a few dozen.
"""

import copy
import functools
import json
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qfleet
from qfleet.config import ConfigError
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.metrics import MetricsWriter
from qfleet.runtime.run_directory import RunDirectory

NUM_DAMAGES = int(os.environ.get("QFLEET_FUZZ", "40"))

FILES = (
    "config.json",
    "summary.json",
    "metrics.jsonl",
    "checkpoints/64/index.json",
    "checkpoints/64/checksums.json",
    "checkpoints/64/learner/_METADATA",
    "checkpoints/64/learner/manifest.ocdbt",
    "checkpoints/64/learner",
    "checkpoints/64",
    "checkpoints",
)

ODD = (
    None, True, -1, 0, 2**70, -(2**70), 10**400, 1.5, 1e308, "", "x", "../../x", "\0", "é" * 10_000, [], [[]], {},
    {"a": 1}, [None], [-1], ["a", 2], float("nan"), float("inf"),
)  # fmt: skip


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    config = qfleet.make_config(
        "CartPole-v1", preset="dqn", env_steps=64, run_dir=str(path), num_envs=4, hidden_sizes=(8,), batch_size=8,
        replay_capacity=256, warmup_env_steps=16, eval_episodes=2, eval_period_env_steps=64,
    )  # fmt: skip
    qfleet.train(config)
    return path


@pytest.fixture
def run(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "run"))


def use(run: Path, *, resume: bool) -> str:
    """Does what the commands do with a run's folder, and returns the error, '' if there is none.

    Raises:
      Exception: any other than the errors that a user may see.
    """
    try:
        directory = RunDirectory.open(run)
        directory.read_summary()
        with MetricsWriter(directory) as metrics:
            metrics.truncate_after(64)
        qfleet.load(run).evaluate(1)
        if resume:
            for _ in qfleet.resume(run, env_steps=96):
                pass
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 3000 and "Traceback" not in message
    return message


def test_an_intact_folder_works(run: Path) -> None:
    assert use(run, resume=True) == ""


# --- Something else in place of a file ---


def replaced_by_pipe(file: Path) -> None:
    os.mkfifo(file)


def replaced_by_folder(file: Path) -> None:
    file.mkdir()


def replaced_by_endless_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def replaced_by_dangling_link(file: Path) -> None:
    file.symlink_to(file.with_name("nowhere"))


def replaced_by_link_to_itself(file: Path) -> None:
    file.symlink_to(file)


def replaced_by_brackets(file: Path) -> None:
    file.write_text("[" * 100_000)


def replaced_by_bytes(file: Path) -> None:
    file.write_bytes(bytes(range(128, 256)) * 10)


def replaced_by_huge_file(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**36)  # of zeros, which take no room on disk


def replaced_by_infinity(file: Path) -> None:
    file.write_text('{"files": {"index.json": [Infinity, NaN]}, "env_steps": Infinity}\n')


REPLACEMENTS = (
    replaced_by_pipe,
    replaced_by_folder,
    replaced_by_endless_device,
    replaced_by_dangling_link,
    replaced_by_link_to_itself,
    replaced_by_brackets,
    replaced_by_bytes,
    replaced_by_huge_file,
    replaced_by_infinity,
)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("name", "replace"),
    [
        *((name, replace) for name in FILES[:5] for replace in REPLACEMENTS),
        *((name, replace) for name in FILES[5:] for replace in REPLACEMENTS[:4]),
    ],
)
def test_something_else_in_place_of_a_file_is_one_clear_error(
    run: Path, name: str, replace: Callable[[Path], None]
) -> None:
    remove(run / name)
    replace(run / name)
    assert use(run, resume=False), f"{name} {replace.__name__} was not noticed"


# --- Another value in a JSON file, with the right checksum ---


def sign(checkpoint: Path) -> None:
    """Writes the checksum that fits the index."""
    index = (checkpoint / "index.json").read_bytes()
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["files"]["index.json"] = [len(index), zlib.crc32(index)]
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path to each value in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    result = copy.deepcopy(value)
    node = result
    for key in path[:-1]:
        node = node[key]
    if new is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = new
    return result


def damage_at_random(run: Path, numbers: random.Random) -> str:
    """Damages one file of a folder and returns what it did."""
    name = numbers.choice(FILES)
    file = run / name
    kind = numbers.choice(("replace", "flip", "cut", "value", "value", "value"))
    if kind == "replace" or file.is_dir():
        replace = numbers.choice(REPLACEMENTS)
        remove(file)
        replace(file)
        return f"{name} {replace.__name__}"
    content = file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[: numbers.randrange(len(content))])
    elif kind == "flip" or not name.endswith("json"):
        at = numbers.randrange(len(content))
        file.write_bytes(content[:at] + bytes([numbers.randrange(256)]) + content[at + 1 :])
    else:
        value = json.loads(content)
        path, new = numbers.choice(list(places(value))), numbers.choice([*ODD, ...])
        if not path and new is ...:
            new = None
        file.write_text(json.dumps(changed(value, path, new)))
        kind = f"{path} = {str(new)[:50]}"
    if name.endswith("index.json"):
        sign(file.parent)
    return f"{name} {kind}"


def test_random_damage_works_or_is_one_clear_error(intact: Path, tmp_path: Path) -> None:
    failures = []
    for seed in range(NUM_DAMAGES):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(intact, run)
        done = damage_at_random(run, random.Random(seed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                use(run, resume=seed % 4 == 0)
        except Exception as error:
            failures.append(f"{seed}: {done}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("metadata", "counters"), None),
        (("metadata", "counters", "env_steps"), "64"),
        (("metadata", "counters", "learner_steps"), ...),
        (("metadata", "solved_at"), [1, 2]),
        (("metadata", "has_own_network"), 0),
        (("metadata", "evaluation_rounds", "newest"), []),
        (("metadata", "evaluation_rounds", "lengths"), [1]),
        (("metadata", "evaluation_rounds", "mean_length"), "long"),
        (("metadata", "layout"), {"topology": "fused"}),
        (("metadata", "environment"), "CartPole-v1"),
        (("metadata", "environment", "num_actions"), 2**40),
        (("metadata", "environment", "observation_shape"), [5]),
        (("metadata", "environment", "raw_actions"), {"dtype": "object", "table": [0, 1]}),
        (("env_steps",), 63),
        (("format",), functools.reduce(lambda inside, _: [inside], range(300), 1)),
        (("run_id",), "0" * 16),
        (("items", "learner", 0, "shape"), [2**40, 2**20]),
        (("items", "learner", 0, "dtype"), "object"),
        (("items", "learner", 0, "path"), []),
        (("items",), {"../learner": []}),
    ],
)
def test_an_index_with_the_right_checksum_and_another_value_is_refused(run: Path, path: tuple, value: Any) -> None:
    file = run / "checkpoints" / "64" / "index.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    sign(file.parent)
    assert "checkpoint" in use(run, resume=True)


def test_arrays_larger_than_the_index_says_are_not_read(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_id = RunDirectory.open(run).run_id
    with Checkpoints(other, run_id=run_id) as checkpoints:
        checkpoints.save(64, {"learner": {"params": np.zeros(1000)}}, {})
    folder = other / "64"
    index = json.loads((folder / "index.json").read_text())
    index["items"]["learner"][0]["shape"] = [10]
    (folder / "index.json").write_text(json.dumps(index))
    sign(folder)
    with pytest.raises(ConfigError, match=r"that Orbax can read, got .*has shape \[1000\]"):
        Checkpoints(other, run_id=run_id).restore_item("learner")
