"""The two errors that tell users what to do, and the names that a misspelt one was meant to be."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input: the message says the rule, the value that broke it, and the remedy."""


class RunFailed(RuntimeError):
    """The run cannot go on: the message says what happened where. Checkpoints written before are sound."""

    def __init__(self, message: str, *, learner_is_sound: bool = False) -> None:
        super().__init__(message)
        self.learner_is_sound = learner_is_sound
        """Whether what was learned until then is worth a checkpoint, because the learner did not cause the failure."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the names nearest to `word`, or '' if none is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
