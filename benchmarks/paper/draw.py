"""Draws the tables: docs/pictures/TABLE.svg from what was measured, benchmarks/paper/results/TABLE.csv.

python benchmarks/paper/draw.py
"""

import sys
from pathlib import Path

import table

sys.path.append(str(Path(__file__).parents[2] / "docs" / "tools"))
from drawing import Drawing

DOCS = Path(__file__).parents[2] / "docs"

Rows = dict[str, tuple[float, float, float]]
"""For the name of each row, its value and the ends of its interval."""

TITLES = {
    "memory": "Return in MemoryChain, by the length of the chain",
    "equal_peers": "Return of equal peers in CartPole, by what they exchange",
    "ape_x": "Return of Ape-X in MinAtar's Breakout, by what is changed",
    "staleness": "Return of a parameter server in CartPole, by the number of workers and the bound on staleness",
    "pqn_minatar": "Return of PQN in MinAtar's games: qfleet's, purejaxql's, and an untrained network's",
}
WIDTH, LEFT, SCALE, ROW = 380, 110, 220, 22
"""Pixels of a panel: its width, where its scale begins and how long that is, and the height of a row."""


def draw(title: str, panels: dict[str, Rows]) -> Drawing:
    """Returns the picture: two panels side by side, and in each a point and an interval for each row."""
    items = [*panels.items()]
    pairs = [items[i : i + 2] for i in range(0, len(items), 2)]
    heights = [86 + ROW * max(len(rows) for _, rows in pair) for pair in pairs]
    it = Drawing(2 * WIDTH, sum(heights) + 44, title)
    for number, pair in enumerate(pairs):
        for column, (name, rows) in enumerate(pair):
            _panel(it, WIDTH * column, sum(heights[:number]), name, rows)
    it.legend(LEFT, it.height - 18, {"learning": "interquartile mean over seeds, and its 95 % bootstrap interval"})
    return it


def _panel(it: Drawing, left: float, top: float, name: str, rows: Rows) -> None:
    start, y = left + LEFT, top + 60
    least, most = min(0.0, *(low for _, low, _ in rows.values())), max(high for *_, high in rows.values())
    per_unit = SCALE / ((most - least) or 1.0)
    it.text(start, top + 36, name, "bold")
    for row, (middle, low, high) in rows.items():
        it.text(start - 12, y + 4, row, "small", anchor="end")
        it.grid_line(start, y, start + SCALE, y)
        x_low, x, x_high = (round(start + per_unit * (value - least), 1) for value in (low, middle, high))
        it.area([(x_low, y - 5), (x_high, y - 5), (x_high, y + 5), (x_low, y + 5)], "learning")
        it.curve([(x, y - 6), (x, y + 6)], "learning")
        it.text(start + SCALE + 8, y + 4, f"{middle:.1f}" if abs(middle) >= 10 else f"{middle:.2f}", "small")
        y += ROW
    for value, anchor in ((least, "start"), (most, "end")):
        it.text(start + per_unit * (value - least), y + 8, f"{value:.3g}", "small", anchor=anchor)


def main() -> None:
    """Draws what has been measured."""
    for name, title in TITLES.items():
        panels: dict[str, Rows] = {}
        for (group, row), agents in table.read(table.RESULTS / f"{name}.csv").items():
            panels.setdefault(group, {})[row] = table.statistics_of(agents)
        if panels:
            (DOCS / "pictures" / f"{name}.svg").write_text(draw(title, panels).svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
