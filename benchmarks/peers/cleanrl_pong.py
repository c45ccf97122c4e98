"""Agent steps/s of CleanRL's dqn_atari.py on Pong; runs in the peers' environment.

    python cleanrl_pong.py CHECKOUT

CleanRL isn't packaged: CHECKOUT is a folder with its repository. Its script runs as it is, by its own flags: one
environment, one update of 32 per four steps, the Nature network, a buffer of 20,000 steps, learning after 2,000; what
is timed comes after. It was written for Gymnasium 0.29, so what Gymnasium 1 changed is given back to it: the names of
two wrappers, autoreset within the step, and the name of a final observation. Its print of episodes is left out.
"""

import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv

WARMUP, TIMED = 2_400, 2_000

times: dict[int, float] = {}  # by the step that begins then


class TimedVectorEnv(SyncVectorEnv):
    """Gymnasium 0.29's vector environment, which notes when the timed steps begin and end."""

    def __init__(self, env_fns: Any) -> None:
        super().__init__(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)
        self._steps = 0

    def step(self, actions: Any) -> Any:
        if self._steps in (WARMUP, WARMUP + TIMED):
            times[self._steps] = time.perf_counter()
        self._steps += 1
        result: Any = super().step(actions)
        infos = result[-1]
        infos.pop("final_info", None)
        if "final_obs" in infos:
            infos["final_observation"] = infos["final_obs"]
        return result


gymnasium.register_envs(ale_py)
vars(gymnasium.vector)["SyncVectorEnv"] = TimedVectorEnv
vars(gymnasium.wrappers).setdefault("GrayScaleObservation", gymnasium.wrappers.GrayscaleObservation)
vars(gymnasium.wrappers).setdefault("FrameStack", gymnasium.wrappers.FrameStackObservation)

checkout = Path(sys.argv[1]).resolve()
script = str(checkout / "cleanrl" / "dqn_atari.py")
sys.path.insert(0, str(checkout))
sys.argv = [
    script,
    "--env-id=PongNoFrameskip-v4",
    "--buffer-size=20000",
    "--learning-starts=2000",
    f"--total-timesteps={WARMUP + TIMED + 1}",
]
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)  # it leaves its logs where it runs
    runpy.run_path(script, run_name="__main__")
    os.chdir(checkout)
print(json.dumps({"env_steps_per_second": TIMED / (times[WARMUP + TIMED] - times[WARMUP])}))
