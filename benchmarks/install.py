"""Installs the peers that qfleet is measured against into an environment of their own, `benchmarks/.peers`.

    make bench-peers

Benchmarks start a peer with that environment's Python. The environment takes 2.6 GB, or more if pip's index has PyTorch
with CUDA.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".peers"


def main() -> None:
    """Creates the environment if there is none, and installs the packages that it lacks."""
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    requirements = HERE / "peers" / "requirements.txt"
    python = ENVIRONMENT / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)], check=True)
    print(f"The peers are in {ENVIRONMENT}")


if __name__ == "__main__":
    main()
