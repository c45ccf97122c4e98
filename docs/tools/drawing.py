"""A few shapes in SVG that read in light and in dark: boxes, frames, arrows and words."""

from html import escape

_COLOURS = {  # name: fill and line in light, fill and line in dark
    "acting": ("#ddf4ff", "#0969da", "#10233f", "#58a6ff"),
    "replay": ("#fff5c2", "#9a6700", "#2d2510", "#d9a62e"),
    "learning": ("#dafbe1", "#1a7f37", "#102a1b", "#46c05f"),
    "params": ("#f5e8ff", "#8250df", "#251a3c", "#b794f6"),
    "plain": ("#f6f8fa", "#57606a", "#1b2230", "#9aa4b2"),
    "break": ("#ffe3e0", "#cf222e", "#3a1618", "#ff7b72"),
}


def _style() -> str:
    light, dark = [], []
    for name, (fill, line, dark_fill, dark_line) in _COLOURS.items():
        light.append(f".{name}{{fill:{fill};stroke:{line}}}.{name}-area{{fill:{line};fill-opacity:.22}}")
        dark.append(f".{name}{{fill:{dark_fill};stroke:{dark_line}}}.{name}-area{{fill:{dark_line}}}")
    return (
        "text{font:14px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1f2328}"
        ".small{font-size:12px;fill:#57606a}.bold{font-weight:600}"
        ".card{fill:#ffffff;stroke:#d0d7de}.frame{fill:none;stroke:#8c959f;stroke-dasharray:6 4}"
        ".arrow{fill:none;stroke:#57606a;stroke-width:1.6}.head{fill:#57606a}.grid{fill:none;stroke:#d0d7de}"
        f"{''.join(light)}"
        ".thin{stroke-width:1}polyline.curve{fill:none;stroke-width:2}"
        "@media(prefers-color-scheme:dark){"
        "text{fill:#e6edf3}.small{fill:#9aa4b2}.card{fill:#12171f;stroke:#30363d}.frame{stroke:#6e7681}"
        ".arrow{stroke:#9aa4b2}.head{fill:#9aa4b2}.grid{stroke:#30363d}"
        f"{''.join(dark)}}}"
    )


class Drawing:
    """A picture that grows by what is drawn into it. Lengths are pixels, and y grows downwards."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, text: str = "", kind: str = "plain") -> None:
        """Draws a box with lines of text in its middle; the lines after the first are small."""
        self._parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        if not text:
            return
        lines = text.split("\n")
        top = y + height / 2 - (len(lines) - 1) * 8.5 + 5
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * i, line, "" if i == 0 else "small", anchor="middle")

    def frame(self, x: float, y: float, width: float, height: float, title: str) -> None:
        """Draws a dashed frame, such as a process or a device, with a title inside its upper edge."""
        self._parts.append(f'<rect class="frame" x="{x}" y="{y}" width="{width}" height="{height}" rx="10"/>')
        self.text(x + 12, y + 20, title, "small")

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """Writes one line."""
        self._parts.append(f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], label: str = "", at: tuple[float, float] | None = None,
              anchor: str = "middle", both: bool = False) -> None:  # fmt: skip
        """Draws an arrow through points, with a label `at` a place, or above its middle."""
        path = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(points))
        start = ' marker-start="url(#head)"' if both else ""
        self._parts.append(f'<path class="arrow" d="{path}" marker-end="url(#head)"{start}/>')
        if label:
            (x0, y0), (x1, y1) = points[0], points[-1]
            x, y = at or ((x0 + x1) / 2, (y0 + y1) / 2 - 7)
            for i, line in enumerate(label.split("\n")):
                self.text(x, y + 15 * i, line, "small", anchor)

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draws a thin line."""
        self._parts.append(f'<path class="arrow thin" d="M{x0} {y0} L{x1} {y1}"/>')

    def grid_line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draws a line in the background."""
        self._parts.append(f'<path class="grid" d="M{x0} {y0} L{x1} {y1}"/>')

    def area(self, points: list[tuple[float, float]], kind: str) -> None:
        """Fills the area within points, half transparent."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self._parts.append(f'<polygon class="{kind}-area" points="{path}"/>')

    def curve(self, points: list[tuple[float, float]], kind: str) -> None:
        """Draws a thick line through points."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self._parts.append(f'<polyline class="{kind} curve" points="{path}"/>')

    def legend(self, x: float, y: float, words: dict[str, str]) -> None:
        """Says what colours mean, in one row."""
        for kind, word in words.items():
            self._parts.append(f'<rect class="{kind}" x="{x}" y="{y - 11}" width="14" height="14" rx="3"/>')
            self.text(x + 20, y, word, "small")
            x += 40 + 6.7 * len(word)

    def svg(self) -> str:
        """Returns the picture."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-label="{escape(self.title, quote=True)}">\n'
            f"<style>{_style()}</style>\n"
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
            'orient="auto-start-reverse"><path class="head" d="M0 0 L10 5 L0 10 z"/></marker></defs>\n'
            f'<rect class="card" x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="10"/>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )
