"""The two errors that tell users what to do, what code of theirs may raise, and suggestions for misspelt names."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input. The message gives the rule, the value that broke it, and the remedy."""


class RunFailed(RuntimeError):
    """The run cannot go on. The message says what happened and where. Checkpoints written earlier can be used."""

    def __init__(self, message: str, *, learner_is_sound: bool = False, num_env_failures: int = 0) -> None:
        super().__init__(message)
        self.learner_is_sound = learner_is_sound
        """Whether the learner did not cause the failure, so that what it has learned is worth a checkpoint."""
        self.num_env_failures = num_env_failures
        """Number of environments that have failed, if that caused the failure."""


RAISED_BY_USERS = (Exception, SystemExit)
"""What a user's code may raise, such as an environment, a network, or a module that is imported. Some environments end
the process when their window is closed."""


def short(error: BaseException) -> str:
    """Returns an error in one line: its type and the first line of its message."""
    first = message_in(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def message_in(error: BaseException) -> str:
    """Returns the message of an error, which may be of a class of the user's that fails to write it."""
    try:
        return str(error)
    except RAISED_BY_USERS:
        return "its message can't be shown"


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the names most similar to `word`, or '' if none is similar."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
