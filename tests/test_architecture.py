"""The core is pure, start-up doesn't wait for JAX, and no file names a package index."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qfleet

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"

CORE_MAY_IMPORT = {
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "inspect",
    "itertools",
    "math",
    "typing",
    "jax",
    "numpy",
    "optax",
    "qfleet",
}
"""None of them tells the time, starts a thread, opens a file or a socket, or knows of other processes."""

INDEX_HOSTS = ("py" + "pi.org", "python" + "hosted.org", "ana" + "conda.org", "download.py" + "torch.org")
"""Names of package indexes, each split in two because this file would otherwise name them itself."""


def modules() -> dict[str, Path]:
    """Returns the files of the package by their modules' names."""
    names = {path: ".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(path: Path) -> Iterator[str]:
    """Yields the absolute names of everything that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno} imports relative to itself"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()


def test_the_core_imports_nothing_that_could_make_it_impure() -> None:
    core = {module: path for module, path in MODULES.items() if module.startswith("qfleet.core")}
    assert core
    impure = [
        (m, name) for m, path in core.items() for name in imports(path) if name.split(".")[0] not in CORE_MAY_IMPORT
    ]
    assert impure == []


@pytest.mark.parametrize(
    "code",
    [
        "import qfleet, qfleet.config, qfleet.presets",
        "from qfleet.cli.main import main; main(['--help'])",
        "from qfleet.cli.main import main; main(['--version'])",
    ],
)
def test_what_need_not_wait_for_jax_does_not_import_it(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"import sys; {code}; sys.exit('jax' in sys.modules)"], check=True)


RUN = """
import sys
import jax
from qfleet.cli.main import main

programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **more: programs.append(more["fun_name"]) if event.endswith("/backend_compile_duration") else None
)
settings = "--preset pqn --num-envs 4 --hidden-sizes 8 --env-steps 256 --eval-period-env-steps 128 --eval-episodes 5"
arguments = [*settings.split(), "--run-dir", sys.argv[1], "--quiet", "--no-report"]
assert main(["train", "CartPole-v1", *arguments]) == 0
print(*programs)
print(*sys.modules)
programs.clear()
assert main(["eval", sys.argv[1], "--episodes", "5", "--json"]) == 0
print(*programs)
"""


def test_a_run_written_in_jax_imports_and_compiles_only_what_it_uses(tmp_path: Path) -> None:
    """Imports and programs are most of a short run's start-up."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # to compile, that is
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | fast)
    of_training, modules, _, of_evaluation = run.stdout.splitlines()
    assert sorted(of_training.split()) == ["jit(begin_episodes)", "jit(init)", "jit(play_episodes)", "jit(run)"]
    assert sorted(of_evaluation.split()) == ["jit(begin)", "jit(key_of)", "jit(play)"]
    of_others = ("actor_learner", "all_reduce", "fleet", "gossip", "overlapped", "parameter_server")
    unused = {"av", "gymnasium", "gymnax", "optuna", "PIL", "plotly", "ray", "wandb", "qfleet.policy"}
    unused |= {"qfleet.training.launched", *(f"qfleet.topologies.{name}" for name in of_others)}
    assert unused & set(modules.split()) == set()


def test_every_public_name_exists() -> None:
    assert [name for name in qfleet.__all__ if not hasattr(qfleet, name)] == []
    assert dir(qfleet) == sorted(qfleet.__all__)


def test_no_file_names_a_package_index() -> None:
    """The user tells pip where packages come from, on each machine."""
    files = list(text_files())
    assert Path(__file__).resolve() in files
    naming = [(str(path), host) for path in files for host in INDEX_HOSTS if host in path.read_text().lower()]
    assert naming == []


def text_files() -> Iterator[Path]:
    """Yields the text files of the repository, without those that its commands generate."""
    for directory, subdirectories, names in os.walk(ROOT):
        left = {"runs", "dist", "build", "site", "__pycache__"}
        subdirectories[:] = [d for d in subdirectories if d not in left and (d == ".ci" or not d.startswith("."))]
        yield from (
            Path(directory) / name
            for name in names
            if not name.endswith((".png", ".gif", ".webp", ".mp4", ".gz", ".safetensors"))
        )


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the strings that stand by themselves in a file, which document what is around them, and their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_no_docstring_opens_with_a_fragment() -> None:
    """`Of the batch.` and `That it took.` send a reader back to the name. A noun or a verb doesn't."""
    files = [path for path in text_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "tests"]
    openings = [(f"{path}:{line}", text[:40]) for path in files for line, text in docstrings(path)]
    assert len(openings) > 1_000
    assert [opening for opening in openings if re.match(r"(Of|That|Who|Whose|Whom)\b", opening[1])] == []
