"""Draw the figures of gallery.md by running the code it shows.

``conf.py`` calls :func:`draw` when a build starts; ``python docs/gallery_figures.py`` does it by hand. A figure that is
newer than the page and the plots is kept, and so is a figure below code that cannot run here.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "gallery.md"
PLOTS = DOCS.parent / "src" / "spatial_impute" / "pl"
SKIPPED = "# needs your own files"


def parts(text: str) -> list[tuple[str, str]]:
    """("code", source) and ("figure", path below docs) in the order of the page."""
    found = re.finditer(
        r"^```python\n(?P<code>.*?)^```$|^!\[[^\]]*\]\((?P<figure>[^)]+)\)$", text, flags=re.DOTALL | re.MULTILINE
    )
    return [(match.lastgroup, match.group(match.lastgroup)) for match in found]


def drawn_parts(text: str) -> list[tuple[str, str]]:
    """The parts of the page without the code that cannot run here, and the figures of such code."""
    kept, runs = [], True
    for kind, content in parts(text):
        if kind == "code":
            runs = not content.startswith(SKIPPED)
        if runs:
            kept.append((kind, content))
    return kept


def draw() -> list[Path]:
    """Run the page and save the last figure of a block as the image that follows it; returns what was written."""
    steps = drawn_parts(PAGE.read_text())
    figures = [DOCS / path for kind, path in steps if kind == "figure"]
    newest = max(path.stat().st_mtime for path in [PAGE, *PLOTS.glob("*.py")])
    if all(path.exists() and path.stat().st_mtime > newest for path in figures):
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    import spatial_impute as si

    si.settings.verbosity = "warning"
    space: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages; the tests watch ours
        for kind, content in steps:
            if kind == "code":
                plt.close("all")
                exec(compile(content, str(PAGE), "exec"), space)
            else:
                path = DOCS / content
                path.parent.mkdir(parents=True, exist_ok=True)
                plt.gcf().savefig(path, dpi=110, bbox_inches="tight")
    plt.close("all")
    return figures


if __name__ == "__main__":
    for written in draw():
        print(written)
