"""`python -P -m qfleet.doctor NAME`: one check, whose answer is a line of JSON on stdout."""

import json
import os
import sys

from qfleet.doctor.all_checks import CHECKS


def main() -> None:
    """Runs the check that the first argument names. What it prints itself goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        check = CHECKS[sys.argv[1]]()
        answer.write(json.dumps(check._asdict()) + "\n")


if __name__ == "__main__":
    main()
