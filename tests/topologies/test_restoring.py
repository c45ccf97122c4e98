"""Which checkpoints are read as they are, and which are divided anew."""

from typing import Any

import pytest

from qfleet.config import AgentConfig
from qfleet.topologies.base import Layout
from qfleet.topologies.restoring import read_state, saved_layout

FUSED = Layout(topology="fused", num_segments=1, lanes_per_segment=32)


class StandInTopology:
    def __init__(self) -> None:
        self.layout = FUSED
        self.state = {"learner": 0, "key": 0}


class StandInCheckpoints:
    def restore(self, checkpoint: int | None, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"learner": "as it was", "key": "as it was"}, {}

    def restore_item(self, name: str, like: Any, checkpoint: int | None) -> str:
        return f"{name} alone"


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        ("fused, 32 lanes", ("fused", 1, 32)),
        ("overlapped, 8 lanes", ("overlapped", 1, 8)),
        ("actor-learner, 4 x 2 lanes", ("actor-learner", 4, 2)),
        ("parameter-server, 3 x 16 lanes", ("parameter-server", 3, 16)),
        ("gossip, 2 x 12 lanes", ("gossip", 2, 12)),
    ],
)
def test_layouts_in_words_are_still_read(words: str, layout: tuple[str, int, int]) -> None:
    topology, num_segments, lanes_per_segment = layout
    assert saved_layout({"layout": words}) == Layout(
        topology=topology, num_segments=num_segments, lanes_per_segment=lanes_per_segment
    )


@pytest.mark.parametrize("saved", [dict(FUSED), "fused, 32 lanes"], ids=["data", "words"])
def test_a_checkpoint_of_the_same_layout_is_read_whole(saved: Any) -> None:
    assert read(saved) == {"learner": "as it was", "key": "as it was"}


@pytest.mark.parametrize(
    "saved", [{**FUSED, "lanes_per_segment": 16}, "fused, 1 x 16 lanes", "overlapped, 32 lanes", "?"]
)
def test_a_checkpoint_of_another_layout_gives_only_what_can_be_divided_anew(saved: Any) -> None:
    assert read(saved) == {"learner": "learner alone"}


def read(layout: Any) -> dict[str, Any]:
    topology: Any = StandInTopology()
    checkpoints: Any = StandInCheckpoints()
    return read_state(topology, checkpoints, None, {"layout": layout}, AgentConfig(), 1)
