"""Features and tissue masks: how well they predict, how fast they are made, how much memory that takes.

Run ``python benchmarks/features.py ridge|throughput|memory|tissue [options]``; ``--help`` lists them. ``ridge`` and
``tissue`` need the files of HER2ST (``SPATIAL_IMPUTE_DATA_DIR``). Run on one thread: ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import spatial_impute as si

SECTIONS = ("C2", "C3", "C4", "C5", "C6")
PENALTIES = np.logspace(-1, 5, 19)  # of the ridge regression, for standardised features
LEVELS = ("X_spot", "X_region", "X_global")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ridge = commands.add_parser("ridge", help="ridge regression on frozen features, one section held out")
    ridge.add_argument("--encoders", nargs="+", default=["texture", "tellez-multitask"])
    ridge.add_argument("--test", nargs="+", default=["C4"], help="sections to hold out, one after the other")
    ridge.add_argument("--cache", default=None, help="folder that keeps the features")
    throughput = commands.add_parser("throughput", help="extraction beside the bare encoder on the same patches")
    throughput.add_argument("--encoders", nargs="+", default=["texture", "tellez-multitask"])
    throughput.add_argument("--spots", type=int, default=2000)
    throughput.add_argument("--device", default="cpu")
    throughput.add_argument("--repeats", type=int, default=3)
    memory = commands.add_parser("memory", help="peak memory by the size of the slide")
    memory.add_argument("--encoder", default="texture")
    memory.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000])
    one = commands.add_parser("memory-one", help="one slide (called by `memory`)")
    one.add_argument("encoder")
    one.add_argument("size", type=int)
    one.add_argument("store", type=Path)
    tissue = commands.add_parser(
        "tissue", help="tissue masks: area against masks drawn by hand, overlays, spots inside"
    )
    tissue.add_argument("--masks", type=Path, default=Path(__file__).parent / "tissue_outlines.json")
    tissue.add_argument("--overlays", type=Path, default=None, help="folder for pictures")
    options = vars(parser.parse_args())
    command = options.pop("command")
    si.settings.verbosity = "warning"
    {
        "ridge": run_ridge,
        "throughput": run_throughput,
        "memory": run_memory,
        "memory-one": run_memory_one,
        "tissue": run_tissue,
    }[command](**options)


def run_ridge(encoders: list[str], test: list[str], cache: str | None) -> None:
    """Per-gene r on each held-out section; genes and penalty are chosen on the others."""
    for held_out in test:
        train = [s for s in SECTIONS if s != held_out]
        sdata, truth = si.datasets.her2st("C", measured=train, truth=True)
        table = sdata.tables["stack"]
        shared = table.obs_names.intersection(truth.obs_names)
        expression = truth[shared, table.var_names].to_df().to_numpy(float)
        section = table[shared].obs["section"].astype(str).to_numpy()
        for encoder in encoders:
            si.pp.extract_features(sdata, encoder, cache_dir=cache)
            found = {level: table[shared].obsm[level] for level in LEVELS}
            found["all levels"] = np.concatenate(list(found.values()), axis=1)
            for level, features in found.items():
                r, penalty = held_out_r(features, expression, section, train, held_out)
                print(
                    f"test {held_out}  {encoder:18s} {level:10s} {features.shape[1]:5d} features  "
                    f"r per gene {np.nanmean(r):.4f} (median {np.nanmedian(r):.4f}), penalty {penalty:g}",
                    flush=True,
                )


def held_out_r(
    features: np.ndarray, expression: np.ndarray, section: np.ndarray, train: list[str], test: str
) -> tuple[np.ndarray, float]:
    """(genes,) Pearson r on the test section, with the penalty of least error on training sections left out in turn."""
    scaled = np.empty(features.shape)
    for name in np.unique(section):
        block = features[section == name].astype(float)
        spread = block.std(axis=0)
        scaled[section == name] = (block - block.mean(axis=0)) / np.where(spread > 1e-6, spread, np.inf)
    errors = np.zeros(len(PENALTIES))
    for left_out in train:
        rows, others = section == left_out, np.isin(section, [s for s in train if s != left_out])
        predicted = ridge_path(scaled[others], expression[others], scaled[rows])
        errors += [np.mean((p - expression[rows]) ** 2) for p in predicted]
    best = int(errors.argmin())
    rows = section == test
    predicted = ridge_path(scaled[np.isin(section, train)], expression[np.isin(section, train)], scaled[rows])[best]
    a, b = (v - v.mean(axis=0) for v in (predicted, expression[rows]))
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(norm > 0, (a * b).sum(axis=0) / np.where(norm > 0, norm, 1), np.nan), float(PENALTIES[best])


def ridge_path(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> list[np.ndarray]:
    """Predictions for `new` at every penalty."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    u, s, vt = np.linalg.svd(x - x_mean, full_matrices=False)
    target, projected = u.T @ (y - y_mean), (new - x_mean) @ vt.T
    return [projected @ ((s / (s**2 + penalty))[:, None] * target) + y_mean for penalty in PENALTIES]


class Recorded:
    """An encoder that keeps what it is given."""

    def __init__(self, encoder: object) -> None:
        self._encoder = encoder
        self.name, self.mpp, self.patch_px = encoder.name, encoder.mpp, encoder.patch_px
        self.step_px = getattr(encoder, "step_px", None)
        self.given: list[np.ndarray] = []

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        self.given.append(patches)
        return self._encoder(patches)

    def slide(self, windows: np.ndarray) -> np.ndarray:
        self.given.append(windows)
        return self._encoder.slide(windows)


def bare(encoder: object, given: list[np.ndarray]) -> tuple[float, float]:
    """Wall and processor seconds of an encoder for patches from memory."""
    encode = encoder if getattr(encoder, "step_px", None) is None else encoder.slide
    start = seconds()
    for patches in given:
        encode(patches)
    return since(start)


def seconds() -> tuple[float, float]:
    """Wall and processor time; the latter does not mind what else the machine does."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    wall, processor = seconds()
    return wall - start[0], processor - start[1]


def slide_with_spots(size: int, n_spots: int, pixels: object, mpp: float = 0.5) -> object:
    """Stack of one section with a square lattice of spots, 55 um wide and 100 um apart, in its middle."""
    import geopandas as gpd
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel

    edge = int(np.ceil(np.sqrt(n_spots)))
    place = (np.stack(np.meshgrid(np.arange(edge), np.arange(edge)), axis=-1).reshape(-1, 2) - (edge - 1) / 2) * 200.0
    place = place[:n_spots] + size / 2
    circles = gpd.GeoDataFrame({"radius": np.full(n_spots, 55.0)}, geometry=gpd.points_from_xy(*place.T))
    image = pixels if hasattr(pixels, "children") else Image2DModel.parse(pixels, dims=("c", "y", "x"))
    source = SpatialData(images={"image": image}, shapes={"spots": ShapesModel.parse(circles)})
    return si.pp.assemble_stack({"s": source}, mpp=mpp, z=[0.0])


def run_throughput(encoders: list[str], spots: int, device: str, repeats: int) -> None:
    """Wall time of the extraction over that of the bare encoder on the same patches, in the same run."""
    import dask.array as da

    from spatial_impute._io.workers import requested_threads
    from spatial_impute._stack.elements import image_element
    from spatial_impute.encoders._encoder import resolve_encoder

    size = -(-(2 * int(np.ceil(np.sqrt(spots))) * 100 + 2000) // 8) * 8
    fine = np.random.default_rng(0).integers(60, 255, (3, size, size), dtype=np.uint8)
    levels = [da.from_array(np.ascontiguousarray(fine[:, ::f, ::f]), (3, 2048, 2048)) for f in (1, 2, 4, 8)]
    pixels = image_element(levels, "global", 1.0)
    for name in encoders:
        encoder = resolve_encoder(name, device=device)
        # A first run keeps the patches, which takes time and memory of its own; the runs that are timed do not.
        recorded = Recorded(encoder)
        si.pp.extract_features(slide_with_spots(size, spots, pixels), recorded, show_progress_bar=False)
        ratios = []
        for _ in range(repeats):
            sdata = slide_with_spots(size, spots, pixels)
            start = seconds()
            si.pp.extract_features(sdata, encoder, show_progress_bar=False)
            whole = since(start)
            with requested_threads():
                alone = bare(encoder, recorded.given)
            ratios.append([w / b for w, b in zip(whole, alone, strict=True)])
            print(
                f"{name} on {device}: {spots} spots on a pyramid of {size} x {size} px; extraction {whole[0]:.1f} s "
                f"({whole[1]:.1f} s of the processor), bare encoder {alone[0]:.1f} s ({alone[1]:.1f} s), "
                f"ratio {ratios[-1][0]:.3f} ({ratios[-1][1]:.3f})",
                flush=True,
            )
        wall, processor = np.median(ratios, axis=0)
        print(f"{name}: median ratio {wall:.3f} of wall time, {processor:.3f} of processor time", flush=True)


def run_memory(encoder: str, sizes: list[int]) -> None:
    """Peak resident memory of fresh processes that extract features of slides on disk, one after the other."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            store = Path(folder) / f"{size}.zarr"
            write_slide(store, size)
            command = [sys.executable, __file__, "memory-one", encoder, str(size), str(store)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def write_slide(path: Path, size: int) -> None:
    """OME-Zarr pyramid of noise, written strip by strip."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=2)
    rng = np.random.default_rng(0)
    tile = rng.integers(60, 255, (3, 1000, 1000), dtype=np.uint8)
    datasets = []
    for level in range(3):
        n = size // 2**level
        array = group.create_array(str(level), shape=(3, n, n), chunks=(3, 1000, 1000), dtype="uint8")
        for y in range(0, n, 1000):
            for x in range(0, n, 1000):
                h, w = min(1000, n - y), min(1000, n - x)
                array[:, y : y + h, x : x + w] = tile[:, :h, :w]
        scale = [1, 0.5 * 2**level, 0.5 * 2**level]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    axes = [{"name": "c", "type": "channel"}] + [{"name": a, "type": "space", "unit": "micrometer"} for a in ("y", "x")]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": datasets, "version": "0.4"}]


def run_memory_one(encoder: str, size: int, store: Path) -> None:
    """Spots all over one slide; prints the peak of this process."""
    from spatial_impute._image.reading import open_image
    from spatial_impute._stack.elements import image_element

    # As many spots for every size: what grows must be due to the slide.
    n_spots, opened = 400, open_image(store)
    sdata = slide_with_spots(size, n_spots, image_element(opened.levels, "global", 1.0))
    circles = sdata.shapes["s_spots"]
    place = np.stack(np.meshgrid(*[np.linspace(0.05, 0.95, 20) * size] * 2), axis=-1).reshape(-1, 2)
    import geopandas as gpd

    circles.geometry = gpd.points_from_xy(*place.T)
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    si.pp.extract_features(sdata, encoder, show_progress_bar=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{encoder}: {size} x {size} px, {n_spots} spots: peak {peak:.0f} MiB ({peak - before:.0f} above the start), "
        f"{time.perf_counter() - start:.1f} s"
    )


def run_tissue(masks: Path, overlays: Path | None) -> None:
    """Area of the mask over that inside outlines drawn by hand; share of HER2ST spots outside of the mask."""
    import json

    import shapely
    from matplotlib import pyplot as plt

    from spatial_impute._image.levels import read_thumbnail
    from spatial_impute._stack.elements import section_levels
    from spatial_impute._stack.record import load_record

    outlines = json.loads(masks.read_text())
    print(outlines.pop("note"))
    sdata = si.datasets.her2st("C", measured=SECTIONS)
    for name, item in outlines.items():
        if "file" in item:
            path = si.settings.data_dir / item["file"]
            one = si.pp.assemble_stack({name: path}, mpp=item["mpp"], z=[0.0])
        else:
            one = sdata
        si.pp.segment_tissue(one, sections=[name])
        found = shapely.union_all(one.shapes[f"{name}_tissue_outline"].geometry.to_numpy())
        drawn = shapely.union_all([shapely.Polygon(p).buffer(0) for p in item["polygons"]])
        for hole in item.get("holes", []):
            drawn = drawn.difference(shapely.Polygon(hole).buffer(0))
        dice = 2 * found.intersection(drawn).area / (found.area + drawn.area)
        print(
            f"{name}: mask {found.area / 1e6:.3f} mm2, by hand {drawn.area / 1e6:.3f} mm2, "
            f"ratio {found.area / drawn.area:.3f}, Dice {dice:.3f}"
        )
        if overlays is not None:
            overlays.mkdir(parents=True, exist_ok=True)
            rgb, to_um = read_thumbnail(section_levels(one, load_record(one)[name]), max(4.0, item.get("mpp", 1) * 2))
            _, ax = plt.subplots(figsize=(9, 9))
            ax.imshow(rgb.astype(np.uint8), extent=(0, rgb.shape[1] * to_um[0, 0], rgb.shape[0] * to_um[1, 1], 0))
            for shape, colour in ((found, "lime"), (drawn, "red")):
                for part in shapely.get_parts(shape):
                    for ring in (part.exterior, *part.interiors):
                        ax.plot(*np.array(ring.coords).T, color=colour, lw=1)
            ax.set_title(f"{name}: segmented green, by hand red (um)")
            plt.savefig(overlays / f"{name}.png", dpi=110)
            plt.close()
    si.pp.segment_tissue(sdata)
    table = sdata.tables["stack"]
    for name in SECTIONS:
        rows = ((table.obs["section"] == name) & table.obs["measured"]).to_numpy()
        tissue = shapely.union_all(sdata.shapes[f"{name}_tissue_outline"].geometry.to_numpy())
        outside = ~shapely.contains_xy(tissue, *table.obsm["spatial"][rows].T)
        print(f"{name}: {outside.sum()} of {rows.sum()} measured spots outside of the mask ({outside.mean():.1%})")


if __name__ == "__main__":
    main()
