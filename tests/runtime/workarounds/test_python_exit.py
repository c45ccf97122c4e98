"""The end of Python: the workaround is called while threads still work, and exit functions still aren't."""

import subprocess
import sys

from qfleet.runtime.workarounds import python_exit

CODE = """
import atexit
from concurrent.futures import ThreadPoolExecutor
from qfleet.runtime.workarounds.python_exit import call_before_threads_end

pool = ThreadPoolExecutor()
pool.submit(int).result()  # in Python 3.12, no thread can be started later

def tell(name):
    try:
        pool.submit(print, name, "works").result()
    except RuntimeError:
        print(name, "fails")

call_before_threads_end(lambda: tell("workaround"))
atexit.register(tell, "atexit")
"""


def test_threads_work_in_the_workaround_and_still_not_in_exit_functions() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    workaround, exit_function = done.stdout.splitlines()
    assert workaround == "workaround works", done.stderr
    assert exit_function == "atexit fails", (
        "this workaround may be no longer needed, because exit functions can use threads; if this is so in every "
        f"supported version of Python, use atexit and delete {python_exit.__file__} and its test"
    )
