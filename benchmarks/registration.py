"""Measure the registration against its bars: ``python benchmarks/registration.py [--quick] [--only landmarks ...]``.

Data are read from ``SPATIAL_IMPUTE_DATA_DIR`` (folders ``landmarks``, ``her2st``, ``mob_st4``, ``dlpfc``); what is missing is skipped.
For comparable times: ``ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1 OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine
from spatial_impute._registration import (
    PairResult,
    RegistrationParams,
    SectionImage,
    SectionTransform,
    chain_to_reference,
    deform_stack,
    register_pair,
)
from spatial_impute._registration.ants_fits import fit_deformable
from spatial_impute._registration.deform import contrast_fits
from spatial_impute._registration.orientation import pose
from spatial_impute._registration.types import deformation_channel, working_pixel

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def placed_pair(
    fixed: SectionImage, moving: SectionImage, *, method: str, params: RegistrationParams | None = None
) -> tuple[PairResult, SectionTransform, dict]:
    """Affine registration of a pair, its transform with any deformation, and its quality, as `register_stack` makes them."""
    params = RegistrationParams() if params is None else params
    pair = register_pair(fixed, moving, params=params)
    if method == "affine":
        return pair, SectionTransform(pair.matrix), pair.quality
    images = {"fixed": fixed, "moving": moving}
    placed = chain_to_reference({("fixed", "moving"): pair}, list(images), "fixed", params=params)
    found = deform_stack(
        images,
        placed,
        "fixed",
        params=params,
        seed=0,
        run=lambda function, tasks, _: [function(*task) for task in tasks],
        certain=method == "auto",
    )
    field, quality = found.get("moving", (None, {}))  # a section that failed is not deformed
    return pair, SectionTransform.from_field(pair.matrix, field, np.eye(3)), pair.quality | quality


# ---------------------------------------------------------------- landmarks


def bench_landmarks(*, quick: bool) -> None:
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
        start = time.perf_counter()
        images = [SectionImage(image, (mpp, mpp)) for image in (fixed, moving)]
        # Two stains of thin neighboring sections: these show the same structures, so a finer fit can follow them.
        pair_result, transform, quality = placed_pair(*images, method="syn", params=RegistrationParams(syn_side=640))
        places = apply_affine(b * mpp, transform.matrix), transform.points(b * mpp)
        row["affine"], row["syn"] = (_share(place / mpp, a, diagonal) for place in places)
        row["s"] = round(time.perf_counter() - start, 1)
        used = "syn" if transform.deforms else pair_result.method
        row |= {"used": used, "verdict": pair_result.verdict, "error_um": quality.get("error_um")}
        for method in ("Affine", "SyN"):
            start = time.perf_counter()
            row[f"ants {method}"] = _share(_ants_points(fixed, moving, b, method), a, diagonal)
            row[f"ants {method} s"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
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


# ---------------------------------------------------------------- known motions of HER2ST C


def her2st_images(names: tuple[str, ...] = ("C2", "C3", "C4", "C5", "C6")) -> dict[str, SectionImage]:
    from PIL import Image

    images = {}
    for name in names:
        path = next((ROOT / "her2st" / "ST-imgs" / "C" / name).glob("*.jpg"))
        rgb = read_image(path, 1024)
        with Image.open(path) as file:
            size = HER2ST_MPP * file.width / rgb.shape[1], HER2ST_MPP * file.height / rgb.shape[0]
        images[name] = SectionImage(rgb, size)
    return images


def moved_section(
    section: SectionImage, rng: np.random.Generator, *, angle: float, mirrored: bool, bend_um: float | None = None
) -> tuple[SectionImage, np.ndarray, np.ndarray]:
    """The section under a known motion, restained; 400 points in its tissue, and where they come from (um).

    Shift up to 25 % of the frame, scale 0.9 to 1.1, elastic with a largest displacement of 50 to 200 um and a
    correlation length of 500 um, gain of the stain in each channel 0.7 to 1.3, noise.
    """
    rgb, size = section.rgb.astype(np.float32), section.pixel_size[0]
    height, width = rgb.shape[:2]
    side = int(1.5 * max(height, width))
    rows, columns = np.nonzero(section.mask)
    centre = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) * size
    shift = rng.uniform(-0.25, 0.25, 2) * [width * size, height * size]
    forward = pose(angle, centre, np.full(2, side * size / 2) + shift, mirrored=mirrored)
    scale = rng.uniform(0.9, 1.1)
    forward[:2, :2] *= scale
    forward[:2, 2] += forward[:2, :2] @ centre * (1 / scale - 1)
    step = 8  # pixels: the bend is so smooth that it can be made on a coarser grid
    coarse = [ndi.gaussian_filter(rng.normal(size=(side // step + 3,) * 2), 500 / size / step) for _ in range(2)]
    bend = np.stack([ndi.affine_transform(c, np.eye(2) / step, output_shape=(side, side)) for c in coarse], axis=-1)
    largest = rng.uniform(50, 200)
    bend *= (largest if bend_um is None else bend_um) / np.hypot(*np.moveaxis(bend, -1, 0)).max()
    y, x = np.indices((side, side)) + 0.5
    back = np.linalg.inv(forward)
    source = np.stack([x, y], axis=-1) * size @ back[:2, :2].T + back[:2, 2] + bend
    # Tissue that fills the image shows no glass; its brightest pixels are nearest to it.
    glass = np.percentile(rgb, 99, axis=(0, 1)) if section.mask.all() else np.median(rgb[~section.mask], axis=0)
    where = [source[..., 1] / section.pixel_size[1] - 0.5, source[..., 0] / size - 0.5]
    image = np.stack([ndi.map_coordinates(rgb[..., k], where, order=1, cval=glass[k]) for k in range(3)], axis=-1)
    density = -np.log(np.clip(image, 1, None) / glass) * rng.uniform(0.7, 1.3, 3)
    image = ndi.gaussian_filter(glass * np.exp(-density), (0.7, 0.7, 0)) + rng.normal(0, 3, image.shape)
    moving = SectionImage(np.clip(image, 0, 255).astype(np.uint8), (size, size))
    rows, columns = np.nonzero(moving.mask)
    chosen = rng.choice(len(rows), 400)
    points = np.column_stack([columns[chosen] + 0.5, rows[chosen] + 0.5]) * size
    return moving, points, source[rows[chosen], columns[chosen]]


def deformed_in_any_case(fixed: SectionImage, moving: SectionImage) -> SectionTransform:
    params = RegistrationParams()
    result = register_pair(fixed, moving, method="affine", params=params)
    size = working_pixel(fixed, moving, params, side=params.syn_side)
    channels = [deformation_channel(image, size, params.max_displacement + 4 * size) for image in (fixed, moving)]
    smoothing, look = contrast_fits(params)[-1]
    field = fit_deformable(*channels, result.matrix, smoothing=smoothing, look=look, params=params, seed=0)
    return SectionTransform.from_field(result.matrix, field, np.eye(3))


def bench_synthetic(*, quick: bool, sections: Sequence[str], starts: int, first: int = 0) -> None:
    """Every section, moved in a known way, to C4: 24 rotations, on either face.

    For C4 the truth is known. For the others it is the place found for the unmoved section, deformed whether or not
    that is worth it: then a repeated registration should come out at the same place. Fewer `starts` than 48 are spread
    over the rotations, every other one mirrored; each start is the same however many are run, so a run can go on at `first`.
    """
    images = her2st_images()
    if quick:
        sections, starts = ("C4", "C3", "C5"), 6
    rows = []
    for name in sections:
        image, still = images[name], None if name == "C4" else deformed_in_any_case(images["C4"], images[name])
        for number in np.arange(first, starts) * 29 % 48:
            angle, mirrored = 15.0 * (number // 2), bool(number % 2)
            rng = np.random.default_rng([int(name[1:]), number])
            moving, points, origin = moved_section(image, rng, angle=angle, mirrored=mirrored)
            truth = origin if still is None else still.points(origin)
            start = time.perf_counter()
            pair, transform, quality = placed_pair(images["C4"], moving, method="syn")
            seconds = time.perf_counter() - start
            places = transform.points(points), apply_affine(points, transform.matrix)
            error, before = (np.linalg.norm(found - truth, axis=1) for found in places)
            row = {"section": name, "angle": angle, "mirrored": mirrored, "elastic": _elastic(points, origin)}
            row |= {"linear": np.median(before), "syn": np.median(error), "p90": np.percentile(error, 90)}
            row |= {key: quality.get(key) for key in ("folds", "error_um", "agreement", "syn_look", "verdict")}
            rows.append(row | {"used": "syn" if transform.deforms else pair.method, "s": seconds})
            print(
                ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                flush=True,
            )
        own = [row for row in rows if row["section"] == name]
        done = f"{name}: {len(own)} starts, {sum(row['syn'] < 50 for row in own)} within 50 um, median "
        print(done + f"{np.median([row['syn'] for row in own]):.1f} um", flush=True)
    frame = pd.DataFrame(rows)
    summary = frame.groupby("section").agg(
        starts=("syn", "size"),
        success=("syn", lambda e: float((e < 50).mean())),
        elastic=("elastic", "median"),
        linear=("linear", "median"),
        syn=("syn", "median"),
        worst=("syn", "max"),
        p90=("p90", "median"),
        deformed=("used", lambda u: float((u == "syn").mean())),
        folds=("folds", "max"),
        seconds=("s", "median"),
    )
    print(f"\n## Known motions, um (bars: success 1, syn <= 15, folds 0)\n{summary.round(2).to_string()}", flush=True)
    bad = frame[frame["syn"] >= 50]
    if len(bad):
        print(f"not within 50 um:\n{bad.round(1).to_string(index=False)}")


def _elastic(points: np.ndarray, origin: np.ndarray) -> float:
    """Median displacement in um that no affine map takes away."""
    points = np.column_stack([points, np.ones(len(points))])
    return float(np.median(np.linalg.norm(points @ np.linalg.lstsq(points, origin)[0] - origin, axis=1)))


# ---------------------------------------------------------------- real pairs


def bench_real(*, quick: bool) -> None:
    """HER2ST C, every section on C4: Dice, and correlation per gene with the nearest measured spot, 250 genes."""
    import spatial_impute as si

    si.settings.data_dir, si.settings.verbosity = ROOT, "warning"
    sdata, truth = si.datasets.her2st("C", measured=["C4"], truth=True)
    rows, matched = {}, {}
    for method in ("affine", "syn"):
        start = time.perf_counter()
        si.tl.register_stack(sdata, method=method, show_progress_bar=False)
        seconds = time.perf_counter() - start
        back = {name: there_and_back(sdata, name) for name in rows} if method == "syn" else {}
        for name, values in expression_check(sdata, truth).items():
            r, matched[name, method] = mean_r(*values), values
            row = sdata.attrs["spatial_impute"]["stack"]["registration"]["sections"][name]
            found = rows.setdefault(name, {"section": name})
            found |= {f"r {method}": round(r, 4), f"stack {method} s": round(seconds, 1)}
            found |= {f"error {method}": row["error_um"], f"verdict {method}": row["verdict"]}
            if method == "syn":
                found |= {"deformed": row["deformed"], "Dice syn": round(row["deformation"]["dice_after"], 3)}
                found |= {"folds": row["deformation"].get("folds", 0.0)} | back[name]
                if row["deformed"]:
                    found["r syn - affine"] = gain_interval(matched[name, "affine"], matched[name, "syn"])
            else:
                pairs = si.metrics.registration_quality(sdata)
                found["Dice affine"] = round(pairs.loc[(row["path"][1], name), "dice_after"], 3)
    title = (
        "Real pairs of HER2ST C (bars: Dice >= 0.97, r of syn not below affine; there and back < 1 um, image < 1 px)"
    )
    for row in rows.values():
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    table([{k: v for k, v in row.items() if not k.startswith(("stack", "verdict"))} for row in rows.values()], title)


def there_and_back(sdata: object, name: str) -> dict[str, float]:
    """Points through the transform and back, um; and blobs of an image against their moved centres, working pixels."""
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    import spatial_impute as si
    from spatial_impute._stack.elements import element_affine, load_transform
    from spatial_impute._stack.record import load_record

    spots, transform = sdata.tables["stack"], load_transform(sdata, load_record(sdata), name)
    points = spots.obsm["spatial"][(spots.obs["section"] == name).to_numpy()]
    error = np.linalg.norm(transform.inverse(transform.points(points)) - points, axis=1)
    some, size = points[::12], 10.0
    side = int(points.max() / size) + 60
    image, width = np.zeros((side, side), np.float32), 3.0
    for x, y in some / size - 0.5:
        rows, columns = (slice(int(v) - 15, int(v) + 17) for v in (y, x))
        yy, xx = np.mgrid[rows, columns]
        image[rows, columns] += np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * width**2))
    sdata.images["blobs"] = Image2DModel.parse(
        image[None], dims=("c", "y", "x"), transformations={name: Scale([size, size], axes=("x", "y"))}
    )
    moved = si.tl.warp_element(sdata, "blobs", pixel_size=size, inplace=False)
    del sdata.images["blobs"]
    picture, to_um = np.asarray(moved.data)[0], element_affine(moved, "aligned")
    apart = []
    for x, y in transform.points(some) / size - to_um[:2, 2] / size - 0.5:
        rows, columns = (slice(int(v) - 12, int(v) + 14) for v in (y, x))
        yy, xx = np.mgrid[rows, columns]
        window = picture[rows, columns]
        apart.append(np.hypot((window * xx).sum() / window.sum() - x, (window * yy).sum() / window.sum() - y))
    working = 22.0  # um per pixel of the fits of this stack
    return {
        "back um": round(float(np.median(error)), 3),
        "back max": round(float(error.max()), 2),
        "image px": round(float(np.median(apart)) * size / working, 3),
        "image px max": round(float(np.max(apart)) * size / working, 3),
    }


def expression_check(sdata: object, truth: object, reference: str = "C4") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per section (spots, 250 genes): its own expression, and that of the nearest spot of the reference."""
    from scipy.spatial import cKDTree

    spots = sdata.tables["stack"]
    spots = spots[spots.obs_names.isin(truth.obs_names)]  # a few spots of the array have no counts
    values = truth[spots.obs_names].X
    values = np.asarray(values.toarray() if hasattr(values, "toarray") else values, float)
    section = spots.obs["section"].astype(str).to_numpy()
    fixed = section == reference
    values = values[:, np.argsort(-values[fixed].mean(axis=0))[:250]]
    xy = spots.obsm["spatial_3d"][:, :2]
    nearest = cKDTree(xy[fixed]).query(xy)[1]
    return {
        name: (values[section == name], values[fixed][nearest[section == name]])
        for name in dict.fromkeys(section)
        if name != reference
    }


def mean_r(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson r per gene over spots, mean over genes."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return float(np.mean((a * b).sum(0)[norm > 0] / norm[norm > 0]))


def gain_interval(before: tuple, after: tuple, *, n: int = 500) -> str:
    """95 % interval of the change of the mean r, from spots drawn anew."""
    rng, changes = np.random.default_rng(0), []
    for _ in range(n):
        rows = rng.integers(0, len(before[0]), len(before[0]))
        changes.append(mean_r(*(v[rows] for v in after)) - mean_r(*(v[rows] for v in before)))
    return "{:+.4f} to {:+.4f}".format(*np.percentile(changes, [2.5, 97.5]))


# ---------------------------------------------------------------- olfactory bulb


def bench_bulb(*, quick: bool) -> None:
    """Four sections with a printed frame, by the default call and with `auto`."""
    from other_stacks import olfactory_bulb

    import spatial_impute as si

    sdata, truth = olfactory_bulb()
    rows = []
    for method in ("affine",) if quick else ("affine", "auto"):
        if method != "affine":  # the default, which the stack comes with
            si.tl.register_stack(sdata, method=method, on_failure="warn", show_progress_bar=False)
        found = sdata.attrs["spatial_impute"]["stack"]["registration"]["sections"]
        for name, pair in expression_check(sdata, truth, "MOB2").items():
            matrix, own = np.array(found[name]["matrix"]), found[name]
            row = {"section": name, "method": method, "deformed": own["deformed"], "verdict": own["verdict"]}
            row["rotation"] = round(float(np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0]))))
            row |= {"mirrored": np.linalg.det(matrix[:2, :2]) < 0, "error_um": own["error_um"], "r": mean_r(*pair)}
            rows.append(row)
            print(row, own["reasons"], flush=True)
    table(rows, "Olfactory bulb on MOB2 (bar: all ok; rotation -10, 5, 175 degrees, none mirrored)")


# ---------------------------------------------------------------- layers of the cortex


def bench_dlpfc(*, quick: bool) -> None:
    """Cortical layer of the nearest spot of the other section, from random starts."""
    from scipy.spatial import cKDTree

    labels = pd.read_csv(ROOT / "dlpfc" / "layers.tsv", sep="\t", names=["barcode", "section", "layer"])
    sections = {}
    for name in ("151507", "151508", "151509", "151510"):
        folder = ROOT / "dlpfc" / name / "spatial"
        scale = json.loads((folder / "scalefactors_json.json").read_text())["tissue_lowres_scalef"]
        spots = pd.read_csv(folder / "tissue_positions_list.csv", header=None, index_col=0)
        own = labels[labels["section"].astype(str) == name].set_index("barcode")["layer"].dropna()
        spots = spots.loc[spots.index.intersection(own.index)]
        xy = spots[[5, 4]].to_numpy(float) * scale * 16.2
        sections[name] = read_image(folder / "tissue_lowres_image.png"), xy, own.loc[spots.index].to_numpy()
    rng = np.random.default_rng(0)
    rows = []
    for a, b, gap in (("151507", "151508", 10), ("151509", "151510", 10), ("151508", "151509", 300)):
        for _ in range(1 if quick else 3):
            angle, mirrored = float(rng.uniform(0, 360)), bool(rng.random() < 0.5)
            fixed = SectionImage(sections[a][0], (16.2, 16.2))
            rgb, xy, layer = sections[b]
            side = int(1.5 * max(rgb.shape[:2])) * 16.2
            centre = np.array(rgb.shape[1::-1]) * 16.2 / 2
            motion = pose(angle, centre, np.full(2, side / 2), mirrored=mirrored)
            back = np.linalg.inv(motion)
            y, x = (np.indices((int(side / 16.2),) * 2) + 0.5) * 16.2
            source = np.stack([x, y], -1) @ back[:2, :2].T + back[:2, 2]
            where = [source[..., 1] / 16.2 - 0.5, source[..., 0] / 16.2 - 0.5]
            glass = np.median(rgb[~SectionImage(rgb, (16.2, 16.2)).mask], axis=0)
            image = np.stack([ndi.map_coordinates(rgb[..., k], where, order=1, cval=glass[k]) for k in range(3)], -1)
            row = {"fixed": a, "moving": b, "gap_um": gap, "angle": round(angle), "mirrored": mirrored}
            for method in ("affine", "syn"):
                pair, transform, _ = placed_pair(fixed, SectionImage(image, (16.2, 16.2)), method=method)
                placed = transform.points(apply_affine(xy, motion))
                nearest = cKDTree(sections[a][1]).query(placed)[1]
                row[method] = round(float((sections[a][2][nearest] == layer).mean()), 3)
            used = "syn" if transform.deforms else pair.method
            rows.append(row | {"used": used, "verdict": pair.verdict})
    table(rows, "DLPFC: accuracy of the transferred layer (bar 0.85 on adjacent sections, 10 um apart)")


# ---------------------------------------------------------------- size

_CHILD = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import ants, spatial_impute as si
si.settings.verbosity = "error"
stack = si.pp.assemble_stack({n: f"{sys.argv[1]}/images/{n}" for n in ("a", "b")}, mpp=float(sys.argv[2]), section_spacing=10.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
si.tl.register_stack(stack, reference="a", method=sys.argv[3], show_progress_bar=False, on_failure="warn")
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "before": before / 1024, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def bench_size(*, quick: bool) -> None:
    """Time of a pair and peak memory for pyramids of growing size of the same 10 mm tissue."""
    import dask.array as da
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    rng = np.random.default_rng(0)
    base = 1280
    y, x = (np.indices((base, base)) - base / 2) / (0.33 * base)
    angle = np.arctan2(y, x)
    inside = ndi.gaussian_filter((np.hypot(x, y) < 1 + 0.2 * np.cos(angle) + 0.15 * np.sin(2 * angle)).astype(float), 2)
    texture = sum(ndi.gaussian_filter(rng.normal(size=(base, base)), s) * s for s in (4, 16, 40))
    density = np.clip(0.7 + 0.25 * texture / texture.std(), 0.1, 1.6) * inside
    first = (240 * np.exp(-density * np.array([0.8, 1.0, 0.5])[:, None, None])).astype(np.uint8)
    second = np.stack([ndi.rotate(c, 35, reshape=False, order=1, cval=240) for c in first])
    rows = []
    for factor in (2, 4) if quick else (2, 16):
        with tempfile.TemporaryDirectory() as folder:
            images = {}
            for name, image in (("a", first), ("b", second)):
                small = da.from_array(image, chunks=(3, 2048 // factor, 2048 // factor))
                large = small.map_blocks(
                    lambda block, f: block.repeat(f, axis=1).repeat(f, axis=2),
                    factor,
                    dtype=np.uint8,
                    chunks=tuple(tuple(n * (factor if i else 1) for n in c) for i, c in enumerate(small.chunks)),
                )
                images[name] = Image2DModel.parse(
                    large, dims=("c", "y", "x"), scale_factors=[2] * 4, chunks={"c": 3, "y": 2048, "x": 2048}
                )
            SpatialData(images=images).write(Path(folder) / "s.zarr")
            for method in ("affine", "syn"):
                run = subprocess.run(
                    [sys.executable, "-c", _CHILD, f"{folder}/s.zarr", str(10_000 / (base * factor)), method],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found = json.loads(run.stdout.strip().splitlines()[-1])
                row = {"side_px": base * factor, "method": method, "seconds": round(found["seconds"], 1)}
                rows.append(row | {f"{key} MiB": round(found[key]) for key in ("before", "peak")})
                print(rows[-1], flush=True)
    table(rows, "Size: one pair from pyramids (bars: 30 s on one core, peak independent of the size)")


PARTS = {
    "landmarks": bench_landmarks,
    "synthetic": bench_synthetic,
    "real": bench_real,
    "bulb": bench_bulb,
    "dlpfc": bench_dlpfc,
    "size": bench_size,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer starts and smaller images, minutes instead of hours"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sections", nargs="+", default=["C4", "C2", "C3", "C5", "C6"], help="of the known motions")
    parser.add_argument("--starts", type=int, default=48, help="of the known motions, per section")
    parser.add_argument("--first", type=int, default=0, help="start of the known motions to begin with")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    pd.set_option("display.width", 250, "display.max_columns", 50)
    folders = {"landmarks": "landmarks", "synthetic": "her2st", "real": "her2st", "bulb": "mob_st4", "dlpfc": "dlpfc"}
    for name in arguments.only:
        if name in folders and not (ROOT / folders[name]).is_dir():
            print(f"\n## {name}: no data in {ROOT / folders[name]}, skipped")
            continue
        start = time.perf_counter()
        motions = {key: getattr(arguments, key) for key in ("sections", "starts", "first")}
        options = motions if name == "synthetic" else {}
        PARTS[name](quick=arguments.quick, **options)
        print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
