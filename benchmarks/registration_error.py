"""Compare the stated error of a registration with the true one: ``python benchmarks/registration_error.py [parts]``.

Parts: ``drawn`` (tissue drawn by this file), ``landmarks``,
``motions`` (known motions of sections of four tissues). Data are read from ``SPATIAL_IMPUTE_DATA_DIR``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from registration import LANDMARK_MPP, ROOT, moved_section, placed_pair, read_image
from scipy import ndimage as ndi
from scipy.stats import spearmanr

from spatial_impute._registration import SectionImage

if TYPE_CHECKING:
    from collections.abc import Iterator

Case = tuple[str, SectionImage, SectionImage, np.ndarray, np.ndarray]
SIZE = 8.0  # um per pixel of the drawn tissue
BENDS = (0.0, 60.0, 120.0, 200.0)  # um, the largest displacement


def drawn(number: int) -> tuple[SectionImage, SectionImage]:
    """Two sections of one tissue: outline, regions and vessels are shared, cells are not."""
    rng = np.random.default_rng(number)
    shape = (520, 620)
    y, x = np.mgrid[: shape[0], : shape[1]]
    angle = np.arctan2((y - 260) / 170, (x - 310) / 210)
    wobble = sum(rng.normal(0, 0.06) * np.sin(k * angle + rng.uniform(0, 6)) for k in range(2, 9))
    inside = ndi.gaussian_filter((np.hypot((y - 260) / 170, (x - 310) / 210) < 0.85 + wobble).astype(float), 0.7)
    regions = sum(ndi.gaussian_filter(rng.normal(size=shape), s) * s for s in (6, 15, 40))
    vessels = ndi.gaussian_filter((rng.random(shape) < 3e-4).astype(float), 3)
    sections = []
    for _ in range(2):
        cells = ndi.gaussian_filter(rng.normal(size=shape), 1.0)
        own = 0.15 * ndi.gaussian_filter(rng.normal(size=shape), 8) * 8
        density = (
            0.5 + 0.12 * regions / regions.std() + 0.15 * cells / cells.std() + own - 0.5 * vessels / vessels.max()
        )
        rgb = 235 * np.exp(-np.clip(density, 0.05, None)[..., None] * inside[..., None] * [0.8, 1.0, 0.5])
        image = np.clip(rgb + rng.normal(0, 2, rgb.shape), 0, 255).astype(np.uint8)
        sections.append(SectionImage(image, (SIZE, SIZE)))
    return sections[0], sections[1]


def drawn_cases(n: int) -> Iterator[Case]:
    for number in range(n):
        fixed, other = drawn(number)
        yield known(f"drawn {number}", fixed, other, number)


def known(name: str, fixed: SectionImage, other: SectionImage, number: int) -> Case:
    """`other`, in place on `fixed`, moved in a known way."""
    rng = np.random.default_rng([number, 99])
    angle, mirrored, bend = rng.uniform(0, 360), bool(rng.random() < 0.5), BENDS[number % len(BENDS)]
    moving, points, origin = moved_section(other, rng, angle=angle, mirrored=mirrored, bend_um=bend)
    return f"{name}, bend {bend:.0f} um", fixed, moving, points, origin


def sections() -> dict[str, SectionImage]:
    """One section of each of five tissues."""
    from PIL import Image

    where = {
        "HER2ST C4": (next((ROOT / "her2st/ST-imgs/C/C4").glob("*.jpg")), 0.688),
        "bulb": (ROOT / "mob_st4/MOB2.jpg", 4.22),
        "cortex": (ROOT / "dlpfc/151507/spatial/tissue_lowres_image.png", 16.2),
        "kidney": (ROOT / "landmarks/ratkidney_5pc/HE.jpg", 5.06),
        "lung": (ROOT / "landmarks/les1_10pc/He.jpg", 1.74),
    }
    found = {}
    for name, (path, mpp) in where.items():
        with Image.open(path) as file:
            width = file.width
        rgb = read_image(path, 1024)
        size = mpp * width / rgb.shape[1]
        found[name] = SectionImage(rgb, (size, size))
    return found


def motion_cases(n: int) -> Iterator[Case]:
    found = sections()
    for number, (name, section) in enumerate(found.items()):
        for k in range(n // len(found)):
            yield known(name, section, section, number + len(found) * k)


def landmark_cases(_: int) -> Iterator[Case]:
    folder, sizes = ROOT / "landmarks", {**LANDMARK_MPP, "les3_5pc": 3.48}
    pairs = pd.read_csv(folder / "pairs.csv")[["set", "fixed", "moving"]].values.tolist()
    pairs = [["les3_5pc", "He", "proSPC-4"], *pairs]
    for group, *names in pairs:
        for fixed, moving in (names, names[::-1]):
            mpp = sizes[group]
            images = [SectionImage(read_image(folder / group / f"{name}.jpg"), (mpp, mpp)) for name in (fixed, moving)]
            tables = [pd.read_csv(folder / group / f"{name}.csv", index_col=0) for name in (fixed, moving)]
            shared = tables[0].index.intersection(tables[1].index)
            a, b = (table.loc[shared, ["x", "y"]].to_numpy(float) * mpp for table in tables)
            yield f"{group}: {moving} on {fixed}", *images, b, a


CASES = {"drawn": drawn_cases, "landmarks": landmark_cases, "motions": motion_cases}


def run(part: str, n: int, method: str) -> list[dict]:
    rows = []
    for name, fixed, moving, points, truth in CASES[part](n):
        start = time.process_time()
        pair, transform, quality = placed_pair(fixed, moving, method=method)
        seconds = time.process_time() - start
        error = np.linalg.norm(transform.points(points) - truth, axis=1)
        used = "syn" if transform.deforms else pair.method
        row = {"part": part, "pair": name, "used": used, "verdict": pair.verdict}
        row |= {"true": float(np.median(error)), "stated": quality["error_um"]}
        row |= {"true p90": float(np.percentile(error, 90)), "stated p90": quality["error_p90_um"]}
        rows.append(row | {"patches": quality["error_patches"], "cpu s": seconds})
        print({key: round(v, 1) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    return rows


def summary(rows: list[dict]) -> None:
    frame = pd.DataFrame(rows)
    for part, own in [*frame.groupby("part"), ("all", frame)]:
        own = own.assign(stated=own["stated"].astype(float))
        known = own.dropna(subset="stated")
        sound = known[known["verdict"] == "ok"]
        ratio = sound["true"] / sound["stated"]
        print(
            f"{part}: {len(own)} pairs, {len(known)} with an error, {len(sound)} ok; of these {(ratio <= 1).mean():.2f} "
            f"lie below the stated error, ratio true / stated {ratio.median():.2f}, 90th percentile "
            f"{ratio.quantile(0.9):.2f}; Spearman {spearmanr(known['true'], known['stated'])[0]:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(CASES))
    parser.add_argument("--n", type=int, default=20, help="pairs of a part")
    parser.add_argument("--method", default="affine")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict] = []
    for part in arguments.parts:
        rows += run(part, arguments.n, arguments.method)
    summary(rows)


if __name__ == "__main__":
    main()
