"""Changes of a run's settings while it runs, as callbacks ask for them."""

from collections.abc import Mapping

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.values import to_plain
from qfleet.topologies.base import Topology
from qfleet.topologies.schedule import check_fixed


class Changes:
    """Gives settings of a topology values that replace their schedules."""

    def __init__(self, topology: Topology, config: TrainConfig) -> None:
        self._topology, self._config = topology, config

    def __call__(self, settings: Mapping[str, float | None]) -> None:
        """Sets values from the next chunk on; None goes back to the schedule.

        Raises:
          ConfigError: if the topology can't change a setting while it runs, or a value is out of bounds.
        """
        topology, fixed = self._topology, dict(self._topology.fixed)
        for name, value in settings.items():
            if name not in topology.changeable:
                can = ", ".join(topology.changeable) or "nothing"
                raise ConfigError(
                    f"a callback may set what a run decides as it goes ({can} with topology "
                    f"{self._config.topology.name}), got {name}, which is fixed when the run starts; give the run a "
                    f"schedule for it, if there is one"
                )
            fixed.pop(name, None)
            if value is not None:
                number: float = to_plain(float, value, name)
                check_fixed(self._config.agent, self._config.topology.num_envs, name, number)
                fixed[name] = number
        topology.fixed = fixed
