"""Sections of one synthetic block of tissue, with the truth that real tissue does not show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.ndimage import gaussian_filter
from scipy.special import expit

from spatial_impute._geometry import affine_between, apply_affine, grid_in_box
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import image_element, section_object
from spatial_impute._validation import require_key, require_positive
from spatial_impute.datasets._her2st import truth_table
from spatial_impute.pp import assemble_stack, select_genes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatialdata import SpatialData

    Motion = Callable[[np.ndarray], np.ndarray]

_LIBRARY_SIZE = 20_000.0  # mean counts of a spot, as in Visium
# Most counts of a spot go to genes that do not vary, so that normalisation does not carry structure into other genes.
_N_HOUSEKEEPING = 4
_HOUSEKEEPING_SHARE = 0.9
_HEMATOXYLIN = np.array([0.65, 0.70, 0.29])  # optical density per unit of stain in r, g, b (Ruifrok and Johnston)
_EOSIN = np.array([0.07, 0.99, 0.11])


@overload
def synthetic_stack(
    n_sections: int = ...,
    *,
    measured: Sequence[str] | None = ...,
    extent: float = ...,
    section_spacing: float = ...,
    mpp: float = ...,
    spot_diameter: float = ...,
    spot_pitch: float = ...,
    n_genes: int = ...,
    max_rotation: float = ...,
    max_shift: float = ...,
    elastic_amplitude: float = ...,
    seed: int = ...,
    truth: Literal[False] = ...,
) -> SpatialData: ...


@overload
def synthetic_stack(
    n_sections: int = ...,
    *,
    measured: Sequence[str] | None = ...,
    extent: float = ...,
    section_spacing: float = ...,
    mpp: float = ...,
    spot_diameter: float = ...,
    spot_pitch: float = ...,
    n_genes: int = ...,
    max_rotation: float = ...,
    max_shift: float = ...,
    elastic_amplitude: float = ...,
    seed: int = ...,
    truth: Literal[True],
) -> tuple[SpatialData, AnnData]: ...


def synthetic_stack(
    n_sections: int = 3,
    *,
    measured: Sequence[str] | None = None,
    extent: float = 2400.0,
    section_spacing: float = 20.0,
    mpp: float = 4.0,
    spot_diameter: float = 100.0,
    spot_pitch: float = 160.0,
    n_genes: int = 36,
    max_rotation: float = 25.0,
    max_shift: float = 150.0,
    elastic_amplitude: float = 8.0,
    seed: int = 0,
    truth: bool = False,
) -> SpatialData | tuple[SpatialData, AnnData]:
    """Serial sections of a synthetic tissue, each moved by a known affine and elastic motion.

    A third of the genes is smooth in 3D, so that neighboring sections predict them. A third follows the density of
    nuclei, which varies over short distances and is visible only on the H&E image of the same section. A third is pure
    noise. Four housekeeping genes take most of the counts; they are not in the stack table. The images show the same
    fields: eosin follows smooth structure, nuclei are dots.

    Parameters
    ----------
    n_sections
        Number of sections, named ``"s0"``, ``"s1"``, ...
    measured
        Sections whose expression is in the stack; by default the middle one. The first of them lies in the frame of the
        tissue, without motion.
    extent
        Edge length of the imaged square in um.
    section_spacing
        Distance of consecutive sections in um.
    mpp
        Pixel size of the images in um.
    spot_diameter
        Diameter of the spots in um.
    spot_pitch
        Centre-to-centre distance of the spots in um, on a hexagonal lattice.
    n_genes
        Number of genes in the stack table, a third of each kind.
    max_rotation
        Largest rotation of a section in degrees.
    max_shift
        Largest shift of a section in um.
    elastic_amplitude
        Root mean square of the elastic part of the motion in um.
    seed
        Seed; the same seed gives the same stack.
    truth
        Also return the true values of all spots.

    Returns
    -------
    The stack. With ``truth=True`` also an AnnData with one row per spot of all sections (``obs_names`` as in the stack
    table): ``X`` log1p of counts per 10,000, ``layers["counts"]`` counts, ``layers["expected"]`` like ``X`` without
    counting noise, ``var["kind"]`` (``"smooth"``, ``"texture"``, ``"noise"``, ``"housekeeping"``),
    ``obsm["spatial_3d"]`` (um) in the tissue.

    Raises
    ------
    ValueError
        For fewer than one section or three genes, or a length that is not positive.
    KeyError
        For measured sections that do not exist.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata, truth = si.datasets.synthetic_stack(truth=True)
    >>> truth.var["kind"].value_counts().to_dict()
    {'smooth': 12, 'texture': 12, 'noise': 12, 'housekeeping': 4}
    """
    if n_sections < 1 or n_genes < 3:
        msg = f"Need `n_sections` >= 1 and `n_genes` >= 3, found {n_sections} and {n_genes}."
        raise ValueError(msg)
    lengths = {"extent": extent, "mpp": mpp, "spot_diameter": spot_diameter, "spot_pitch": spot_pitch}
    extent, mpp, spot_diameter, spot_pitch = (require_positive(v, name=k, unit="um") for k, v in lengths.items())
    names = [f"s{i}" for i in range(n_sections)]
    measured = [names[n_sections // 2]] if measured is None else list(measured)
    for name in measured:
        require_key(name, names, where="sections")

    rng = np.random.default_rng(seed)
    tissue = _make_tissue(rng, extent, n_genes)
    still = measured[0] if measured else names[n_sections // 2]
    scan = _Scan(extent, mpp, spot_diameter, spot_pitch)
    inputs, tables = {}, {}
    for i, name in enumerate(names):
        rotation, shift, amplitude = (0.0, 0.0, 0.0) if name == still else (max_rotation, max_shift, elastic_amplitude)
        motion = _make_motion(rng, extent, rotation=rotation, shift=shift, amplitude=amplitude)
        tables[name], spots, image = _draw_section(rng, tissue, motion, scan, i * section_spacing)
        inputs[name] = section_object(
            name,
            image_element([image], "global", 1.0),
            centers=spots / mpp,
            radius=spot_diameter / 2 / mpp,
            ids=list(tables[name].obs_names),
            table=_as_measured(tables[name]) if name in measured else None,
        )
    sdata = assemble_stack(inputs, mpp=mpp, section_spacing=section_spacing)
    if measured:
        select_genes(sdata, genes=list(tissue.var.index[tissue.var["kind"] != "housekeeping"]))
    return (sdata, truth_table(tables, merge="same")) if truth else sdata


def _as_measured(table: AnnData) -> AnnData:
    """Counts only: the truth stays outside the stack."""
    counts = table.copy()
    del counts.layers["expected"], counts.obsm[Keys.SPATIAL_3D], counts.var["kind"]
    return counts


@dataclass(frozen=True)
class _Scan:
    """Image and lattice of spots of a section; lengths in um."""

    extent: float
    mpp: float
    spot_diameter: float
    spot_pitch: float


@dataclass
class _Tissue:
    """The block: fields over (n, 3) positions in um."""

    extent: float
    outline: Callable[[np.ndarray], np.ndarray]
    smooth: Callable[[np.ndarray], np.ndarray]
    """Structure over several spots and through the block, (n, k)."""
    glands: Callable[[np.ndarray], np.ndarray]
    """Landmarks that run through all sections: pale lumina where the field is high, (n, 1)."""
    density: Callable[[np.ndarray], np.ndarray]
    """Density of nuclei: varies within a few spots and from section to section, (n, 1)."""
    log_mean: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
    var: pd.DataFrame

    def inside(self, xy: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """(n,) bool: points (n, 2) in the tissue, at least `margin` um from its rim."""
        offset = xy - self.extent / 2
        angle = np.arctan2(offset[:, 1], offset[:, 0])
        return np.hypot(*offset.T) + margin <= self.outline(angle)


def _random_field(
    rng: np.random.Generator, n_fields: int, length_xy: float, length_z: float, n_waves: int = 60
) -> Callable[[np.ndarray], np.ndarray]:
    """Gaussian random fields of unit variance as sums of plane waves with the given correlation lengths (um)."""
    frequency = rng.normal(size=(n_fields, n_waves, 3)) / [length_xy, length_xy, length_z]
    phase = rng.uniform(0, 2 * np.pi, size=(n_fields, n_waves))

    def field(xyz: np.ndarray) -> np.ndarray:
        values = [np.cos(xyz @ f.T + p).sum(axis=1) for f, p in zip(frequency, phase, strict=True)]
        return np.sqrt(2 / n_waves) * np.column_stack(values)

    return field


def _make_tissue(rng: np.random.Generator, extent: float, n_genes: int) -> _Tissue:
    # An outline without symmetry, so that registration has a unique answer.
    harmonics = np.arange(1, 5)
    amplitude = 0.10 / harmonics * rng.uniform(0.5, 1.0, 4)
    phase = rng.uniform(0, 2 * np.pi, 4)

    def outline(angle: np.ndarray) -> np.ndarray:
        wobble = (amplitude * np.cos(angle[:, None] * harmonics + phase)).sum(axis=1)
        return extent * 0.38 * (1 + wobble)

    smooth = _random_field(rng, 3, length_xy=extent / 6, length_z=extent / 6)
    glands = _random_field(rng, 1, length_xy=extent / 40, length_z=extent / 6)
    density = _random_field(rng, 1, length_xy=extent / 30, length_z=10.0)
    kinds = np.array(["smooth", "texture", "noise"])[np.arange(n_genes) * 3 // n_genes]
    kinds = np.append(kinds, ["housekeeping"] * _N_HOUSEKEEPING)
    n_genes = len(kinds)
    weights = rng.normal(size=(n_genes, 3))
    weights *= 0.9 / np.linalg.norm(weights, axis=1, keepdims=True)
    slope = rng.uniform(0.6, 1.0, n_genes) * rng.choice([-1, 1], n_genes)
    level = rng.normal(0.0, 0.5, n_genes)
    constant = kinds == "housekeeping"
    others = np.exp(level[~constant]).sum()
    level[constant] = np.log(others * _HOUSEKEEPING_SHARE / (1 - _HOUSEKEEPING_SHARE) / _N_HOUSEKEEPING)

    def log_mean(structure: np.ndarray, nuclei: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        values = np.tile(level, (len(structure), 1))
        values += np.where(kinds == "smooth", structure @ weights.T, 0.0)
        values += np.where(kinds == "texture", nuclei * slope, 0.0)
        return values + np.where(kinds == "noise", 0.5 * rng.normal(size=values.shape), 0.0)

    var = pd.DataFrame({"kind": kinds}, index=[f"{kind}_{i}" for i, kind in enumerate(kinds)])
    return _Tissue(extent, outline, smooth, glands, density, log_mean, var)


def _make_motion(
    rng: np.random.Generator, extent: float, *, rotation: float, shift: float, amplitude: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Map from the section's frame to the tissue (um): rotation about the centre, stretch, shift, elastic part."""
    angle = np.deg2rad(rng.uniform(-rotation, rotation))
    stretch = 1 + (0.02 if rotation else 0.0) * rng.uniform(-1, 1, 2)
    offset = rng.uniform(-shift, shift, 2)
    elastic = _random_field(rng, 2, length_xy=extent / 5, length_z=1.0, n_waves=20)
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * stretch
    matrix = affine_between(linear, np.full(2, extent / 2), extent / 2 + offset)

    def motion(xy: np.ndarray) -> np.ndarray:
        moved = apply_affine(xy, matrix)
        if amplitude == 0:
            return moved
        return moved + amplitude * elastic(np.column_stack([xy, np.zeros(len(xy))]))

    return motion


def _draw_counts(
    rng: np.random.Generator, tissue: _Tissue, positions: np.ndarray, diameter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Poisson counts per spot and gene, and log1p of their expectation per 10,000."""
    # A spot sees the mean of the fields over its disc.
    ring = np.linspace(0, 2 * np.pi, 6, endpoint=False)
    offsets = np.vstack([[0.0, 0.0], 0.33 * diameter * np.column_stack([np.cos(ring), np.sin(ring)])])
    where = positions[:, None, :] + np.column_stack([offsets, np.zeros(len(offsets))])
    smooth, density = (
        f(where.reshape(-1, 3)).reshape(*where.shape[:2], -1).mean(axis=1) for f in (tissue.smooth, tissue.density)
    )
    rate = np.exp(tissue.log_mean(smooth, density, rng))
    rate /= rate.sum(axis=1, keepdims=True)
    library = _LIBRARY_SIZE * rng.lognormal(0, 0.3, size=(len(positions), 1))
    counts = rng.poisson(rate * library).astype(np.float32)
    return counts, np.log1p(1e4 * rate).astype(np.float32)


def _draw_section(
    rng: np.random.Generator, tissue: _Tissue, motion: Motion, scan: _Scan, height: float
) -> tuple[AnnData, np.ndarray, np.ndarray]:
    """Expression of the spots of a section, their positions (n, 2) on it in um, and its image."""
    spots = grid_in_box(0, 0, scan.extent, scan.extent, spacing=scan.spot_pitch, layout="hex")
    positions = motion(spots)
    on_tissue = tissue.inside(positions, 0.5 * scan.spot_diameter)
    spots, positions = spots[on_tissue], np.column_stack([positions[on_tissue], np.full(on_tissue.sum(), height)])
    counts, expected = _draw_counts(rng, tissue, positions, scan.spot_diameter)
    table = AnnData(
        X=sparse.csr_matrix(counts),
        obs=pd.DataFrame(index=[str(k) for k in range(len(spots))]),
        var=tissue.var.copy(),
        layers={"expected": expected},
        obsm={Keys.SPATIAL_3D: positions},
    )
    return table, spots, _draw_image(rng, tissue, motion, scan, height)


def _draw_image(rng: np.random.Generator, tissue: _Tissue, motion: Motion, scan: _Scan, height: float) -> np.ndarray:
    """H&E-like image (c, y, x) uint8: eosin from the smooth structure, nuclei as dots where the density is high."""
    n = round(scan.extent / scan.mpp)
    axis = (np.arange(n) + 0.5) * scan.mpp
    xy = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    where = motion(xy)
    inside = tissue.inside(where)
    where = np.column_stack([where[inside], np.full(inside.sum(), height)])
    eosin = np.zeros(n * n)
    eosin[inside] = 0.30 + 0.12 * np.tanh(tissue.smooth(where)[:, :2]).sum(axis=1)
    eosin[inside] *= 1 - 0.8 * expit(8 * (tissue.glands(where)[:, 0] - 1.0))  # pale where the field exceeds 1 sd
    eosin += inside * 0.03 * rng.normal(size=n * n)
    # One nucleus per pixel at most: about 8 um across at the default pixel size.
    probability = np.zeros(n * n)
    probability[inside] = 0.08 * expit(1.5 * tissue.density(where)[:, 0])
    nuclei = (rng.random(n * n) < probability).reshape(n, n).astype(float)
    hematoxylin = np.clip(gaussian_filter(nuclei, 3.0 / scan.mpp) * 2.0, 0, 1.5).ravel()
    density = np.clip(eosin, 0, None)[:, None] * _EOSIN + hematoxylin[:, None] * _HEMATOXYLIN
    rgb = 243.0 * np.exp(-density) + rng.normal(0, 1.5, size=density.shape)
    return np.clip(rgb, 0, 255).astype(np.uint8).reshape(n, n, 3).transpose(2, 0, 1)
