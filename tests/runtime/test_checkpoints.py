"""Checkpoints: a restored state is the one that was saved, and a damaged checkpoint is never restored."""

import functools
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import State, assert_same, make_state, save_some

from qfleet.config import ConfigError
from qfleet.runtime.checkpoint_files import CheckpointError
from qfleet.runtime.checkpoints import Checkpoints, CheckpointWriteError


def test_everything_comes_back_as_it_was_saved(two_saved: Path) -> None:
    like = {"learner": make_state(0), "replay": {"obs": jnp.zeros((1000, 4), int)}}
    state, metadata = Checkpoints(two_saved).restore(None, like)
    assert_same(state["learner"], make_state(20))
    assert_same(state["replay"], {"obs": jnp.full((1000, 4), 20)})
    assert metadata == {"best": 10.0}
    assert isinstance(state["learner"].key, jax.Array) and isinstance(state["learner"].env_steps, np.ndarray)
    older, metadata = Checkpoints(two_saved).restore(10, like)
    assert_same(older["learner"], make_state(10))
    assert metadata == Checkpoints(two_saved).read_metadata(10) == {"best": 5.0}


def test_shapes_alone_say_what_to_restore(two_saved: Path) -> None:
    like = jax.eval_shape(functools.partial(make_state, 0))._replace(env_steps=np.array(0))
    assert_same(Checkpoints(two_saved).restore_item("learner", like), make_state(20))


def test_an_item_is_readable_without_knowing_its_structure(two_saved: Path) -> None:
    item = Checkpoints(two_saved).restore_item("learner")
    expected = make_state(20)
    assert set(item) == {"params", "optimiser", "key", "env_steps"}
    kernel = item["params"]["dense_0"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    np.testing.assert_array_equal(kernel, expected.params["dense_0"]["kernel"])
    np.testing.assert_array_equal(item["params"]["mlp/~/linear"]["w"], expected.params["mlp/~/linear"]["w"])
    np.testing.assert_array_equal(item["params"]["layers"]["1"]["0"], [True, False])
    assert item["env_steps"] == 2**40 + 20
    assert jax.random.uniform(item["key"][1]) == jax.random.uniform(expected.key[1])


def test_an_item_may_be_a_bare_array_or_hold_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"array": jnp.arange(3), "nothing": ((), None), "array_2": np.arange(2)}, {})
        state, _ = checkpoints.restore(1, {"array": jnp.zeros(3, int), "nothing": ((), None)})
    np.testing.assert_array_equal(state["array"], [0, 1, 2])
    assert state["nothing"] == ((), None)


def test_arrays_donated_right_after_a_save_are_saved_unharmed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32)
    ring, host = jnp.array(values), values.copy()
    overwrite = jax.jit(lambda ring: ring * 0 - 1, donate_argnums=0)
    address = ring.unsafe_buffer_pointer()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"replay": {"ring": ring, "host": host}}, {})
        after = overwrite(ring)
        host[:] = -1
        assert after.unsafe_buffer_pointer() == address, "donation must still work in place"
        item = checkpoints.restore_item("replay")
    np.testing.assert_array_equal(item["ring"], values)
    np.testing.assert_array_equal(item["host"], values)


def test_restored_arrays_can_be_donated(two_saved: Path) -> None:
    like = {"obs": jnp.zeros((1000, 4), int)}
    obs = Checkpoints(two_saved).restore_item("replay", like)["obs"]
    assert obs.sharding == like["obs"].sharding
    after = jax.jit(lambda obs: obs + 1, donate_argnums=0)(obs)
    np.testing.assert_array_equal(after, np.full((1000, 4), 21))
    assert obs.is_deleted()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_some(tmp_path, 1, 2, 9, 10, keep=2)
    assert Checkpoints(tmp_path).all() == [9, 10]
    assert Checkpoints(tmp_path).latest() == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "9"]


def test_runs_in_several_threads_save_at_the_same_time(tmp_path: Path) -> None:
    names = [str(number) for number in range(4)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: save_some(tmp_path / name, *range(5)), names))
    assert [Checkpoints(tmp_path / name).all() for name in names] == [[0, 1, 2, 3, 4]] * len(names)


def test_saving_the_same_step_again_changes_nothing_unless_its_metadata_differs(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"learner": jnp.zeros(2)}, {"n": 1})
        checkpoints.wait()
        written = (tmp_path / "5").stat().st_ino
        checkpoints.save(5, {"learner": jnp.zeros(2)}, {"n": 1})
        checkpoints.wait()
        assert (tmp_path / "5").stat().st_ino == written
        checkpoints.save(5, {"learner": jnp.zeros(2)}, {"n": 2})
        checkpoints.wait()
        assert checkpoints.read_metadata() == {"n": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["5"], "the replaced one is deleted"


def test_a_replacement_that_cannot_be_written_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"learner": jnp.zeros(2)}, {"n": 1})
        checkpoints.wait()

        def fail(*arguments, **settings):
            raise OSError("no space is left")

        monkeypatch.setattr(checkpoints._writer, "save", fail)
        with pytest.raises(CheckpointWriteError, match="no space is left"):
            checkpoints.save(5, {"learner": jnp.zeros(2)}, {"n": 2})
        assert checkpoints.read_metadata() == {"n": 1}


def test_metadata_that_json_cannot_hold_is_refused_at_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="JSON compliant"):
            checkpoints.save(5, {"learner": jnp.zeros(2)}, {"best": float("nan")})
        assert checkpoints.all() == []


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (make_state(width=7), ["learner/params/dense_0/bias", "bfloat16[3]", "bfloat16[7]"]),
        (make_state()._replace(env_steps=np.zeros(1)), ["learner/env_steps", "int64[]", "float64[1]"]),
        (make_state()._replace(optimiser=()), ["learner/optimiser", "nothing here"]),
        (make_state()._replace(nothing=jnp.zeros(1)), ["learner/nothing is nothing in", "float32[1] here"]),
        (make_state()._replace(key=jax.random.split(jax.random.key(0, impl="rbg"))), ["learner/key", "key<rbg>"]),
    ],
)
def test_another_structure_is_an_error_that_names_the_first_difference(
    two_saved: Path, like: State, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        Checkpoints(two_saved).restore(None, {"learner": like})
    assert not isinstance(raised.value, CheckpointError)
    for word in words:
        assert word in str(raised.value)


def test_an_item_that_was_not_saved_is_named(two_saved: Path) -> None:
    with pytest.raises(CheckpointError, match="holds learner, replay, not actor"):
        Checkpoints(two_saved).restore_item("actor")


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    missing = Checkpoints(tmp_path / "absent")
    assert missing.latest() is None and missing.all() == []
    with pytest.raises(CheckpointError, match="a checkpoint must be in .*absent, which holds none; train first"):
        missing.restore_item("learner")


def test_a_missing_step_lists_those_there_are(two_saved: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint 15 must be in .* which holds 10, 20; choose one"):
        Checkpoints(two_saved).read_metadata(15)


def test_a_save_that_cannot_be_written_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(OSError, match=r"must be writable, got .* in .*checkpoints: .*; free space"):
        Checkpoints(tmp_path / "checkpoints").save(1, {"learner": jnp.zeros(2)}, {})


def test_a_save_that_fails_in_the_background_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError("No space left on device")

    save_some(tmp_path, 1)
    with monkeypatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr("qfleet.runtime.checkpoint_files.size_and_crc32", fail)
        checkpoints.save(2, {"learner": jnp.zeros(2)}, {})
        with pytest.raises(OSError, match=r"No space left on device; .*the newest one is 1"):
            checkpoints.wait()
    assert Checkpoints(tmp_path).all() == [1]
    save_some(tmp_path, 2)
    assert Checkpoints(tmp_path).all() == [1, 2]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("moment", ["while arrays are written", "just before it is complete"])
def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path, moment: str) -> None:
    code = """
        import os, signal, sys, time
        import numpy as np
        from qfleet.runtime import checkpoint_files
        from qfleet.runtime.checkpoints import Checkpoints
        directory, moment = sys.argv[1:]
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints = Checkpoints(directory, keep=1)
        checkpoints.save(1, {"learner": np.arange(4)}, {})
        checkpoints.wait()
        is_written = moment == "just before it is complete"
        # Without the pause, the kill could come too late.
        checkpoint_files.size_and_crc32 = kill if is_written else lambda _: time.sleep(600)
        checkpoints.save(2, {"learner": np.random.default_rng(0).random(4_000_000)}, {})
        if moment == "while arrays are written":
            while not any("tmp" in name for name in os.listdir(directory)):
                time.sleep(0.001)
            kill()
        checkpoints.wait()
    """
    assert run_python(code, tmp_path, moment).returncode == -signal.SIGKILL
    assert any("tmp" in path.name for path in tmp_path.iterdir())
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all() == [1]
        np.testing.assert_array_equal(checkpoints.restore_item("learner")["value"], np.arange(4))
        checkpoints.save(2, {"learner": np.arange(5)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_saving_is_silent_and_the_process_ends_even_if_checkpoints_are_left_open(tmp_path: Path) -> None:
    code = """
        import sys
        import jax.numpy as jnp
        from qfleet.runtime.checkpoints import Checkpoints
        assert not any(name.startswith("orbax") for name in sys.modules), "start-up must not import Orbax"
        for ending in ("closed", "left open"):
            checkpoints = Checkpoints(f"{sys.argv[1]}/{ending}")
            checkpoints.save(1, {"learner": {"w": jnp.ones((10, 10))}}, {})
            checkpoints.save(2, {"learner": {"w": jnp.ones((10, 10))}}, {})
            checkpoints.restore_item("learner")
            if ending == "closed":
                checkpoints.close()
    """
    result = run_python(code, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert Checkpoints(tmp_path / "closed").all() == Checkpoints(tmp_path / "left open").all() == [1, 2]


def test_arrays_come_back_on_the_devices_that_like_names(tmp_path: Path) -> None:
    code = """
        import os, sys
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from qfleet.runtime.checkpoints import Checkpoints
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        one = jax.sharding.SingleDeviceSharding(jax.devices()[1])
        keys = jax.random.split(jax.random.key(3), 4)
        state = {"a": jax.device_put(jnp.arange(8.0), split), "keys": jax.device_put(keys, split)}
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"learner": state}, {})
            for sharding in (split, whole, one):
                like = {
                    "a": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding),
                    "keys": jax.ShapeDtypeStruct((4,), keys.dtype, sharding=sharding),
                }
                back = checkpoints.restore_item("learner", like)
                for array in back.values():
                    assert array.sharding.is_equivalent_to(sharding, 1), (array.sharding, sharding)
                np.testing.assert_array_equal(back["a"], np.arange(8.0))
                np.testing.assert_array_equal(jax.random.key_data(back["keys"]), jax.random.key_data(keys))
    """
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_what_is_newer_than_a_chosen_checkpoint_is_set_aside_not_deleted(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for env_steps in (10, 20, 30):
            checkpoints.save(env_steps, {"learner": jnp.ones(2)}, {})
        checkpoints.wait()
        checkpoints.set_aside_after(10)
        assert checkpoints.all() == [10]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "20.set-aside", "30.set-aside"}
