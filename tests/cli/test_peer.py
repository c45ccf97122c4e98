"""One of the processes of an all-reduce run."""

import json
import subprocess
import sys

from qfleet.config import AllReduceConfig
from qfleet.config.encoding import encode_topology

CODE = """
import os, signal, sys
import qfleet.training.peer
from qfleet.cli import peer
from qfleet.runtime import peers
qfleet.training.peer.run_peer = lambda *_, **__: None
peers.Reporter = lambda descriptor: None
peers.leave = lambda: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(peer.main())
"""


def test_a_signal_to_a_process_whose_run_is_over_is_no_loss():
    topology = json.dumps(encode_topology(AllReduceConfig()))
    flags = ["--process-id=0", "--coordinator=", "--timeout-seconds=1", "--report-descriptor=2", "--env-steps=1"]
    command = [sys.executable, "-c", CODE, "run", "--topology", topology, *flags]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
