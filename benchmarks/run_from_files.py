"""A run of the command line from files: one Visium section and three copies of its image, warped in known ways.

Run ``python benchmarks/run_from_files.py FOLDER`` with ``SPATIAL_IMPUTE_DATA_DIR`` at the data. Writes the images and ``run.yaml`` to the folder,
starts ``python -m spatial_impute run``, and prints its time, the verdicts and the held-out scores. The copies are turned by 170 degrees; mirrored and
turned by 20 degrees; bent, with larger pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

import spatial_impute as si

SPOT_UM = 65.0  # what Space Ranger calls the diameter of a spot of Visium
COPIES = {
    "turned": {"angle": 170.0},
    "mirrored": {"angle": 20.0, "mirror": True},
    "elastic": {"bend": 4.0, "factor": 1.25},
}


def main() -> None:
    """Make the files, run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_files(si.settings.data_dir / "visium" / "muscle_vis5a", folder)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "spatial_impute", "run", "run.yaml"], cwd=folder, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.perf_counter() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time")
    print(pd.read_csv(folder / "results" / "registration.csv", index_col=[0, 1])[["verdict", "score"]])
    print(pd.read_csv(folder / "results" / "scores.csv", index_col=0)[["pearson_gene", "mse", "skill"]].round(3))


def make_files(sample: Path, folder: Path) -> None:
    """Warped copies of the low-resolution image of a Space Ranger folder, and the file of the run."""
    factors = json.loads((sample / "spatial" / "scalefactors_json.json").read_text())
    mpp = SPOT_UM / factors["spot_diameter_fullres"] / factors["tissue_lowres_scalef"]
    rgb = np.asarray(Image.open(sample / "spatial" / "tissue_lowres_image.png").convert("RGB")).astype(float)
    lines = ["sections:", f"  muscle: {{spaceranger: {sample}}}"]
    for name, how in COPIES.items():
        Image.fromarray(warped(rgb, **how)).save(folder / f"{name}.png")
        lines.append(f"  {name}: {{image: {name}.png, mpp: {mpp * how.get('factor', 1.0):.4f}}}")
    (folder / "run.yaml").write_text("\n".join([*lines, "section_spacing: 10", "output: results", "genes: 250", ""]))


def warped(
    rgb: np.ndarray, *, angle: float = 0.0, mirror: bool = False, bend: float = 0.0, factor: float = 1.0
) -> np.ndarray:
    """Image (y, x, 3) turned around its center by `angle` degrees, mirrored, bent by `bend` px, with pixels `factor` times as large."""
    half = np.array(rgb.shape[:2]) / 2
    height, width = np.ceil(2 * half / factor).astype(int)
    places = np.stack(np.mgrid[:height, :width], axis=-1) * factor - half
    if mirror:
        places = places * [1, -1]
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    places = places @ np.array([[cos, sin], [-sin, cos]]) + half
    noise = np.random.default_rng(2).normal(size=(height, width, 2))
    field = gaussian_filter(noise, (60 / factor, 60 / factor, 0))
    places = places + bend * field / field.std()
    channels = [map_coordinates(rgb[..., k], places.transpose(2, 0, 1), order=1, mode="nearest") for k in range(3)]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
