"""`python -m qfleet`: the command line."""

import os
import sys

try:
    current = os.getcwd()
except FileNotFoundError:
    current = ""  # it was deleted, as the command will say

if not sys.flags.safe_path and sys.path[0] == current:
    # Python puts the current folder first for `-m`, where a random.py in it would run in place of Python's own.
    folder = sys.path.pop(0)
    if folder == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
        sys.path.append(folder)  # qfleet itself is there

from qfleet.cli.main import main

sys.exit(main())
