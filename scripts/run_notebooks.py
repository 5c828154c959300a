#!/usr/bin/env python
"""Run the tutorials in docs/notebooks, each in a fresh kernel and an empty folder, and keep their output in the file.

``python scripts/run_notebooks.py`` runs all, ``... dense judging`` those named, ``--check`` leaves the files as they are.
A notebook with an error is not written, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
SECONDS_PER_CELL = 1200
COLOURS = 256  # of the palette of a figure: a third of the size, and hardly a difference to see


def smaller_png(encoded: str) -> str:
    """The same figure with a palette."""
    figure = Image.open(io.BytesIO(base64.b64decode(encoded)))
    paper = Image.new("RGB", figure.size, "white")
    paper.paste(figure, mask=figure.getchannel("A") if figure.mode == "RGBA" else None)
    file = io.BytesIO()
    palette = paper.quantize(COLOURS - 1, method=Image.Quantize.MAXCOVERAGE)
    small = paper.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    # White stays white, or the paper of a figure with many pale colours becomes grey.
    white = Image.fromarray((np.asarray(paper) == 255).all(axis=2))
    colours = palette.getpalette()[: 3 * (COLOURS - 1)]
    small.putpalette(colours + [255] * (3 * COLOURS - len(colours)))
    small.paste(COLOURS - 1, mask=white)
    small.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave what a reader sees: no remarks of libraries, times or kernel versions, small figures."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller_png(data["image/png"])
                data.pop("text/plain", None)  # the size of the figure


def run(path: Path, *, write: bool) -> bool:
    """Execute one notebook; False if a cell raised an error."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"{path.name}: failed after {time.perf_counter() - started:.0f} s\n{error}", file=sys.stderr)
            return False
    print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
    if write:
        tidy(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
    return True


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, by default all")
    parser.add_argument("--check", action="store_true", help="run only, and leave the files as they are")
    options = parser.parse_args()
    paths = [NOTEBOOKS / f"{name}.ipynb" for name in options.names] or sorted(NOTEBOOKS.glob("*.ipynb"))
    # Kernels inherit the environment; with another backend than their own, figures would not be shown.
    os.environ.pop("MPLBACKEND", None)
    started = time.perf_counter()
    done = [run(path, write=not options.check) for path in paths]
    print(f"{sum(done)} of {len(done)} notebooks ran in {(time.perf_counter() - started) / 60:.1f} min")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
