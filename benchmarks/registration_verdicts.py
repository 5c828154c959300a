"""Count false verdicts of the registration: ``python benchmarks/registration_verdicts.py [kinds]``.

Every pair has a place that is known, or no place at all. A verdict is a false "ok" if the place found is wrong or none
exists, and a false "failed" if the place found is right. Data are read from ``SPATIAL_IMPUTE_DATA_DIR``.
"""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from registration import moved_section
from registration_error import landmark_cases, motion_cases, sections

from spatial_impute._geometry import apply_affine
from spatial_impute._registration import RegistrationParams, SectionImage, register_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

RIGHT = 100.0  # um, the median error of a right place: the size of a spot of an ST array


class Case(NamedTuple):
    name: str
    fixed: SectionImage
    moving: SectionImage
    points: np.ndarray
    truth: np.ndarray | None
    """Places of the points on the fixed section; None if the moving section has no place there."""
    params: dict[str, Any] = {}  # noqa: RUF012


def known(
    section: SectionImage, number: int, *, mirrored: bool | None = None
) -> tuple[SectionImage, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([number, 7])
    angle, face = rng.uniform(0, 360), bool(rng.random() < 0.5)
    return moved_section(section, rng, angle=angle, mirrored=face if mirrored is None else mirrored, bend_um=60.0)


def of_each_tissue(n: int) -> Iterator[tuple[str, SectionImage, int]]:
    for number, (name, section) in enumerate(sections().items()):
        for k in range(n):
            yield name, section, 100 * number + k


def known_motion(n: int) -> Iterator[Case]:
    for name, fixed, moving, points, truth in motion_cases(5 * n):
        yield Case(name, fixed, moving, points, truth)


def other_stain(n: int) -> Iterator[Case]:
    """Landmarks on two stains, and dark turned into pale inside the tissue of a moved section."""
    for name, fixed, moving, points, truth in landmark_cases(0):
        if "artificial" not in name:
            yield Case(name, fixed, moving, points, truth)
    for name, section, number in of_each_tissue(n):
        moving, points, truth = known(section, number)
        glass = np.median(moving.rgb[~moving.tissue], axis=0)
        share = np.clip(moving.rgb / glass, 0.02, 1.0)
        low, high = np.percentile(share[moving.tissue], [1, 99], axis=0)
        turned = np.where(moving.tissue[..., None], np.clip(low + high - share, low, 0.95), share)
        rgb = np.clip(turned * glass, 0, 255).astype(np.uint8)
        yield Case(f"{name}, inverted", section, SectionImage(rgb, moving.pixel_size, moving.tissue), points, truth)


def wrong_tissue(_: int) -> Iterator[Case]:
    """A section of another block, scaled to the same area of tissue."""
    found = sections()
    for number, (name, section) in enumerate(found.items()):
        for k, (other, image) in enumerate(found.items()):
            if other != name:
                scale = np.sqrt(section.tissue_area / image.tissue_area)
                image = SectionImage(image.rgb, tuple(scale * s for s in image.pixel_size), image.tissue)
                moving, points, _ = known(image, 10 * number + k)
                yield Case(f"{other} on {name}", section, moving, points, None)


def wrong_face(n: int) -> Iterator[Case]:
    for name, section, number in of_each_tissue(n):
        moving, points, _ = known(section, number, mirrored=True)
        yield Case(name, section, moving, points, None, {"allow_mirror": False})


def missing_half(n: int) -> Iterator[Case]:
    for name, section, number in of_each_tissue(n):
        moving, points, truth = known(section, number)
        centre = points.mean(0)
        gone = (np.arange(moving.rgb.shape[1]) + 0.5) * moving.pixel_size[0] > centre[0]
        rgb = moving.rgb.copy()
        rgb[:, gone] = np.median(moving.rgb[~moving.tissue], axis=0)
        left = points[:, 0] <= centre[0]
        for partial in (False, True):
            params = {"partial_tissue": partial}
            yield Case(
                f"{name}, {params}", section, SectionImage(rgb, moving.pixel_size), points[left], truth[left], params
            )


def wrong_pixel_size(n: int) -> Iterator[Case]:
    for name, section, number in of_each_tissue(n):
        moving, points, _ = known(section, number)
        factor = (0.5, 2.0)[(number // 100 + number) % 2]
        yield Case(
            f"{name}, {factor}",
            section,
            SectionImage(moving.rgb, tuple(factor * s for s in moving.pixel_size)),
            points,
            None,
        )


KINDS = {
    "known motion": known_motion,
    "other stain": other_stain,
    "missing half": missing_half,
    "wrong tissue": wrong_tissue,
    "wrong face": wrong_face,
    "wrong pixel size": wrong_pixel_size,
}


def run(kind: str, n: int) -> list[dict]:
    rows = []
    for case in KINDS[kind](n):
        row: dict[str, Any] = {"kind": kind, "pair": case.name, "exists": case.truth is not None}
        try:
            result = register_pair(case.fixed, case.moving, params=RegistrationParams(**case.params))
        except ValueError as error:
            rows.append(row | {"verdict": "refused", "right": False, "why": str(error)[:60]})
        else:
            error = None
            if case.truth is not None:
                error = float(np.median(np.linalg.norm(apply_affine(case.points, result.matrix) - case.truth, axis=1)))
            row |= {"verdict": result.verdict, "right": error is not None and error < RIGHT, "error": error}
            row |= {key: result.quality[key] for key in ("error_um", "score", "margin", "dice_after", "looks_agree")}
            rows.append(row)
        print({key: round(v, 2) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    return rows


def summary(rows: list[dict]) -> None:
    frame = pd.DataFrame(rows)
    verdict, right = frame["verdict"], frame["right"]
    frame = frame.assign(
        found=right,
        ok=verdict == "ok",
        weak=verdict == "weak",
        failed=verdict == "failed",
        refused=verdict == "refused",
        false_ok=(verdict == "ok") & ~right,
        false_failed=verdict.isin(["failed", "refused"]) & (right | ((verdict == "refused") & frame["exists"])),
    )
    columns = ["found", "ok", "weak", "failed", "refused", "false_ok", "false_failed"]
    table = frame.groupby("kind", sort=False)[columns].sum()
    table.insert(0, "pairs", frame.groupby("kind", sort=False).size())
    print(f"\n{table.to_string()}\nall: {table.sum().to_dict()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--per-tissue", type=int, default=2, help="pairs of each of the five tissues")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict] = []
    for kind in arguments.kinds:
        rows += run(kind, arguments.per_tissue)
    summary(rows)


if __name__ == "__main__":
    main()
