"""`python -m qfleet`: the command line."""

import sys

from qfleet.cli.main import main

sys.exit(main())
