"""The metrics of all seeds, made from those of each."""

import json
from pathlib import Path
from typing import Any

import pytest

from qfleet.runtime.seed_metrics import CombinedMetrics, SeedRecords, combined_rows


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def write(path: Path, *records: dict[str, Any]) -> None:
    append(path, "".join(json.dumps({"wall_seconds": 1.0, **record}) + "\n" for record in records))


def read(path: Path, stretch: int = 100, period: int = 100) -> SeedRecords:
    records = SeedRecords(path, stretch, period)
    records.read()
    return records


def test_means_are_over_seeds_and_counts_are_added_up(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write(first, {"env_steps": 40, "num_episodes": 1, "episode_return_mean": 2.0, "loss": 1.0, "wall_seconds": 1.0})
    write(first, {"env_steps": 80, "num_episodes": 3, "episode_return_mean": 6.0, "loss": 3.0, "wall_seconds": 2.0})
    write(second, {"env_steps": 90, "num_episodes": 2, "episode_return_mean": 9.0, "loss": None, "wall_seconds": 4.0})
    (row,) = combined_rows([read(first), read(second)])
    assert row == {
        "env_steps": 85, "wall_seconds": 3.0, "num_episodes": 6, "loss": 2.0, "episode_return_mean": 7.0,
        "episode_return_mean_seed_0": 5.0, "episode_return_mean_seed_1": 9.0,
    }  # fmt: skip


def test_evaluations_are_matched_although_seeds_play_them_at_slightly_different_steps(tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 8)):
        for env_steps, value in ((100, 1.0), (200, 3.0), (250, 5.0)):  # the last one comes early
            numbers = {"eval_return_mean": value + shift, "eval_num_cut": 2, "loss": 1.0}
            write(tmp_path / name, {"env_steps": env_steps + shift, **numbers})
    rows = [row for row in combined_rows([read(tmp_path / name) for name in "ab"]) if "eval_return_mean" in row]
    assert [(row["env_steps"], row["eval_return_mean"], row["eval_num_cut"]) for row in rows] == [
        (104, 5.0, 4), (204, 7.0, 4), (254, 9.0, 4)
    ]  # fmt: skip
    assert [row["eval_return_mean_seed_1"] for row in rows] == [9.0, 11.0, 13.0]
    assert all("loss" not in row for row in rows), "that is in the rows of training"


def test_a_seed_that_is_kept_keeps_its_last_evaluation(tmp_path: Path) -> None:
    write(tmp_path / "a", {"env_steps": 100, "eval_return_mean": 9.0})
    write(tmp_path / "b", *({"env_steps": steps, "eval_return_mean": 1.0} for steps in (100, 200)))
    seeds = [read(tmp_path / name) for name in "ab"]
    assert [row["eval_return_mean"] for row in combined_rows(seeds)] == [5.0, 1.0]
    last = combined_rows(seeds, kept=[0])[-1]
    assert (last["env_steps"], last["eval_return_mean"], last["eval_return_mean_seed_0"]) == (200, 5.0, 9.0)


def test_a_seed_that_goes_back_to_a_checkpoint_is_read_anew_and_damage_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, {"env_steps": 50, "loss": 1.0})
    append(path, 'not a record\n[1]\n{"env_steps": -5}\n{"loss": 2}\n{"env_steps": 150, "wall_seconds": 2, "loss"')
    seed = read(path)
    assert list(seed.training) == [0] and seed.env_steps == 50, "the last line isn't whole yet"
    append(path, ": 4.0}\n")
    assert seed.read() and list(seed.training) == [0, 1]
    assert not seed.read()
    (tmp_path / "new").write_text('{"env_steps": 20, "wall_seconds": 1.0, "loss": 7.0}\n')
    (tmp_path / "new").replace(path)
    assert seed.read() and seed.env_steps == 20
    assert [row["loss"] for row in combined_rows([seed])] == [7.0]
    assert not SeedRecords(tmp_path / "absent", 1, 1).read()


def test_metrics_are_replaced_as_a_whole_and_tensorboard_gets_what_no_seed_will_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", *({"env_steps": steps, "loss": 1.0} for steps in (100, 200, 300)))
    write(tmp_path / "b", {"env_steps": 100, "loss": 3.0})
    metrics = CombinedMetrics(tmp_path / "metrics.jsonl", [SeedRecords(tmp_path / name, 100, 1000) for name in "ab"])
    logged: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(metrics._events, "write", lambda steps, numbers: logged.append((steps, dict(numbers))))
    metrics.write(kept=(), pending=[1])
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 1, 1]
    assert logged == [(100, {"loss": 2.0})]
    write(tmp_path / "b", {"env_steps": 200, "loss": 5.0})
    metrics.write(kept=(), pending=())
    metrics.close()
    assert [(steps, values["loss"]) for steps, values in logged] == [(100, 2.0), (200, 3.0), (300, 1.0)]
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_the_best_evaluation_is_one_of_all_seeds(tmp_path: Path) -> None:
    write(tmp_path / "a", *({"env_steps": steps, "eval_return_mean": steps / 10} for steps in (100, 200, 300)))
    write(tmp_path / "b", *({"env_steps": steps, "eval_return_mean": 0.0} for steps in (100, 200)))
    metrics = CombinedMetrics(tmp_path / "metrics.jsonl", [SeedRecords(tmp_path / name, 100, 100) for name in "ab"])
    assert metrics.best() is None
    metrics.write(kept=(), pending=[0, 1])
    assert metrics.best() == (200, 10.0)
    metrics.close()


def test_time_goes_on_although_seeds_differ_in_speed_and_some_rows_lack_one(tmp_path: Path) -> None:
    write(tmp_path / "a", *({"env_steps": steps, "loss": 1.0, "wall_seconds": steps / 10} for steps in (100, 200, 300)))
    write(tmp_path / "b", *({"env_steps": steps, "loss": 1.0, "wall_seconds": steps / 100} for steps in (150, 300)))
    rows = combined_rows([read(tmp_path / "a", stretch=50), read(tmp_path / "b", stretch=50)])
    assert [row["env_steps"] for row in rows] == [100, 150, 200, 300]
    assert [row["wall_seconds"] for row in rows] == [5.75, 8.25, 11.0, 16.5]
