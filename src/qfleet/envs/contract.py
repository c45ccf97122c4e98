"""What an environment outside the program must return, step by step, and the error that says what it returned instead.

Worker processes import this module, so it must not import JAX.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qfleet.config.errors import RAISED_BY_USERS

if TYPE_CHECKING:
    import gymnasium

_TOO_LARGE = 2.0**128 * (1 - 2.0**-25)  # the least number that becomes infinity in float32

_SIGNATURE = "reset(self, *, seed=None, options=None)"


class BrokenContract(ValueError):
    """An environment returned something that can't be learned from. The message says what, and what is right."""


def reset_env(env: "gymnasium.Env", seed: int | None) -> tuple[Any, Mapping[str, Any]]:
    """Starts an episode and returns the raw observation and `info`.

    Raises:
      BrokenContract: if `reset` doesn't return such a pair. It may also raise whatever the environment raises.
    """
    result: Any = env.reset(seed=seed)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result
    older = "" if isinstance(result, tuple) else ", as Gym before version 0.26 had it"
    raise BrokenContract(f"reset must return (observation, info), got {summary(result)}{older}{at(env, 'reset')}")


def step_env(env: "gymnasium.Env", action: Any) -> tuple[Any, float, bool, bool, Any]:
    """Takes one step and returns the raw observation, the reward as the replay stores it, two flags, and `info`.

    Raises:
      BrokenContract: if `step` doesn't return five such values. It may also raise whatever the environment raises.
    """
    result: Any = env.step(action)
    try:
        if not isinstance(result, tuple) or len(result) != 5:
            older = ", as Gym before version 0.26 had it" if isinstance(result, tuple) and len(result) == 4 else ""
            raise BrokenContract(
                f"step must return (observation, reward, terminated, truncated, info), got {summary(result)}{older}"
            )
        raw, reward, terminated, truncated, info = result
        return raw, to_reward(reward), to_flag("terminated", terminated), to_flag("truncated", truncated), info
    except BrokenContract as error:
        raise BrokenContract(f"{error}{at(env, 'step')}") from None


def has_mask(info: Any) -> bool:
    """Returns whether `info`, which may be anything after a step, holds an action mask."""
    return isinstance(info, Mapping) and "action_mask" in info


def to_reward(value: Any) -> float:
    """Returns a reward that float32 can hold. An array of one number counts as that number.

    Raises:
      BrokenContract: if the reward isn't one finite number, or is too large.
    """
    if type(value) is not float:  # most rewards are
        number = to_numbers("the reward", value)
        if number.size != 1:
            raise BrokenContract(f"the reward must be one number, got an array of shape {number.shape}")
        value = float(number.reshape(()))
    if not abs(value) < _TOO_LARGE:  # NaN isn't either
        raise BrokenContract(f"the reward must be finite in float32, got {value}")
    reward: float = value
    return reward


def to_flag(name: str, value: Any) -> bool:
    """Returns `terminated` or `truncated` as a bool. A number that is 0 or 1 counts, as does an array of one flag.

    Raises:
      BrokenContract: if it is anything else.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    flag = to_numbers(name, value)
    if flag.size != 1 or flag.reshape(()) not in (0, 1):
        raise BrokenContract(f"{name} must be True or False, got {summary(value)}")
    return bool(flag.reshape(()))


def to_lanes(what: str, value: Any, num_lanes: int) -> np.ndarray:
    """Returns the numbers that a vector environment returned for its lanes, `[num_lanes]`.

    Raises:
      BrokenContract: if they aren't one number for each lane.
    """
    numbers = to_numbers(what, value)
    if numbers.shape != (num_lanes,):
        raise BrokenContract(f"{what} must have shape {(num_lanes,)}, got {numbers.shape}")
    return numbers


def to_flags(name: str, value: Any, num_lanes: int) -> np.ndarray:
    """Returns `terminated` or `truncated` of a vector environment, `[num_lanes]` bool, in a new array.

    Raises:
      BrokenContract: if it isn't one flag, or 0 or 1, for each lane.
    """
    numbers = to_lanes(name, value, num_lanes)
    if numbers.dtype == np.bool_:  # as nearly always
        return numbers.copy()
    is_flag = (numbers == 0) | (numbers == 1)
    if not is_flag.all():
        raise BrokenContract(f"{name} must be True or False in each lane, got {numbers[~is_flag][0]}")
    return numbers.astype(bool)


def to_numbers(what: str, value: Any) -> np.ndarray:
    """Returns numbers as an array of bools, integers or floats; floats too long for float64 become infinite.

    Raises:
      BrokenContract: if the value isn't made of numbers, or not in the shape of an array.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value
    try:
        numbers = np.asarray(value)
        if numbers.dtype.kind == "O" and all(isinstance(number, int) for number in numbers.flat):
            numbers = _wide(numbers)
    except Exception as error:  # nested lists of different lengths, or an object that fails to convert itself
        raise BrokenContract(f"{what} must be made of numbers, got {summary(value)} ({error})") from None
    if numbers.dtype.kind not in "biuf":
        raise BrokenContract(f"{what} must be made of numbers, got {summary(value)}")
    return numbers


def _wide(numbers: np.ndarray) -> np.ndarray:
    """Returns integers of more than 64 bits as float64, and infinity for those that don't fit."""

    def convert(number: int) -> float:
        try:
            return float(number)
        except OverflowError:
            return np.inf if number > 0 else -np.inf

    return np.array([convert(number) for number in numbers.flat], np.float64).reshape(numbers.shape)


def summary(value: Any) -> str:
    """Returns a description of any value in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, tuple):
        return f"{len(value)} values ({', '.join(type(item).__name__ for item in value)})"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)[:10]}"
    try:
        text = repr(value)
    except Exception:  # an object of the user's may fail to describe itself
        text = object.__repr__(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def at(env: "gymnasium.Env", method: str) -> str:
    """Returns the place in the user's code that has a method, in brackets, or '' if Python doesn't know it."""
    kind = type(env.unwrapped)
    code = getattr(getattr(kind, method, None), "__code__", None)
    return f" ({method} of {kind.__name__}, {code.co_filename}:{code.co_firstlineno})" if code else ""


def explain(error: BaseException, make: "Callable[[], gymnasium.Env]", action: Any) -> BaseException:
    """Returns the breach of the contract behind an error that an environment raised before it ever worked.

    Gymnasium's wrappers stand between qfleet and the environment. If that returns 4 values instead of 5, a wrapper
    fails to unpack them, and its error says nothing about the environment. So this asks a fresh environment without its
    wrappers. If that keeps the contract, or the error came from the environment itself, the error is returned as it is.
    """
    if isinstance(error, BrokenContract) or not _is_from_a_wrapper(error):
        return error
    env: gymnasium.Env | None = None
    try:
        env = make().unwrapped
        try:
            inspect.signature(env.reset).bind(seed=0, options=None)
        except TypeError:
            found = f"reset must be {_SIGNATURE}, got reset{inspect.signature(env.reset)}"
            return BrokenContract(f"{found}{at(env, 'reset')}")
        reset_env(env, 0)
        step_env(env, action)
    except BrokenContract as breach:
        return breach
    except RAISED_BY_USERS:  # it failed again, but not by breaking the contract
        return error
    finally:
        if env is not None:
            with contextlib.suppress(*RAISED_BY_USERS):  # a broken environment may well fail to close too
                env.close()
    return error


def _is_from_a_wrapper(error: BaseException) -> bool:
    """Returns whether Gymnasium's code that calls the environment, or qfleet's, raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return is_between(name)


def is_between(module: str) -> bool:
    """Returns whether a module stands between the training loop and the environment's own code."""
    is_gymnasium = module.startswith("gymnasium.") and not module.startswith("gymnasium.envs.")
    return is_gymnasium or module.startswith(("qfleet.envs.contract", "qfleet.envs.lane_group"))
