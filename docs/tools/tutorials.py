"""The pages of the tutorials, which are notebooks: the site's builder doesn't read these."""

import json
from pathlib import Path

from formatting import wrap


def pages(folder: Path) -> dict[str, str]:
    """Returns a page for each notebook in a folder, by its path below docs/."""
    return {f"{folder.name}/{path.stem}.md": page(path) for path in sorted(folder.glob("*.ipynb"))}


def page(path: Path) -> str:
    """Returns a notebook as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{text}\n```")
        else:
            parts += [wrap(paragraph) for paragraph in text.split("\n\n")]
    title, *rest = parts
    note = f"This page is the notebook `docs/{path.parent.name}/{path.name}`, which the tests run."
    return "\n\n".join([title, note, *rest])
