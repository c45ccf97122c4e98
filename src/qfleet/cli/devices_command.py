"""`qfleet devices [ENV]`: shows the devices, and what a run would keep on each of them."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qfleet.cli.streams import only_the_answer_on_stdout
from qfleet.cli.train_command import parse
from qfleet.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from qfleet.topologies.footprint import Footprint

_HELP = """\
usage: qfleet devices [ENV] [FLAGS OF qfleet train] [--json]

Without ENV: lists the devices that JAX sees, their memory, and how to get more.
With ENV, and flags as for `qfleet train`: shows the mesh that `train` would make, which of its axes each part of the
run would be divided over, and how many bytes of each part a device would hold. Nothing is allocated. The exit code is 1
if the run wouldn't fit.

  --json   print one JSON object
"""


def run(arguments: Sequence[str]) -> int:
    """Shows the devices, or what a run would keep on them."""
    rest = [argument for argument in arguments if argument != "--json"]
    if rest[:1] in (["-h"], ["--help"]):
        print(_HELP, end="")
        return 0
    as_json = len(rest) < len(arguments)
    with only_the_answer_on_stdout(as_json):  # the environment's module may print when it is imported
        request = parse(rest, prog="qfleet devices") if rest else None
    if request is not None and request.print_config:
        raise ConfigError("--print-config belongs to `qfleet train`, whose flags these are; leave it out")
    config = None if request is None else request.config
    from qfleet.runtime.signals import interrupts_held_back

    with interrupts_held_back():
        from qfleet.runtime.devices import clear_platform_errors

    with clear_platform_errors():
        return _show(config, as_json=as_json)


def _show(config: TrainConfig | None, *, as_json: bool) -> int:
    with only_the_answer_on_stdout(as_json):
        footprint, refusal = (None, None) if config is None else _footprint(config)
        machine = _machine_as_dict()
    result: dict[str, Any] = {} if config is None or footprint is None else _run_as_dict(config, footprint, refusal)
    if as_json:
        from qfleet.runtime.run_directory import strict_json

        print(strict_json({**machine, **result}))
    elif footprint is None:
        _print_machine(machine)
    else:
        _print_run(result)
    return 0 if refusal is None else 1


def _footprint(config: TrainConfig) -> tuple["Footprint", str | None]:
    """Returns what a run would keep, and the reason why it would be refused, or None."""
    from qfleet.topologies.footprint import check_fits
    from qfleet.training.assembly import footprint

    found = footprint(config)
    try:
        check_fits(config, found, footprint)
    except ConfigError as error:
        return found, str(error)
    return found, None


def _machine_as_dict() -> dict[str, Any]:
    from qfleet.config.lane_options import num_cores
    from qfleet.runtime.devices import describe_devices
    from qfleet.runtime.process import available_memory_bytes

    return {
        "devices": describe_devices(),
        "cpu_cores": num_cores(),
        "host_memory_available_bytes": available_memory_bytes(),
    }


def _run_as_dict(config: TrainConfig, footprint: "Footprint", refusal: str | None) -> dict[str, Any]:
    import dataclasses

    from qfleet.runtime.devices import available_bytes, describe_memory

    return {
        "env": config.env,
        "preset": config.preset,
        "topology": config.topology.name,
        "platform": footprint.devices[0].platform,
        "mesh": dict(footprint.axes),
        "parts": [dataclasses.asdict(part) for part in footprint.parts],
        "bytes_per_device": footprint.bytes_per_device,
        "memory_bytes_per_device": available_bytes(footprint.devices),
        "memory": describe_memory(footprint.devices),
        "refusal": refusal,
    }


def _print_machine(machine: dict[str, Any]) -> None:
    from qfleet.runtime.process import show_bytes

    rows = [
        (
            device["platform"],
            device["kind"],
            str(device["count"]),
            "the host's" if device["platform"] == "cpu" else _known(device["memory_bytes"]),
        )
        for device in machine["devices"]
    ]
    _print_table([("platform", "left"), ("kind", "left"), ("count", "right"), ("memory of each", "right")], rows)
    available = machine["host_memory_available_bytes"]
    print(f"\nhost: {machine['cpu_cores']} CPU cores", end="")
    print("" if available is None else f", {show_bytes(available)} of memory available")
    print(_how_to_get_more({device["platform"] for device in machine["devices"]}))


def _how_to_get_more(platforms: set[str]) -> str:
    if platforms == {"cpu"}:
        return (
            "more: to try meshes out, a mesh divides a CPU into as many devices as it needs (four for --mesh.data 4).\n"
            "      They share its cores and memory. For NVIDIA GPUs: pip install 'qfleet[cuda]'"
        )
    return (
        "more: JAX sees all GPUs that CUDA_VISIBLE_DEVICES allows, and a run uses mesh.data x mesh.model of them.\n"
        "      JAX_PLATFORMS=cpu runs on the CPU, which a mesh divides into as many devices as it needs"
    )


def _print_run(result: dict[str, Any]) -> None:
    from qfleet.runtime.process import show_bytes

    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    print(f"{result['env']} with {result['preset']}, {result['topology']}: mesh of {mesh}, {result['platform']}\n")
    is_one_device = all(size == 1 for size in result["mesh"].values())
    rows = [
        (
            part["name"],
            show_bytes(part["total_bytes"]),
            show_bytes(part["bytes_per_device"]),
            part["axis"] or ("" if is_one_device else "whole on each"),
        )
        for part in result["parts"]
    ]
    rows.append(
        (
            "sum",
            show_bytes(sum(part["total_bytes"] for part in result["parts"])),
            show_bytes(result["bytes_per_device"]),
            "",
        )
    )
    _print_table([("", "left"), ("total", "right"), ("per device", "right"), ("divided over", "left")], rows)
    memory = result["memory_bytes_per_device"]
    if memory is not None:
        print(f"\nmemory per device: {show_bytes(memory)} ({result['memory']})")
    print("A learner step's temporaries (activations, gradients) and the compiled program need memory in addition.")
    if result["refusal"] is not None:
        print(f"qfleet: error: {result['refusal']}", file=sys.stderr)


def _known(count: int | None) -> str:
    from qfleet.runtime.process import show_bytes

    return "unknown" if count is None else show_bytes(count)


def _print_table(columns: Sequence[tuple[str, Any]], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, side in columns:
        table.add_column(name, justify=side, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
