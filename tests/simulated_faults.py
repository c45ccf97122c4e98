"""What can go wrong in a simulated world."""

import dataclasses

from fleet_simulator import World


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that goes wrong. Which process it hits is left to chance."""

    kind: str

    def happen(self, world: World) -> None:
        """Makes it happen."""
        living = [host for host in world.hosts if not host.is_dead]
        if not living:  # all have died, and nobody has heard of it yet
            return
        host = world.random.choice(living)
        if self.kind == "dies":
            host.die()
        elif self.kind == "dies while it starts":
            world.random.choice([each for each in living if each.model is None] or [host]).die()
        elif self.kind == "falls silent":
            # Not before it has a node: until then nobody can tell whether a process is stuck or waits for one.
            host.is_stuck = host.is_placed
        elif self.kind == "raises":
            host.raise_soon()
        elif self.kind == "is heard late":
            host.delay(world.random.uniform(0.0, 4.0))
        elif self.kind == "inserts again":
            for each in living:
                each.repeat_insertion()
        elif self.kind == "the clock jumps":
            world.jump(60.0)
        elif self.kind == "there is no room":
            world.starved_until = world.active + world.random.uniform(5.0, 60.0)
        else:
            assert self.kind == "a node leaves"
            world.lose_node(world.random.choice(world.nodes))


FAULTS = (
    *("dies",) * 4, "dies while it starts", "falls silent", "raises", "raises", "is heard late", "inserts again",
    "the clock jumps", "there is no room", "a node leaves", "a node leaves",
)  # fmt: skip
"""Kinds of faults; those that come often are there more than once."""
