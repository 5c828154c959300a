"""Register a stack of 100 sections of 20,000 px: ``python benchmarks/registration_stack.py [--sections 100] [--workers 2]``.

The tissue is drawn. Regions and outline change along the stack, until the first and the last section have no region in common;
cells are new in each section. Each section is turned, shifted and bent by a known amount. The image of a section is a
pyramid: levels up to 2,500 px are pixels in memory, those above are computed from them when read, so nothing is written to disk.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dask.array as da
import numpy as np
from scipy import ndimage as ndi

import spatial_impute as si
from spatial_impute._registration.orientation import pose

if TYPE_CHECKING:
    import xarray as xr

SIDE, MPP, LEVELS = 20_000, 0.5, 5  # px and um of the finest level; halved from level to level
SMALL = SIDE // 2 ** (LEVELS - 1)
UM = MPP * 2 ** (LEVELS - 1)  # per pixel of the coarsest level
REAL = 2  # coarsest levels that are held in memory
BEND = 60.0  # um, the largest
LIGHT = np.array([0.8, 1.0, 0.5])


@dataclass(frozen=True)
class Block:
    """Tissue that turns from its first face to its last one."""

    regions: np.ndarray
    """(2, y, x): regions of the first and of the last face."""
    wobble: np.ndarray
    """(2, waves, 2): amplitude and phase of the outline."""

    @classmethod
    def drawn(cls, seed: int) -> Block:
        rng = np.random.default_rng(seed)
        regions = []
        for _ in range(2):
            field = sum(ndi.gaussian_filter(rng.normal(size=(SMALL, SMALL)), s) * s for s in (12, 30, 80))
            regions.append(field / field.std())
        wobble = np.stack([rng.normal(0, 0.05, (2, 7)), rng.uniform(0, 2 * np.pi, (2, 7))], axis=-1)
        return cls(np.array(regions, np.float32), wobble)

    def face(self, where: float) -> tuple[np.ndarray, np.ndarray]:
        """Density of the regions and inside of the tissue at a height from 0 to 1; neighbors are more alike."""
        first, last = np.cos(0.5 * np.pi * where), np.sin(0.5 * np.pi * where)
        y, x = (np.indices((SMALL, SMALL)) + 0.5 - SMALL / 2) / (0.36 * SMALL)
        angle, radius = np.arctan2(y, x), np.hypot(1.15 * y, x)
        outline = 0.9
        for share, waves in zip((1 - where, where), self.wobble, strict=True):
            outline = outline + share * sum(a * np.sin(k * angle + p) for k, (a, p) in enumerate(waves, start=2))
        inside = ndi.gaussian_filter((radius < outline).astype(np.float32), 1)
        return first * self.regions[0] + last * self.regions[1], inside


def section(block: Block, where: float, seed: list[int], *, still: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB (c, y, x) of the coarsest level, points in its tissue, and where they lie in the block (um)."""
    rng = np.random.default_rng(seed)
    regions, inside = block.face(where)
    cells = ndi.gaussian_filter(rng.normal(size=(SMALL, SMALL)).astype(np.float32), 1.2)
    own = ndi.gaussian_filter(rng.normal(size=(SMALL, SMALL)).astype(np.float32), 10)
    density = 0.5 + 0.13 * regions + 0.15 * cells / cells.std() + 0.05 * own / own.std()
    density = np.clip(density, 0.05, None) * inside
    centre, rows = np.full(2, SMALL * UM / 2), np.indices((SMALL, SMALL)) + 0.5
    source = np.stack(rows[::-1], axis=-1) * UM
    if not still:
        forward = pose(rng.uniform(-20, 20), centre, centre + rng.uniform(-400, 400, 2), mirrored=False)
        step = 8
        coarse = [ndi.gaussian_filter(rng.normal(size=(SMALL // step + 3,) * 2), 800 / UM / step) for _ in range(2)]
        bend = np.stack([ndi.affine_transform(c, np.eye(2) / step, output_shape=(SMALL, SMALL)) for c in coarse], -1)
        bend *= BEND / np.hypot(*np.moveaxis(bend, -1, 0)).max()
        back = np.linalg.inv(forward)
        source = source @ back[:2, :2].T + back[:2, 2] + bend
    at = [source[..., 1] / UM - 0.5, source[..., 0] / UM - 0.5]
    density, inside = (ndi.map_coordinates(array, at, order=1) for array in (density, inside))
    rgb = 238 * np.exp(-density * LIGHT[:, None, None]) + rng.normal(0, 2, (3, SMALL, SMALL))
    y, x = (found[:: len(found) // 400] for found in np.nonzero(inside > 0.9))
    return np.clip(rgb, 0, 255).astype(np.uint8), np.column_stack([x + 0.5, y + 0.5]) * UM, source[y, x]


def enlarged(array: da.Array, factor: int) -> da.Array:
    """Each pixel as a square of `factor` pixels, computed when read."""
    chunks = tuple(tuple(n * (factor if axis else 1) for n in own) for axis, own in enumerate(array.chunks))
    return array.map_blocks(lambda b: b.repeat(factor, 1).repeat(factor, 2), dtype=array.dtype, chunks=chunks)


def pyramid(rgb: np.ndarray, name: str) -> xr.DataTree:
    """Image element of 20,000 px whose coarsest level is `rgb`."""
    from spatial_impute._stack.elements import image_element

    small = da.from_array(rgb, chunks=(3, 250, 250))
    levels = [enlarged(small, 2**k) for k in range(LEVELS - 1, 0, -1)] + [small]
    levels[-REAL] = da.from_array(levels[-REAL].compute(), chunks=(3, 1250, 1250))
    return image_element(levels, name, MPP)


def measured(sdata: object, points: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Error vectors (n, 2) of every section, um."""
    from spatial_impute._stack.elements import load_transform
    from spatial_impute._stack.record import load_record

    record = load_record(sdata)
    return {name: load_transform(sdata, record, name).points(points[name]) - truth[name] for name in points}


def plane(points: np.ndarray, errors: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Affine part of the errors at other places."""
    one = [np.column_stack([xy, np.ones(len(xy))]) for xy in (points, where)]
    return one[1] @ np.linalg.lstsq(one[0], errors)[0]


def report(errors: dict[str, np.ndarray], truth: dict[str, np.ndarray], sections: dict) -> None:
    names = list(errors)
    middle = len(names) // 2
    median = np.array([np.median(np.linalg.norm(errors[name], axis=1)) for name in names])
    stated = np.array([sections[name]["error_um"] or np.nan for name in names], float)
    steps = np.abs(np.arange(len(names)) - middle)
    for low, high in ((1, 1), (2, 5), (6, 15), (16, 30), (31, 50)):
        rows = (steps >= low) & (steps <= high)
        if rows.any():
            print(
                f"{low} to {high} sections from the reference: median error {np.median(median[rows]):.1f} um, largest "
                f"{median[rows].max():.1f}, stated {np.nanmedian(stated[rows]):.1f}"
            )
    first, last = names[0], names[-1]
    apart = plane(truth[first], errors[first], truth[last]) - plane(truth[last], errors[last], truth[last])
    print(f"drift from end to end: {np.median(np.linalg.norm(apart, axis=1)):.1f} um (median over the tissue)")
    verdicts = [sections[name]["verdict"] for name in names]
    routes = [sections[name]["route"] for name in names]
    print({v: verdicts.count(v) for v in set(verdicts)}, {r: routes.count(r) for r in set(routes)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", type=int, default=100)
    parser.add_argument("--workers", type=int, default=0, help="dask workers that share the pairs; 0: none")
    parser.add_argument("--policy", default="sequential")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    n, block = arguments.sections, Block.drawn(0)
    start, images, points, truth = time.process_time(), {}, {}, {}
    for k in range(n):
        name = f"s{k:03d}"
        still = k == n // 2
        # Less changes between the sections of a short stack than between the faces of the block.
        rgb, points[name], truth[name] = section(
            block, k / 99, [0, k + 1], still=still
        )  # [0, 0] would draw the block again
        images[name] = pyramid(rgb, name)
    sdata = si.pp.assemble_stack(images, mpp=MPP, section_spacing=10.0)
    shape = next(iter(images.values()))["scale0"]["image"].shape
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{n} sections of {shape}, drawn in {time.process_time() - start:.0f} s; {before:.0f} MiB", flush=True)
    with contextlib.ExitStack() as stack:
        if arguments.workers:
            from distributed import Client, LocalCluster

            cluster = stack.enter_context(LocalCluster(n_workers=arguments.workers, threads_per_worker=1))
            stack.enter_context(Client(cluster))
        wall, start = time.perf_counter(), time.process_time()
        si.tl.register_stack(
            sdata, reference=f"s{n // 2:03d}", policy=arguments.policy, on_failure="warn", show_progress_bar=False
        )
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"processor time {seconds:.0f} s ({seconds / n:.1f} s a section), of workers {children.ru_utime + children.ru_stime:.0f} s; "
        f"wall {wall:.0f} s; peak memory {peak:.0f} MiB, {peak - before:.0f} MiB more than the images"
    )
    record = sdata.attrs["spatial_impute"]["stack"]["registration"]
    report(measured(sdata, points, truth), truth, record["sections"])


if __name__ == "__main__":
    main()
