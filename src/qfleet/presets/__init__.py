"""Named combinations of options, settings tuned for single environments, and the configs that they make."""

from qfleet.presets.atari import ON_ATARI
from qfleet.presets.making import make_config, make_explained_config
from qfleet.presets.named import OFF_ATARI, PRESETS, Preset
from qfleet.presets.tuned import TUNED

__all__ = ["OFF_ATARI", "ON_ATARI", "PRESETS", "TUNED", "Preset", "make_config", "make_explained_config"]
