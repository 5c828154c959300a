"""Measure the registration against its bars: ``python benchmarks/registration.py [--quick] [--only landmarks ...]``.

Data are read from ``SPATIAL_IMPUTE_DATA_DIR`` (folders ``landmarks``, ``her2st``, ``dlpfc``); what is missing is skipped.
For comparable times: ``ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1 OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage as ndi

from spatial_impute._registration import RegistrationParams, SectionImage, register_pair
from spatial_impute._registration._orientation import pose

ROOT = Path(os.environ.get("SPATIAL_IMPUTE_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
HER2ST_MPP = 0.688
# um per pixel: scan resolution over the share of it that was published; the drawing has none, so that of a 10x10 mm slide.
LANDMARK_MPP = {"les1_10pc": 1.74, "ratkidney_5pc": 5.06, "artificial": 10.0}


def read_image(path: Path, side: int | None = None) -> np.ndarray:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as file:
        if side is not None:
            file.draft("RGB", (side, side))
        return np.asarray(file.convert("RGB"))


def table(rows: list[dict], title: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    print(f"\n## {title}\n{frame.to_string(index=False)}", flush=True)
    return frame


# ---------------------------------------------------------------- landmarks


def bench_landmarks(quick: bool) -> None:
    """Median landmark error as share of the image diagonal, beside antspyx with its defaults."""
    folder = ROOT / "landmarks"
    rows = []
    for pair in csv.DictReader((folder / "pairs.csv").open()):
        where, mpp = folder / pair["set"], LANDMARK_MPP[pair["set"]]
        fixed, moving = (read_image(where / f"{pair[side]}.jpg") for side in ("fixed", "moving"))
        a, b = (pd.read_csv(where / f"{pair[side]}.csv", index_col="id") for side in ("fixed", "moving"))
        shared = a.index.intersection(b.index)
        a, b = a.loc[shared, ["x", "y"]].to_numpy(float), b.loc[shared, ["x", "y"]].to_numpy(float)
        diagonal = np.hypot(*fixed.shape[:2])
        row = {"pair": f"{pair['set']}: {pair['moving']} on {pair['fixed']}", "start": _share(b, a, diagonal)}
        row["oracle affine"] = round(100 * float(pair["oracle_affine_median_px"]) / diagonal, 3)
        for method in ("affine", "syn"):
            start = time.perf_counter()
            images = [SectionImage(image, (mpp, mpp)) for image in (fixed, moving)]
            result = register_pair(*images, method=method)
            row[f"{method}"] = _share(result.warp_points(b * mpp) / mpp, a, diagonal)
            row[f"{method} s"] = round(time.perf_counter() - start, 1)
        row |= {"used": result.method, "verdict": result.verdict, "residual_um": result.quality.get("residual_um")}
        for method in ("Affine", "SyN"):
            start = time.perf_counter()
            row[f"ants {method}"] = _share(_ants_points(fixed, moving, b, method), a, diagonal)
            row[f"ants {method} s"] = round(time.perf_counter() - start, 1)
        rows.append(row)
    frame = table(rows, "Landmarks: median error, % of the image diagonal")
    ours, theirs = frame[["affine", "syn"]], frame[["ants Affine", "ants SyN"]].min(axis=1)
    ratio = ours["syn"] / theirs
    print(f"ours (syn) / better antspyx default: {ratio.round(2).tolist()}, worst {ratio.max():.2f} (bar 1.10)")
    print(
        f"median over pairs: ours {ours['syn'].median():.3f} %, antspyx {theirs.median():.3f} %: "
        f"{theirs.median() / ours['syn'].median():.2f} times better (bar 2)"
    )


def _share(points: np.ndarray, truth: np.ndarray, diagonal: float) -> float:
    return round(100 * float(np.median(np.linalg.norm(points - truth, axis=1))) / diagonal, 3)


def _ants_points(fixed: np.ndarray, moving: np.ndarray, points: np.ndarray, method: str) -> np.ndarray:
    """Points of the moving image in pixels of the fixed one by ``ants.registration`` with nothing but its defaults."""
    import ants

    grey = [np.asarray(image, np.float32) @ np.float32([0.299, 0.587, 0.114]) for image in (fixed, moving)]
    images = [ants.from_numpy(np.ascontiguousarray(image.T)) for image in grey]
    with tempfile.TemporaryDirectory() as folder:
        result = ants.registration(*images, method, outprefix=f"{folder}/")
        flags = [True, False][: len(result["invtransforms"])]
        frame = pd.DataFrame(points, columns=["x", "y"])
        moved = ants.apply_transforms_to_points(2, frame, result["invtransforms"], whichtoinvert=flags)
    return moved.to_numpy()
