"""Place sections from turned and mirrored starts, beside PASTE and VALIS.

Run ``python benchmarks/registration_peers.py [--methods ours paste valis] [--sections C3 C6 MOB1 MOB4]`` with the data in
``SPATIAL_IMPUTE_DATA_DIR``. ``--paste`` and ``--valis`` are the interpreters of the environments in which these are installed. We and
VALIS see the images, PASTE the counts and places of the spots. A section is turned by 0, 45, 90 and 180 degrees, as it is and mirrored.
The consensus place of a spot is the median over the methods from the start that is not turned, and antspyx from the known rotation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from registration import ROOT, her2st_images, read_image
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine
from spatial_impute._registration import SectionImage, register_pair
from spatial_impute._registration.ants_fits import fit_linear
from spatial_impute._registration.orientation import pose
from spatial_impute._registration.types import RegistrationParams, registration_channel, working_pixel

ANGLES = (0, 45, 90, 180)
KNOWN = {"C2": 0, "C3": 0, "C5": 0, "C6": 0, "MOB1": -10, "MOB3": 5, "MOB4": 175}  # degrees, about; none mirrored
NEAR = 100.0  # um
PIXELS = 704  # along the longer side of an image, as `register_stack` reads it
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

PASTE = """
import sys, time, json
import anndata, numpy as np, ot, paste
cg = ot.optim.cg
# PASTE 1.4 was written for an older POT, whose line search had one argument less.
ot.optim.cg = lambda p, q, M, reg, f, df, G0, search, **kw: cg(
    p, q, M, reg, f, df, G0, lambda c, G, d, m, g, _=None, **k: search(c, G, d, m, g, **k), **kw)
data = np.load(sys.argv[1])
fixed, moving = (anndata.AnnData(data[k + "_counts"], obsm={"spatial": data[k + "_xy"]}) for k in ("fixed", "moving"))
start = time.process_time()
plan = paste.pairwise_align(fixed, moving)
a, b = paste.stack_slices_pairwise([fixed, moving], [plan])
seconds = time.process_time() - start
# Both are moved to a common frame; back to that of the fixed one.
shift = data["fixed_xy"].mean(0) - a.obsm["spatial"].mean(0)
np.savez(sys.argv[2], xy=b.obsm["spatial"] + shift, seconds=seconds)
"""

VALIS = """
import sys, time, numpy as np
from valis import registration, slide_io
data, folder = np.load(sys.argv[1]), sys.argv[3]
start = time.process_time()
registrar = registration.Valis(folder, folder + "_out", reference_img_f="fixed.png", align_to_reference=True,
    imgs_ordered=True, check_for_reflections=True)
registrar.register(reader_cls=slide_io.VipsSlideReader)
seconds = time.process_time() - start
fixed, moving = (registrar.get_slide(name) for name in ("fixed", "moving"))
for non_rigid in (False, True):
    xy = moving.warp_xy_from_to(data["moving_xy"] / data["moving_size"], fixed, non_rigid=non_rigid) * data["fixed_size"]
    np.savez(sys.argv[2] if non_rigid else sys.argv[2] + "_rigid", xy=xy, seconds=seconds)
"""


@dataclass(frozen=True)
class Spots:
    """A section with its spots."""

    image: SectionImage
    xy: np.ndarray
    """(n, 2) um"""
    counts: np.ndarray


def her2st() -> dict[str, Spots]:
    import spatial_impute as si

    si.settings.data_dir, si.settings.verbosity = ROOT, "error"
    names = ("C2", "C3", "C4", "C5", "C6")
    sdata = si.datasets.her2st("C", measured=list(names))
    images, table = her2st_images(), sdata.tables["stack"]
    spots = {}
    for name in names:
        counts = sdata.tables[f"{name}_counts"]
        rows = table[(table.obs["section"] == name).to_numpy() & table.obs["measured"].to_numpy()]
        order = pd.Index(counts.obs["instance_id"].astype(str)).get_indexer(rows.obs["instance_id"].astype(str))
        values = counts.X[order]
        spots[name] = Spots(
            images[name], rows.obsm["spatial"], np.asarray(values.todense() if hasattr(values, "todense") else values)
        )
    return spots


def bulb() -> dict[str, Spots]:
    spots, mpp = {}, 4.22
    for name in ("MOB1", "MOB2", "MOB3", "MOB4"):
        places = pd.read_csv(ROOT / f"mob_st4/alignment_table_{name}.tsv", sep="\t").query("selected == 1")
        places.index = places["x"].astype(str) + "x" + places["y"].astype(str)
        counts = pd.read_csv(ROOT / f"mob_st4/{name}.tsv.gz", sep="\t", index_col=0)
        places = places[places.index.isin(counts.index)]
        rgb = read_image(ROOT / f"mob_st4/{name}.jpg")
        size = mpp * 2
        rgb = rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2]
        rgb = rgb.reshape(rgb.shape[0] // 2, 2, -1, 2, 3).mean((1, 3)).astype(np.uint8)
        xy = places[["pixel_x", "pixel_y"]].to_numpy(float) * mpp
        spots[name] = Spots(SectionImage(rgb, (size, size)), xy, counts.loc[places.index].to_numpy(float))
    return spots


def turned(section: Spots, angle: float, *, mirrored: bool, draw: bool) -> Spots:
    """Spots of a section, and with `draw` its image, turned about the middle of its image."""
    rgb, old = section.image.rgb, section.image.pixel_size
    extent = np.array(rgb.shape[1::-1]) * old
    size = max(old[0], extent.max() / PIXELS)
    side = int(1.45 * extent.max() / size)
    matrix = pose(angle, extent / 2, np.full(2, side * size / 2), mirrored=mirrored)
    xy = section.xy @ matrix[:2, :2].T + matrix[:2, 2]
    if not draw:
        return Spots(section.image, xy, section.counts)
    back = np.linalg.inv(matrix)
    y, x = (np.indices((side, side)) + 0.5) * size
    source = np.stack([x, y], -1) @ back[:2, :2].T + back[:2, 2]
    where = [source[..., 1] / old[1] - 0.5, source[..., 0] / old[0] - 0.5]
    glass = np.median(rgb[~section.image.tissue], axis=0)
    channels = [ndi.map_coordinates(rgb[..., k].astype(np.float32), where, order=1, cval=glass[k]) for k in range(3)]
    image = SectionImage(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8), (size, size))
    return Spots(image, xy, section.counts)


def ours(fixed: Spots, moving: Spots) -> dict[str, tuple[np.ndarray, float, str]]:
    start = time.process_time()
    result = register_pair(fixed.image, moving.image)
    return {"ours": (apply_affine(moving.xy, result.matrix), time.process_time() - start, result.verdict)}


def child(python: str, code: str, fixed: Spots, moving: Spots, method: str) -> dict[str, tuple[np.ndarray, float, str]]:
    """Places by a method that runs in its own environment; none if it stops with an error."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        arrays = {}
        for name, spots in (("fixed", fixed), ("moving", moving)):
            Image.fromarray(spots.image.rgb.astype(np.uint8)).save(images / f"{name}.png")
            arrays |= {f"{name}_xy": spots.xy, f"{name}_counts": spots.counts, f"{name}_size": spots.image.pixel_size}
        np.savez(f"{folder}/in.npz", **arrays)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ONE_THREAD
        run = subprocess.run(
            [python, "-W", "ignore", "-c", code, f"{folder}/in.npz", f"{folder}/out.npz", str(images)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if run.returncode:
            lost = np.full_like(moving.xy, np.inf)
            print(method, "stopped:", run.stderr.strip().splitlines()[-3:], flush=True)
            return {method: (lost, np.nan, "error")}
        found = {method: np.load(f"{folder}/out.npz")}
        if (rigid := Path(folder) / "out.npz_rigid.npz").exists():
            found[f"{method}, rigid part"] = np.load(rigid)
        return {name: (file["xy"], float(file["seconds"]), "") for name, file in found.items()}


def from_known(fixed: Spots, moving: Spots, angle: float) -> np.ndarray:
    """Places by one affine fit of antspyx from the known rotation."""
    params = RegistrationParams()
    size = working_pixel(fixed.image, moving.image, params)
    channels = [registration_channel(s.image, size, params.mask_margin + 4 * size) for s in (fixed, moving)]
    start = pose(angle, channels[1].centres().mean(0), channels[0].centres().mean(0), mirrored=False)
    options = {"iterations": params.linear_iterations, "mask_margin": params.mask_margin, "seed": 0}
    matrix = fit_linear(*channels, fit_linear(*channels, start, "Rigid", **options), "Affine", **options)
    return moving.xy @ matrix[:2, :2].T + matrix[:2, 2]


def is_mirror(before: np.ndarray, after: np.ndarray) -> bool:
    """True if the map between two sets of points turns the face."""
    if not np.isfinite(after).all():
        return True
    one = np.column_stack([before, np.ones(len(before))])
    return bool(np.linalg.det(np.linalg.lstsq(one, after)[0][:2]) < 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["ours", "paste", "valis"])
    parser.add_argument("--sections", nargs="+", default=list(KNOWN))
    parser.add_argument("--paste", default=sys.executable, help="interpreter with PASTE")
    parser.add_argument("--valis", default=sys.executable, help="interpreter with VALIS")
    parser.add_argument(
        "--save", default="peers.json", help="places of the spots, so that methods can be run one by one"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    run = {
        "ours": ours,
        "paste": lambda a, b: child(arguments.paste, PASTE, a, b, "PASTE"),
        "valis": lambda a, b: child(arguments.valis, VALIS, a, b, "VALIS"),
    }
    stacks = {**(her2st() if any(n[0] == "C" for n in arguments.sections) else {})}
    stacks |= bulb() if any(n[0] == "M" for n in arguments.sections) else {}
    path = Path(arguments.save)
    saved = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.sections:
        fixed = stacks["C4" if name[0] == "C" else "MOB2"]
        if f"{name}/known" not in saved:
            saved[f"{name}/known"] = [from_known(fixed, stacks[name], KNOWN[name]).tolist(), 0.0, ""]
        for mirrored in (False, True):
            for angle in ANGLES:
                moving = turned(stacks[name], angle, mirrored=mirrored, draw=arguments.methods != ["paste"])
                for method in arguments.methods:
                    for label, (xy, seconds, verdict) in run[method](fixed, moving).items():
                        key = f"{name}/{label}/{angle}/{int(mirrored)}"
                        saved[key] = [xy.tolist(), seconds, verdict]
                        print(key, f"{seconds:.1f} s", verdict, flush=True)
                path.write_text(json.dumps(saved))
    table(saved, stacks, arguments.sections)


def table(saved: dict[str, list], stacks: dict[str, Spots], names: list[str]) -> None:
    methods = list(dict.fromkeys(key.split("/")[1] for key in saved if key.count("/") == 3))
    voters = [m for m in methods if "rigid part" not in m]
    rows = []
    for name in names:
        unturned = [saved[f"{name}/{m}/0/0"][0] for m in voters if f"{name}/{m}/0/0" in saved]
        votes = np.array([saved[f"{name}/known"][0], *unturned], float)
        consensus = np.median(votes, axis=0)
        apart = [round(float(np.median(np.linalg.norm(vote - consensus, axis=1)))) for vote in votes]
        print(f"{name}: antspyx from the known rotation and {voters} lie {apart} um from their median")
        for method in methods:
            for angle in ANGLES:
                for mirrored in (False, True):
                    key = f"{name}/{method}/{angle}/{int(mirrored)}"
                    if key not in saved:
                        continue
                    xy, seconds, verdict = saved[key]
                    xy = np.array(xy, float)
                    error = float(np.median(np.linalg.norm(xy - consensus, axis=1)))
                    face = is_mirror(stacks[name].xy, xy)
                    row = {"stack": "HER2ST" if name[0] == "C" else "bulb", "method": method, "section": name}
                    rows.append(row | {"error": error, "mirror": face, "s": seconds, "verdict": verdict})
    frame = pd.DataFrame(rows)
    groups = frame.groupby(["stack", "method"], sort=False)
    found = groups.agg(
        starts=("error", "size"),
        near=("error", lambda e: float((e <= NEAR).mean())),
        median_um=("error", "median"),
        worst_um=("error", "max"),
        mirror_errors=("mirror", "sum"),
        seconds=("s", "median"),
    )
    print(
        f"\n## Starts turned by {ANGLES} degrees, on either face; near: within {NEAR:.0f} um\n{found.round(2).to_string()}"
    )
    print(frame.groupby(["section", "method"])["error"].agg(["median", "max"]).round(0).to_string())


if __name__ == "__main__":
    main()
