"""Checks of what is installed: packages, extras, devices, the compilation cache, video."""

import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qfleet.config import ConfigError
from qfleet.doctor.check import Check, from_error
from qfleet.runtime.process import show_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_OURS = "qfleet"

_FOR_DEVELOPERS = ("dev", "docs")
"""Extras that no user needs."""

_LARGE_CACHE_BYTES = 5 * 10**9


def packages() -> Check:
    """Compares the installed packages that qfleet needs with the versions that it was made for."""
    versions, wrong = {}, []
    for requirement in _requirements(_OURS):
        versions[requirement.name] = _version_of(requirement.name)
        wrong += _unmet(requirement)
    ours = _version_of(_OURS)
    facts = {"python": platform.python_version(), _OURS: ours, "packages": versions}
    if ours is None:
        text = "qfleet runs from a source tree that was never installed, so its requirements aren't known"
        return Check("packages", "warn", text, "pip install -e . in that tree", facts)
    words = f"Python {platform.python_version()}, qfleet {ours}, "
    words += ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "numpy") if versions.get(name))
    if wrong:
        needed = " ".join(f"'{requirement}'" for requirement in wrong)
        found = ", ".join(f"{each.name} {_version_of(each.name) or 'is missing'}" for each in wrong)
        return Check("packages", "bad", f"{words}; not as needed: {found}", f"pip install {needed}", facts)
    return Check("packages", "good", words, facts=facts)


def extras() -> Check:
    """Says which of qfleet's extras are installed."""
    there: list[str] = []
    absent: list[str] = []
    partly: list[str] = []
    declared = importlib.metadata.metadata(_OURS).get_all("Provides-Extra") or () if _version_of(_OURS) else ()
    for extra in sorted(set(declared) - set(_FOR_DEVELOPERS)):
        needed = list(_requirements(_OURS, extra))
        unmet = [each for requirement in needed for each in _unmet(requirement)]
        is_older = any(_version_of(each.name) for each in unmet)
        (there if not unmet else partly if is_older else absent).append(extra)
    facts = {"installed": there, "not_installed": absent, "outdated": partly}
    words = f"installed: {', '.join(there) or 'none'}"
    if absent:
        words += f"; not installed: {', '.join(absent)}"
    if partly:
        words += f"; in another version than qfleet needs: {', '.join(partly)}"
        return Check("extras", "warn", words, f"pip install 'qfleet[{','.join(partly)}]'", facts)
    remedy = "to add one: pip install 'qfleet[NAME]'" if absent else ""
    return Check("extras", "good", words, remedy, facts)


def devices(dev: Path = Path("/dev")) -> Check:
    """Starts JAX, and says which devices it sees.

    Args:
      dev: folder of the system's devices. Tests use another.
    """
    from qfleet.runtime.devices import clear_platform_errors, describe_devices

    try:
        with clear_platform_errors():
            kinds = describe_devices()
    except ConfigError as error:
        return from_error("devices", "bad", error)
    words = ", ".join(
        f"{kind['count']} x {kind['kind']} ({kind['platform']}"
        + (f", {show_bytes(kind['memory_bytes'])} each)" if kind["memory_bytes"] else ")")
        for kind in kinds
    )
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        words += f", as JAX_PLATFORMS={chosen} says"
    facts = {"devices": kinds, "nvidia_gpus": len(list(dev.glob("nvidia[0-9]*")))}
    if facts["nvidia_gpus"] and not chosen and all(kind["platform"] == "cpu" for kind in kinds):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and hidden.strip() in ("", "-1"):
            return Check("devices", "good", f"{words}; CUDA_VISIBLE_DEVICES={hidden} hides the NVIDIA GPU", "", facts)
        text = f"{words}; there is an NVIDIA GPU that JAX doesn't use"
        return Check("devices", "warn", text, "pip install 'qfleet[cuda]', and look whether nvidia-smi works", facts)
    return Check("devices", "good", words, facts=facts)


def cache() -> Check:
    """Says where compiled programs are kept, and how large they have become."""
    from qfleet.runtime.cache import CacheUnusable, usable_cache_folder

    try:
        folder = usable_cache_folder()
    except CacheUnusable as error:
        return Check("compile cache", "warn", f"there is none, so every start compiles anew: {error}", error.remedy)
    sizes = list(_file_sizes(folder))
    facts = {"folder": str(folder), "bytes": sum(sizes), "files": len(sizes)}
    words = f"{show_bytes(sum(sizes))} in {len(sizes):,} files of {folder}"
    if sum(sizes) > _LARGE_CACHE_BYTES:
        return Check("compile cache", "warn", words, "delete it when no run is under way; it is made again", facts)
    return Check("compile cache", "good", words, facts=facts)


def video() -> Check:
    """Writes a short video as `qfleet watch` does. Frames are drawn in memory, so no display is needed."""
    from qfleet.runtime.video import check_extra, write_sample

    absent = [each for requirement in _requirements(_OURS, "video") for each in _unmet(requirement)]
    if absent:
        names = " and ".join(requirement.name for requirement in absent)
        return Check("video", "good", f"none can be written without {names}", "pip install 'qfleet[video]'")
    try:
        check_extra()
        with tempfile.TemporaryDirectory() as folder:
            write_sample(Path(folder))
    except ConfigError as error:
        return from_error("video", "warn", error)
    except (OSError, ValueError, RuntimeError) as error:  # of PyAV and Pillow
        text = f"no video can be written ({error})"
        return Check("video", "warn", text, "pip install --force-reinstall 'qfleet[video]'")
    versions = {name: _version_of(name) for name in ("av", "pillow")}
    words = f"mp4 and GIF can be written, by PyAV {versions['av']} and Pillow {versions['pillow']}, without a display"
    return Check("video", "good", words, facts=versions)


def _requirements(package: str, extra: str = "") -> "Iterator[Requirement]":
    """Yields what an installed package requires on this system: by itself, or only for one of its extras."""
    from packaging.requirements import Requirement  # here, because only some checks need it

    try:
        lines = importlib.metadata.requires(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        is_basic = marker is None or marker.evaluate({"extra": ""})
        if is_basic if not extra else (not is_basic and marker is not None and marker.evaluate({"extra": extra})):
            yield requirement


def _unmet(requirement: "Requirement") -> "list[Requirement]":
    """Returns what is missing of a requirement, or is there in another version: itself, or what its extras require."""
    version = _version_of(requirement.name)
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        return [requirement]
    return [
        each
        for extra in requirement.extras
        for inner in _requirements(requirement.name, extra)
        for each in _unmet(inner)
    ]


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_sizes(folder: Path) -> Iterator[int]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield entry.stat(follow_symlinks=False).st_size
