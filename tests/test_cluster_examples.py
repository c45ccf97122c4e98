"""The files that start runs on SLURM, Kubernetes and SkyPilot, each as far as one machine can try it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from other_processes import wait_until

from qfleet.cli.train_command import parse
from qfleet.config import ActorLearnerConfig
from qfleet.config.node_labels import has_labels, node_labels

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "examples" / "cluster"
SCHEMA = ROOT / "tests" / "data" / "rayjob_schema.json"

yaml = pytest.importorskip("yaml")


def program(folder: Path, name: str, lines: str, interpreter: str = "/bin/bash") -> None:
    """Writes a program to a folder that is searched first."""
    path = folder / name
    path.write_text(f"#!{interpreter}\n{lines}\n")
    path.chmod(0o755)


def fleet_of(command: str) -> ActorLearnerConfig:
    """Returns the topology of the run that a command of `train_or_resume.sh` begins."""
    words = shlex.split(command)
    flags = words[words.index("/runs/pong") + 1 :]
    config = parse(flags).config
    assert config.env == "ale:Pong"
    return config.topology_as(ActorLearnerConfig)


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_the_shell_can_read_each_script(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


# --- train_or_resume.sh, which the others start ---


class Started:
    """`train_or_resume.sh` with a run of CartPole, in a process."""

    def __init__(self, folder: Path, *flags: str) -> None:
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        program(programs, "qfleet", f'exec {shlex.quote(sys.executable)} -m qfleet "$@"')
        self.run, self.output = folder / "run", folder / "output"
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        command = [str(CLUSTER / "train_or_resume.sh"), str(self.run), "CartPole-v1", *flags]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def num_records(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def stop_after(self, num_records: int) -> int:
        """Sends SIGTERM once there are so many records, and returns the exit code."""
        wait_until(lambda: self.num_records() >= num_records or self.process.poll() is not None)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_one_that_has_ended_is_left_alone(tmp_path: Path) -> None:
    first = Started(tmp_path, "--env-steps", "1e9", "--stop-return", "none")
    assert first.stop_after(2) == 75, first.output.read_text()
    env_steps, num_records = first.summary()["env_steps"], first.num_records()
    assert first.summary()["stopped"] == "interrupted" and env_steps > 0
    second = Started(tmp_path, "--flags-of-train", "do not count any more")
    assert second.stop_after(num_records + 2) == 75, second.output.read_text()
    assert second.summary()["env_steps"] > env_steps


@pytest.mark.slow
def test_the_exit_code_says_whether_a_run_has_ended_or_was_refused(tmp_path: Path) -> None:
    for words in ("stopped: env steps", "has ended"):
        whole = Started(tmp_path, "--env-steps", "2048")
        assert whole.process.wait() == 0, whole.output.read_text()
        assert words in whole.output.read_text()
    (tmp_path / "run" / "summary.json").unlink()
    refused = Started(tmp_path)
    assert refused.process.wait() == 2, "all steps are taken, which qfleet resume says"
    (tmp_path / "other").mkdir()
    refused = Started(tmp_path / "other", "--no-such-flag")
    assert refused.process.wait() == 2


# --- SLURM ---

QFLEET = """
run=${@: -1}; if [ "$1" = resume ]; then run=$2; fi
mkdir -p "$run"; echo "$@" >> "$run/calls"; echo "{}" > "$run/config.json"
stopped() { echo "{\\"stopped\\": \\"$1\\"}" > "$run/summary.json"; exit 0; }
if [ -e "$run/end" ]; then stopped "env steps"; fi
trap 'stopped interrupted' TERM
touch "$run/started"
while true; do sleep 0.05; done
"""


class Slurm:
    """A SLURM of one node, whose `srun`, `scontrol`, `ray` and `qfleet` are a few lines each."""

    def __init__(self, folder: Path) -> None:
        self.run, self.requeued = folder / "run", folder / "requeued"
        programs = folder / "programs"
        programs.mkdir()
        program(programs, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
        program(programs, "scontrol", f'[ $1 = show ] && echo node7 || echo "$@" >> {self.requeued}')
        program(programs, "ray", f'echo "$@" > {folder}/ray; until [ "$1" = -- ]; do shift; done; shift; "$@"')
        program(programs, "qfleet", QFLEET)
        program(programs, "python", f'exec {shlex.quote(sys.executable)} "$@"')
        self.programs, self.ray = programs, folder / "ray"

    def job(self) -> subprocess.Popen:
        """Starts the script as `sbatch` does."""
        given = {"ID": "8", "NODELIST": "node[7-9]", "NUM_NODES": "3"}
        environment = {**os.environ, **{f"SLURM_JOB_{name}": value for name, value in given.items()}}
        environment |= {"SLURM_CPUS_PER_TASK": "32", "SLURM_SUBMIT_DIR": str(ROOT)}
        environment["PATH"] = f"{self.programs}:{environment['PATH']}"
        command = ["bash", str(CLUSTER / "slurm.sh"), str(self.run), "ale:Pong", "--preset", "ape_x"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_a_job_whose_time_is_up_saves_the_run_and_goes_on_in_another(slurm: Slurm) -> None:
    for _ in range(2):
        job = slurm.job()
        wait_until(lambda job=job: (slurm.run / "started").exists() or job.poll() is not None)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate()
        assert job.returncode == 75, output
        (slurm.run / "started").unlink()
    assert slurm.requeued.read_text() == "requeue 8\n" * 2
    (slurm.run / "end").touch()
    job = slurm.job()
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert slurm.requeued.read_text() == "requeue 8\n" * 2
    folder = slurm.run
    train = f"train ale:Pong --preset ape_x --ray-address auto --run-dir {folder}"
    assert (folder / "calls").read_text().splitlines() == [train, f"resume {folder}", f"resume {folder}"]
    assert slurm.ray.read_text().startswith("symmetric-run --address node7:6379 --min-nodes 3 --num-cpus=32 ")


def test_a_job_fails_if_ray_does_not_start_although_rays_exit_code_is_0(slurm: Slurm) -> None:
    program(slurm.programs, "ray", "echo Failed to start Ray")
    job = slurm.job()
    output, _ = job.communicate()
    assert job.returncode == 1 and not slurm.requeued.exists()
    assert output == "Failed to start Ray\nRay didn't start, as said above\n"


def test_the_flags_in_the_comments_of_the_slurm_script_are_ones() -> None:
    text = (CLUSTER / "slurm.sh").read_text()
    (flags,) = re.findall(r"slurm.sh ~/runs/pong (ale:Pong .*)", text)
    topology = parse(flags.split()).config.topology_as(ActorLearnerConfig)
    nodes, cpus = (int(re.findall(rf"#SBATCH --{name}=(\d+)", text)[0]) for name in ("nodes", "cpus-per-task"))
    assert topology.num_actors + topology.num_replay_shards + 1 <= nodes * cpus


# --- KubeRay ---


@pytest.fixture
def job() -> dict[str, Any]:
    """The RayJob, without the volume claim before it."""
    _, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    return job


def test_kuberay_knows_every_field_of_the_job(job) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(job, schema)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(job, schema)


def test_the_job_keeps_what_kuberays_operator_checks_beyond_its_schema(job) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}, "enableK8sTokenAuth is refused for a RayJob"
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "labels" not in group["rayStartParams"]


def test_each_process_of_the_job_finds_room_in_a_group_with_its_labels(job) -> None:
    topology = fleet_of(job["spec"]["entrypoint"])
    assert topology.ray_address == "auto"
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    wanted = node_labels(topology)
    needs = {"actor": topology.num_actors, "learner": 1, "replay": topology.num_replay_shards}
    cpus = {group["groupName"]: 0 for group in groups}
    for kind, number in needs.items():
        (suiting,) = (group for group in groups if has_labels(group["labels"], wanted[f"{kind}_node_labels"]))
        cpus[suiting["groupName"]] += number
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert 0 < cpus[group["groupName"]] <= group["replicas"] * int(container["resources"]["limits"]["cpu"])


# --- SkyPilot ---


def test_skypilots_task_starts_what_there_is_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75] and task["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"
    for lines in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n", "-c", lines], capture_output=True, text=True).stderr == ""
    script, command = re.findall(r"bash (\S+) (/runs/pong .*)", task["run"].replace("\\\n", " "))[0]
    topology = fleet_of(command)
    num_processes = topology.num_actors + topology.num_replay_shards + 1
    assert (ROOT / script).exists() and num_processes <= int(task["resources"]["cpus"].strip("+"))
