"""Tells when Ray no longer needs a workaround of `ray_internals`; test_cluster.py does so for `on_loopback`."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("ray")

AUTHENTICATION = """
import os, ray
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

def facts():
    is_on = get_authentication_mode() == AuthenticationMode.TOKEN
    return int(is_on), AuthenticationTokenLoader.instance().get_raw_token()[:1] if is_on else "-"

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64)
print(*facts())
from qfleet.topologies.fleet.ray_internals import read_variables_again
read_variables_again()
print(*facts())
os.environ["RAY_AUTH_TOKEN"] = "b" * 64
print(*facts())
read_variables_again()
print(*facts())
"""


def without_tokens() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}


def test_ray_does_not_read_its_variables_again_by_itself() -> None:
    raylet = pytest.importorskip("ray._raylet")
    if not hasattr(raylet, "AuthenticationTokenLoader"):
        pytest.skip("this version of Ray has no tokens")
    command = [sys.executable, "-W", "ignore", "-c", AUTHENTICATION]
    found = subprocess.run(command, capture_output=True, text=True, env=without_tokens(), timeout=120)
    assert found.returncode == 0, f"ray_internals.read_variables_again no longer works:\n{found.stderr}"
    first, after_first, second, after_second = found.stdout.splitlines()
    assert after_first == "1 a" and after_second == "1 b", "ray_internals.read_variables_again no longer works"
    assert (first, second) != ("1 a", "1 b"), (
        "Ray now notices when its variables change: delete ray_internals.read_variables_again, and its calls in cluster"
    )
