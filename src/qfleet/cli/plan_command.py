"""`qfleet plan ENV`: predicts a run before it starts."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qfleet.cli.show import status_line
from qfleet.cli.streams import only_the_answer_on_stdout
from qfleet.cli.train_command import parse
from qfleet.config import ConfigError

if TYPE_CHECKING:
    from qfleet.planning.prediction import Plan

_HELP = """\
usage: qfleet plan ENV [FLAGS OF qfleet train] [--measure] [--cluster FILE] [--json]

Predicts a run before it starts: environment steps/s, learner steps/s, the time that all steps take, the memory of each
process, the bytes between them, what limits the run, and what one more actor, lane, core or GPU would bring. The first
plan measures the parts of the run on this machine, which takes some seconds; later ones read what they cost from the
disk. No run is started. Where the learner has GPUs, one more is assumed to be linked at 20 GB/s, as over PCIe 4.0.

  --measure        measure the parts again
  --cluster FILE   predict for the nodes that a TOML or JSON file describes; see docs/plan.md
  --json           print one JSON object
"""


def run(arguments: Sequence[str]) -> int:
    """Predicts a run and prints the plan."""
    rest, flags, cluster_path = _taken(arguments)
    if not rest or {"-h", "--help"} & set(rest[:1]):
        print(_HELP, end="")
        return 0 if rest else 2
    as_json = "--json" in flags
    with only_the_answer_on_stdout(as_json):  # the environment's module may print when it is imported
        request = parse(rest, prog="qfleet plan")
        if request.print_config:
            raise ConfigError("--print-config belongs to `qfleet train`, whose flags these are; leave it out")
        from qfleet.runtime.signals import interrupts_held_back

        with interrupts_held_back():
            from qfleet.planning.cluster import read_cluster
            from qfleet.planning.planner import make_plan
            from qfleet.runtime.devices import clear_platform_errors

        cluster = None if cluster_path is None else read_cluster(cluster_path)
        with clear_platform_errors(), status_line():
            plan = make_plan(request.config, cluster, measure="--measure" in flags)
    if as_json:
        from qfleet.runtime.run_directory import strict_json

        print(strict_json(plan.as_dict()))
    else:
        _print(plan)
    return 0


def _taken(arguments: Sequence[str]) -> tuple[list[str], set[str], str | None]:
    """Returns the flags of `train`, this command's own flags without values, and the file of the cluster."""
    rest, flags, path = [], set(), None
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, has_value, value = argument.partition("=")
        if argument in ("--measure", "--json"):
            flags.add(argument)
        elif name == "--cluster":
            if not has_value and not waiting:
                raise ConfigError("--cluster must be followed by a file, got nothing; give a TOML or JSON file")
            if path is not None:
                raise ConfigError(f"--cluster must be given once, got it twice, first with {path}; leave one out")
            path = value if has_value else waiting.pop(0)
        else:
            rest.append(argument)
    return rest, flags, path


def _print(plan: "Plan") -> None:
    speed = plan.speed
    print(f"{plan.env} with {plan.preset}, {plan.topology}, on {plan.place}\n")
    rows = [
        ("environment steps/s", f"{speed.env_steps_per_second:,.0f}"),
        ("learner steps/s", f"{speed.learner_steps_per_second:,.1f}"),
        (f"{plan.env_steps:,} steps take", _duration(plan.seconds)),
        ("the warm-up takes", f"{_duration(speed.warmup_seconds)} ({speed.warmup_env_steps:,} environment steps)"),
        ("what limits it", speed.limit),
        *(("who waits", wait) for wait in speed.waits),
        ("between processes", f"{speed.moved_bytes_per_env_step:,.0f} bytes per environment step"),
    ]
    if speed.wire_bytes_per_env_step:
        rate = speed.wire_bytes_per_env_step * speed.env_steps_per_second
        rows.append(
            ("on the wire", f"{speed.wire_bytes_per_env_step:,.0f} bytes per environment step, {rate:,.0f} per s")
        )
    if speed.num_lost:
        rows.append(("lost processes", f"{speed.num_lost} in {_duration(speed.simulated_seconds)} that were simulated"))
    _print_table(rows)
    print("\nbusy")
    _print_table([(f"  {name}", f"{share:.0%}") for name, share in speed.busy.items()])
    _print_memory(plan)
    if plan.what_if:
        print("\nwhat it would bring")
        _print_table(
            [
                (f"  {each.change}", f"{each.env_steps_per_second:,.0f} environment steps/s, {each.gain:+.0%}")
                for each in plan.what_if
            ]
        )
    for advice in plan.advice:
        print(f"\nadvice: {advice.text} ({advice.source})")
    print("\nStart, evaluations and checkpoints take time in addition.", file=sys.stderr)


def _print_memory(plan: "Plan") -> None:
    from qfleet.runtime.process import show_bytes

    print("\nmemory")
    rows = []
    for name, number in plan.num_processes.items():
        size = plan.process_memory_bytes.get(name)
        rows.append((f"  {number} x {name}", "not measured" if size is None else f"{show_bytes(size)} each"))
    total = sum(plan.device_memory_bytes.values())
    largest = sorted(plan.device_memory_bytes.items(), key=lambda part: -part[1])[:3]
    rows.append(
        ("  arrays on a device", f"{show_bytes(total)}: " + ", ".join(f"{n} {show_bytes(s)}" for n, s in largest))
    )
    _print_table(rows)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
