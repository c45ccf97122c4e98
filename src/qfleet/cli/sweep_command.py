"""`qfleet sweep ENV --param NAME=LOW..HIGH`: trains with different settings, to find the best ones."""

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.cli.topology_flags import value_of
from qfleet.config import ConfigError, TrainConfig
from qfleet.config.own_parts import OWN_PARTS, is_own_name
from qfleet.envs.names import module_in
from qfleet.runtime.progress import can_move_cursor

if TYPE_CHECKING:
    from qfleet.sweeps.directory import SweepDirectory
    from qfleet.sweeps.sweep import SweepResult
    from qfleet.sweeps.training import SweepView

MAX_ROWS = 20
"""Most trials in the table at the end; sweep.html has all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SweepFlags:
    """Trains with different settings, and says which of them reach the highest return.

    Every flag of `qfleet train` is taken too, and holds for all trials. The result of a trial is the mean return of its
    last evaluation, over all episodes of all seeds. The sweep's folder (--run-dir) has the run of each trial, and at
    the end best.json with the best settings and sweep.html with what was found.

    Whatever has ended a sweep, the same command goes on with it: without the trials that have ended, and with those
    that were under way from their newest checkpoints.
    """

    env: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[ENV]")] = None
    """Environment, as for `qfleet train`. Left out with --resume."""
    param: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A setting that varies, once for each: NAME=LOW..HIGH, NAME=LOW..HIGH:log, or NAME=A,B,C.
    NAME is a setting of the agent or the topology, or env_steps. A list may have numbers, words, yes and no."""
    trials: int | None = None
    """Number of trials, 50 by default. A sweep that has come to its end goes on if it is larger."""
    trials_at_once: int | None = None
    """Trials in a batch. Those that differ only in numbers such as the learning rate are trained in one program.
    By default so many that they have 16 seeds in all, at least 2, if such a number varies; otherwise 1.
    On Ray, the most trials under way at the same time; by default as many as there is room for."""
    trials_on_ray: str | None = None
    """Train each trial in a process of its own on Ray: `local` starts a Ray on this machine, `auto` or HOST:PORT joins
    a cluster, whose nodes must all see the sweep's folder. For the topologies fused and overlapped."""
    trial_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Ray resources that each of these processes takes, such as `CPU 2 GPU 0.25`. By default a CPU for each device of
    the mesh and each environment worker, and a GPU for each device if there are GPUs."""
    seeds: int | None = None
    """Number of seeds of each trial, as --num-seeds. One program trains them where the environment is in JAX."""
    prune: bool = True
    """Stop a trial early if it does worse than the median of the others at the same evaluation."""
    resume: str | None = None
    """Folder of a sweep to go on with, in place of repeating its command."""
    trust: bool = False
    """Import modules (MODULE:NAME), and join the Ray cluster, that only the folder to resume or the file of --config
    names. Both run their code."""
    quiet: bool = False
    """Print nothing but errors."""


def run(arguments: Sequence[str]) -> int:
    """Runs the sweep that the flags describe, or goes on with one."""
    if {"-h", "--help"} & set(arguments):
        tyro.cli(_SweepFlags, prog="qfleet sweep", args=["--help"], registry=FLAG_TYPES)
    own, others = divide(arguments)
    flags = tyro.cli(_SweepFlags, prog="qfleet sweep", args=own, registry=FLAG_TYPES)
    directory, log = _reopened(flags, others) if flags.resume is not None else _opened(flags, others)
    from qfleet.sweeps.sweep import run_sweep

    result = run_sweep(directory, loggers=log, view=_view(quiet=flags.quiet))
    if not flags.quiet:
        _print_result(result, directory)
    return 0


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the command's own flags with their values, and all other arguments, which are those of `qfleet train`."""
    kinds = {
        field.name.replace("_", "-"): field.type for field in dataclasses.fields(_SweepFlags) if field.name != "env"
    }
    own: list[str] = []
    others: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name = argument.partition("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-")
        if not argument.startswith("--") or name not in kinds:
            others.append(argument)
            continue
        own.append(argument)
        if kinds[name] is not bool and "=" not in argument and waiting:
            own.append(waiting.pop(0))
        while name == "trial-resources" and waiting and not waiting[0].startswith("-"):
            own.append(waiting.pop(0))
    return own, others


def _opened(flags: _SweepFlags, others: list[str]) -> "tuple[SweepDirectory, tuple[str, ...]]":
    """Returns the folder of the sweep that the flags describe, and the trackers to log to.

    Raises:
      ConfigError: on bad input.
      SystemExit: if a flag is unknown or its value can't be read.
    """
    from qfleet.cli.train_command import parse

    params = _params(flags.param)
    given = {_setting_of(argument) for argument in others if argument.startswith("--")}
    if twice := sorted(given & params.keys()):
        raise ConfigError(
            f"a setting must either vary or be given for all trials, got both --param {twice[0]}=... and "
            f"--{twice[0].replace('_', '-')}; leave one of them out"
        )
    if flags.seeds is not None:
        if any(argument.partition("=")[0].replace("_", "-") == "--num-seeds" for argument in others):
            raise ConfigError(
                f"--seeds is another name of --num-seeds here, got both, --seeds {flags.seeds}; give one of the two"
            )
        others = [*others, "--num-seeds", str(flags.seeds)]
    request = parse([*others, *(["--trust"] if flags.trust else [])], prog="qfleet sweep")
    if request.print_config or request.num_seeds_at_once is not None:
        name = "--print-config" if request.print_config else "--num-seeds-at-once"
        raise ConfigError(f"{name} is a flag of `qfleet train`, and a sweep takes none, got it; leave it out")
    from qfleet.sweeps.directory import digest_of
    from qfleet.sweeps.sweep import open_sweep

    digest = digest_of(_without_run_dir(others), params, flags.prune, _content(value_of("--config", others)))
    trials = 50 if flags.trials is None else flags.trials
    directory = open_sweep(
        request.config,
        params,
        trials,
        prune=flags.prune,
        request=digest,
        trials_at_once=flags.trials_at_once,
        trials_on_ray=flags.trials_on_ray,
        trial_resources=flags.trial_resources,
    )
    return directory, request.log


def _setting_of(flag: str) -> str:
    """Returns the name of the setting that a flag gives."""
    return flag.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")


def _reopened(flags: _SweepFlags, others: list[str]) -> "tuple[SweepDirectory, tuple[str, ...]]":
    given = [*others, *(["--param"] if flags.param else []), *(["--seeds"] if flags.seeds is not None else [])]
    if given or not flags.prune:
        raise ConfigError(
            f"--resume goes on with the settings that the sweep began with, so it takes only --trials, "
            f"--trials-at-once, --trials-on-ray, --trial-resources, --trust and --quiet, got "
            f"{shlex.join(given or ['--no-prune'])}; leave it out, or begin another sweep"
        )
    from qfleet.sweeps.sweep import reopen_sweep

    path = Path(flags.resume or "")
    directory = reopen_sweep(
        path,
        trust=flags.trust,
        num_trials=flags.trials,
        trials_at_once=flags.trials_at_once,
        trials_on_ray=flags.trials_on_ray,
        trial_resources=flags.trial_resources or None,
    )
    return directory, ()


def _params(given: Sequence[str]) -> dict[str, str]:
    if not given:
        raise ConfigError(
            "a sweep must vary at least one setting, got none; give for example --param learning_rate=1e-4..1e-2:log"
        )
    params: dict[str, str] = {}
    for text in given:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not values.strip():
            raise ConfigError(
                f"--param must be NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C, got {text!r}; write for example "
                f"learning_rate=1e-4..1e-2:log"
            )
        if name in params:
            raise ConfigError(f"--param must name each setting once, got {name} twice; leave one of them out")
        params[name] = values
    return params


def _without_run_dir(arguments: Sequence[str]) -> list[str]:
    """Returns what of a command decides what a sweep does: all but its folder."""
    found, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument.replace("_", "-") == "--run-dir":
            del waiting[:1]
        elif not argument.replace("_", "-").startswith("--run-dir="):
            found.append(argument)
    return found


def _content(path: str | None) -> str | None:
    """Returns what a file of settings holds; it has been read before, so it can be, unless it is a pipe."""
    return Path(path).read_text(errors="replace") if path is not None and os.path.isfile(path) else None


def _view(*, quiet: bool) -> "SweepView":
    """Returns what shows a line for each trial, and in a terminal a live line of the trial under way."""
    from qfleet.runtime.records import Progress
    from qfleet.sweeps.directory import SweepDirectory
    from qfleet.sweeps.records import TrialRecord
    from qfleet.sweeps.training import SweepView

    if quiet:
        return SweepView()

    class View(SweepView):
        """Lines of trials on stdout, and the live line on stderr, where it is replaced again and again."""

        def __init__(self) -> None:
            self._is_live = can_move_cursor(sys.stderr)
            self._num_trials, self._config, self._best, self._evaluation = 0, TrainConfig(env=""), "", ""
            self._trials: Sequence[TrialRecord] = ()

        def begin(self, directory: SweepDirectory, num_trials: int, records: Sequence[TrialRecord]) -> None:
            config, self._num_trials = directory.plan.config, num_trials
            done = sum(each.state != "under way" for each in records)
            before = f", of which {done} have ended" if done else ""
            self._line(
                f"{config.env} with {config.preset}, {num_trials} trials of {config.env_steps:,} environment steps"
                f"{before}, into {directory.path}"
            )

        def begin_trials(self, trials: Sequence[TrialRecord], config: TrainConfig) -> None:
            self._trials, self._config, self._evaluation = trials, config, ""
            self._live("starting")

        def progress(self, progress: Progress) -> None:
            if progress.eval_return_mean is not None:
                self._evaluation = f", return {progress.eval_return_mean:.4g}"
            self._live(f"{progress.env_steps:,} of {self._config.env_steps:,} steps{self._evaluation}")

        def end_trial(self, trial: TrialRecord, best: TrialRecord | None) -> None:
            self._best = "" if best is None else f"; best: trial {best.number} with {best.value:.4g}"
            result = {"complete": f"return {trial.value or 0:.4g}", "failed": f"failed: {trial.error}"}
            if trial.value is not None:
                result["pruned"] = f"pruned at return {trial.value:.4g}"
            self._line(f"{_name(trial)}: {result.get(trial.state, trial.state)}{self._best}")

        def _live(self, text: str) -> None:
            if self._is_live and self._trials:
                line = f"{_names(self._trials)} of {self._num_trials}: {text}{self._best}"
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)

        def _line(self, text: str) -> None:
            if self._is_live:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            print(text, flush=True)

    return View()


def _names(trials: Sequence[Any]) -> str:
    """Returns one trial with its settings, or how many there are, and the number of the last one."""
    return _name(trials[0]) if len(trials) == 1 else f"{len(trials)} trials at once, up to {trials[-1].number}"


def _name(trial: Any) -> str:
    settings = " ".join(f"{name}={text}" for name, text in trial.texts.items())
    return f"trial {trial.number} ({settings})"


def _print_result(result: "SweepResult", directory: "SweepDirectory") -> None:
    """Prints the trials as a table, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    from qfleet.sweeps.page import trial_rows

    if can_move_cursor(sys.stderr):
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    rows = trial_rows(result.trials)
    if rows:
        table = Table(box=None, pad_edge=False)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        for name in columns:
            table.add_column(name, justify="left" if name == "" else "right")
        for row in rows[:MAX_ROWS]:
            table.add_row(*(row.get(name, "") for name in columns))
        Console(highlight=False, markup=False).print(table)
        if len(rows) > MAX_ROWS:
            print(f"and {len(rows) - MAX_ROWS} more")
    folder = str(result.path)
    if not result.is_complete:
        print(f"interrupted; `qfleet sweep --resume {shlex.quote(folder)}` goes on")
    if result.best is not None and result.config is not None:
        file = directory.named(directory.best_path)
        parts = [result.config.env if module_in(result.config.env) else ""]
        parts += [name for name in OWN_PARTS if is_own_name(getattr(result.config.agent, name))]
        trust = " --trust" if any(parts) else ""
        seed = result.config.seed + result.config.num_seeds  # one that no trial was chosen by
        print(f"best: trial {result.best.number}, mean greedy return {result.best.value:.4g}")
        print(f"next: qfleet train --config {shlex.quote(str(file))} --seed {seed}{trust}")
    print(f"page: {directory.named(directory.page_path)}")
