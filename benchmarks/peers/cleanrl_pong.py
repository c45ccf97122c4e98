"""Agent steps/s of CleanRL's dqn_atari.py on Pong; runs in the peers' environment.

    python cleanrl_pong.py CHECKOUT

CleanRL isn't packaged, so CHECKOUT is a folder with its repository. Its script is run unchanged, by its own flags: one
environment, one update of 32 per four steps, the Nature network, and a buffer of 20,000 steps. Learning starts after
2,000 steps, and timing after that. The script was written for Gymnasium 0.29, so this program restores what Gymnasium 1
changed: the names of two wrappers, autoreset within the step, and the name of a final observation. It also keeps the
script from printing episodes.
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

times: dict[int, float] = {}  # when a step begins, by its number


class TimedVectorEnv(SyncVectorEnv):
    """Behaves like Gymnasium 0.29's vector environment, and notes when the timed steps begin and end."""

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
    os.chdir(folder)  # the script writes its logs to the current folder
    runpy.run_path(script, run_name="__main__")
    os.chdir(checkout)
print(json.dumps({"env_steps_per_second": TIMED / (times[WARMUP + TIMED] - times[WARMUP])}))
