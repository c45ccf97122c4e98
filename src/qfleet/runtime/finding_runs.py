"""Finds the folder of a run by what a user calls it."""

import glob
import sys
from pathlib import Path

from qfleet.config import ConfigError
from qfleet.runtime.zoo import resolve_zoo

RUN_HELP = "The run's folder, the beginning of its name, or `latest`: the newest run in runs/."
"""What the help says about RUN."""

POLICY_HELP = (
    f"{RUN_HELP.removesuffix('.')}. Or the folder of an exported policy, or an agent that comes with qfleet, "
    "as zoo:cartpole; `qfleet zoo` lists them."
)
"""What it says where a policy is all that is needed."""

_RUNS = Path("runs")


def find_run(text: str) -> str:
    """Returns the folder of a run: `text` itself, or what it stands for among the runs below runs/.

    `latest` is the run that began last. Any other text may be the beginning of one run's name, with or without `runs/`.
    What it stands for is said on stderr. A text that stands for nothing is returned as it is. `zoo:` and a name stand
    for an agent that comes with qfleet.

    Raises:
      ConfigError: if it stands for several runs, there is no run yet, or the zoo has no such agent.
    """
    text = str(resolve_zoo(text))
    try:
        if not text or Path(text).exists():
            return text
    except OSError as error:  # too long a name, or a folder that can't be entered
        raise ConfigError(f"RUN must be a run's folder, got {text[:200]} ({error.strerror}); give another") from error
    if text == "latest":
        runs = _runs_like(_RUNS / "*")
        if not runs:
            raise ConfigError(
                f"`latest` means the newest run in runs/, got none in {_RUNS.absolute()}; give the run's folder"
            )
        found = max(runs, key=lambda run: ((run / "config.json").lstat().st_mtime_ns, run.name))
    else:
        escaped = Path(glob.escape(text) + "*")
        runs = _runs_like(escaped) or _runs_like(_RUNS / escaped)
        if not runs:
            return text
        if len(runs) > 1:
            names = ", ".join(str(run) for run in runs[:5])
            raise ConfigError(
                f"RUN must be the beginning of one run's name, got {text}, with which {len(runs)} begin: {names}"
                f"{' ...' if len(runs) > 5 else ''}; give more of it"
            )
        found = runs[0]
    print(f"qfleet: {text} is {found}", file=sys.stderr)
    return str(found)


def _runs_like(pattern: Path) -> list[Path]:
    return sorted(Path(file).parent for file in glob.glob(str(pattern / "config.json")))
