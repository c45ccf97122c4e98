"""`qfleet export RUN`."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.cli.show import status_line
from qfleet.config import ConfigError
from qfleet.config.checks import MAX_EPISODES, check_checkpoint, check_count
from qfleet.runtime.finding_runs import POLICY_HELP, find_run
from qfleet.runtime.zoo import folder_for_outputs

_EPISODES = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExportFlags:
    """Writes what a run has learned into a new folder, for other programs or for `qfleet eval` and `watch`.

    The folder has a config.json, which says what goes in and comes out, and one file in the format.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=POLICY_HELP)]
    format: Literal["safetensors", "stablehlo", "onnx"] = "safetensors"
    """What the file is. `safetensors` is the parameters, which qfleet loads again. `stablehlo` and `onnx` are programs
    with the parameters inside, for a batch of any size; `onnx` needs the extra of that name."""
    hub_folder: bool = False
    """Write what Hugging Face's hub expects: safetensors, a model card with an evaluation, and a video if one can be
    recorded. `hf upload` then uploads it."""
    episodes: int | None = None
    """With --hub-folder: number of episodes of the evaluation. The default is 100."""
    out: str | None = None
    """Folder to write, which must be absent or empty.
    The default is `exports/<checkpoint>-<format>` in the folder of the run,
    or in zoo/NAME for an agent of the zoo."""
    checkpoint: int | Literal["best"] | None = None
    """Environment step of the checkpoint to export, or `best` for that of the best evaluation.
    The default is the newest one."""
    train_seed: int | None = None
    """Seed to export, of a run with several seeds. The default is the first one."""
    trust: bool = False
    """Import modules (MODULE:NAME, of the environment or the agent's parts) that only the run's folder names.
    Importing runs their code."""


def run(arguments: Sequence[str]) -> int:
    """Exports the run that the flags name."""
    flags = tyro.cli(_ExportFlags, prog="qfleet export", args=list(arguments), registry=FLAG_TYPES)
    check_checkpoint(flags.checkpoint)
    kind = _check_kind(flags)
    run_dir = find_run(flags.run)
    from qfleet.runtime.signals import interrupts_held_back

    with interrupts_held_back():
        from qfleet.api import load
        from qfleet.exporting.folders import check_new_folder
        from qfleet.exporting.formats import check_format
        from qfleet.runtime.activity import announce

    check_format(flags.format)  # before loading the checkpoint, which takes a while
    if flags.out is not None:
        check_new_folder(flags.out)
    policy = load(run_dir, checkpoint=flags.checkpoint, seed=flags.train_seed, trust=flags.trust)
    out = Path(flags.out) if flags.out else folder_for_outputs(Path(run_dir)) / "exports" / f"{policy.label}-{kind}"
    if flags.hub_folder:
        with status_line():
            announce("evaluating")
            policy.export_hub_folder(out, flags.episodes or _EPISODES)
    else:
        policy.export(out, flags.format)
    print(f"exported {policy.spec.name}, {policy.label}:", *sorted(out.iterdir()), sep="\n  ")
    if flags.hub_folder:
        print(f"to upload it: hf upload USER/REPOSITORY {shlex.quote(str(out))}")
    return 0


def _check_kind(flags: _ExportFlags) -> str:
    """Returns what kind of folder is wanted, after checking the flags that belong to one kind only."""
    if not flags.hub_folder:
        if flags.episodes is not None:
            raise ConfigError(
                f"--episodes must come with --hub-folder, which evaluates, got {flags.episodes} without; leave it out"
            )
        return flags.format
    if flags.format != "safetensors":
        raise ConfigError(
            f"--hub-folder must have format safetensors, which `qfleet.load` reads, got {flags.format}; leave --format "
            f"out, and export that format into another folder"
        )
    if flags.episodes is not None:
        check_count("episodes", flags.episodes, maximum=MAX_EPISODES)
    return "hub"
