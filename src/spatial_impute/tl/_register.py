"""Bring the sections of a stack into one frame. The only place where registration meets the data object."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._geometry import apply_affine, scaling
from spatial_impute._keys import Keys
from spatial_impute._logging import log_added, logger
from spatial_impute._progress import progress
from spatial_impute._raster import read_thumbnail
from spatial_impute._registration import RegistrationParams, SectionImage, chain_to_reference, register_pair
from spatial_impute._stack import element_affine, load_record, save_record, section_levels
from spatial_impute._validation import require_key, require_one_of, require_positive, resolve_params

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spatial_impute._registration import ChainResult, PairResult
    from spatial_impute._stack import StackRecord

# Tissue rarely fills less than half of the side of its scan, so this leaves it the 320 px that registration works at.
_THUMBNAIL_SIDE = 700


@dataclass(frozen=True)
class RegistrationResult:
    """What :func:`register_stack` found, returned with ``inplace=False``."""

    matrices: dict[str, np.ndarray]
    """Section name to (3, 3) affine from its frame to that of the reference, um."""
    quality: pd.DataFrame
    """One row per pair of sections."""


def register_stack(
    sdata: SpatialData,
    *,
    reference: str | None = None,
    method: str = "affine",
    policy: str = "auto",
    on_failure: str = "raise",
    resolution: float | None = None,
    registration_params: RegistrationParams | Mapping[str, Any] | None = None,
    target_coordinate_system: str = Keys.ALIGNED,
    seed: int = 0,
    show_progress_bar: bool | None = None,
    inplace: bool = True,
) -> RegistrationResult | None:
    """Register the H&E sections of a stack to its reference with antspyx :cite:p:`Avants2011`.

    For each pair of sections all rotations and both faces are searched; the best starts are refined by a rigid and an
    affine fit of the stain inside the tissue, and the pose is chosen by image content. Neighbours are chained to the
    reference.

    Parameters
    ----------
    sdata
        Stack.
    reference
        Section that stays where it is; that of the stack record by default (the first measured one).
    method
        ``"rigid"`` or ``"affine"``.
    policy
        ``"sequential"`` registers neighbours and chains them; ``"star"`` registers every section to the reference;
        ``"auto"`` does both and keeps the chain unless the two disagree and the direct one scores higher.
    on_failure
        ``"raise"`` or ``"warn"`` when a section could not be placed with confidence. It is never replaced by the
        identity in silence.
    resolution
        Pixel size in um at which the images are read; by default 700 pixels along the longer side of the image, but
        no finer than ``registration_params.min_working_pixel``.
    registration_params
        Advanced settings.
    target_coordinate_system
        Name of the common coordinate system.
    seed
        Seed of the optimiser; same seed, same result (for a fixed number of threads).
    show_progress_bar
        ``settings.show_progress_bar`` by default.
    inplace
        Write to `sdata`, or return the result and write nothing.

    Returns
    -------
    ``None``, or a :class:`RegistrationResult` with ``inplace=False``. Writes:

    every element of a section
        a transformation to `target_coordinate_system` (um, frame of the reference).
    `sdata.tables['stack'].obsm['spatial_3d']` : :class:`numpy.ndarray` (``float64``)
        (n_spots, 3) x, y in the common frame and z, um.
    `sdata.attrs['spatial_impute']['stack']['registration']`
        Matrices, quality of every pair, settings (JSON); see :func:`spatial_impute.metrics.registration_quality`.

    Raises
    ------
    ValueError
        If a section has no tissue, tissue areas differ tenfold (wrong pixel size), or a section fails and
        ``on_failure="raise"``. Nothing is written then.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> sdata.tables["stack"].obsm["spatial_3d"].shape[1]
    3
    """
    record = load_record(sdata)
    reference = record.reference if reference is None else reference
    require_key(reference, record.names, where="the stack's sections")
    require_one_of(method, {"rigid", "affine"}, name="method")
    require_one_of(policy, {"auto", "sequential", "star"}, name="policy")
    require_one_of(on_failure, {"raise", "warn"}, name="on_failure")
    if resolution is not None:
        require_positive(resolution, name="resolution", unit="um per pixel")
    params = resolve_params(registration_params, RegistrationParams)

    images, to_section = _thumbnails(sdata, record, resolution, params)
    pairs: dict[tuple[str, str], PairResult] = {}
    for fixed, moving in progress(_pairs(record.names, reference, policy), "Registering pairs", show=show_progress_bar):
        pairs[fixed, moving] = register_pair(images[fixed], images[moving], method=method, params=params, seed=seed)
    placed = chain_to_reference(pairs, record.names, reference, params=params)
    _report(placed, pairs, on_failure)
    # From the frames of the thumbnails to those of the sections.
    matrices = {
        name: to_section[reference] @ placed[name].matrix @ np.linalg.inv(to_section[name]) for name in record.names
    }
    rows = [{"fixed": f, "moving": m, "method": pair.method, **pair.quality} for (f, m), pair in pairs.items()]
    if not inplace:
        return RegistrationResult(matrices, pd.DataFrame(rows))

    _write_transformations(sdata, record, matrices, target_coordinate_system)
    _write_coordinates(sdata, record, matrices)
    registration = {
        "method": method,
        "policy": policy,
        "seed": seed,
        "resolution_um": resolution,
        "coordinate_system": target_coordinate_system,
        "params": _jsonable(asdict(params)),
        "sections": {name: _section_row(placed[name], matrices[name]) for name in record.names},
        "pairs": _jsonable(rows),
    }
    save_record(sdata, replace(record, reference=reference, registration=registration))
    log_added(f"attrs[{Keys.ATTRS!r}][{Keys.STACK!r}]['registration']")
    return None


def _thumbnails(
    sdata: SpatialData, record: StackRecord, resolution: float | None, params: RegistrationParams
) -> tuple[dict[str, SectionImage], dict[str, np.ndarray]]:
    """Thumbnail of every section and the affine from its own frame (um from the corner) to that of the section."""
    images, to_section = {}, {}
    for section in record.sections:
        levels = section_levels(sdata, section)
        longest = max(levels[0].shape) * levels[0].pixel_size
        rgb, to_um = read_thumbnail(levels, resolution or max(params.min_working_pixel, longest / _THUMBNAIL_SIDE))
        size_x, size_y = np.linalg.norm(to_um[:2, :2], axis=0)
        try:
            images[section.name] = SectionImage(rgb, pixel_size=(size_x, size_y))
        except ValueError as error:
            msg = f"Section {section.name!r} (`sdata.images[{section.image!r}]`): {error}"
            raise ValueError(msg) from error
        to_section[section.name] = to_um @ scaling(1 / size_x, 1 / size_y)
    return images, to_section


def _pairs(names: Sequence[str], reference: str, policy: str) -> list[tuple[str, str]]:
    """Pairs (fixed, moving) to register: neighbours towards the reference, and each section to the reference."""
    middle = list(names).index(reference)
    pairs = []
    for i, name in enumerate(names):
        if i == middle:
            continue
        neighbour = names[i + 1] if i < middle else names[i - 1]
        if policy != "star" or neighbour == reference:
            pairs.append((neighbour, name))
        if policy != "sequential" and neighbour != reference:
            pairs.append((reference, name))
    return pairs


def _report(placed: dict[str, ChainResult], pairs: dict[tuple[str, str], PairResult], on_failure: str) -> None:
    """Say what went wrong: warn of weak sections, raise or warn for failed ones."""
    for name, result in placed.items():
        logger.info("Section %s: %s (%s, score %.2f)", name, result.verdict, result.route, result.score)
    for verdict in ("weak", "failed"):
        bad = {name: result.reasons for name, result in placed.items() if result.verdict == verdict}
        if not bad:
            continue
        lines = [f"{name}: {' '.join(reasons)}" for name, reasons in bad.items()]
        msg = (
            f"Registration is {verdict} for {len(bad)} of {len(placed)} sections. {' | '.join(lines)} "
            "Look at `si.pl.registration(sdata)`"
        )
        if verdict == "failed" and on_failure == "raise":
            msg += " after `on_failure='warn'`, or leave the section out of the stack."
            raise ValueError(msg)
        warnings.warn(msg + ".", UserWarning, stacklevel=3)


def _write_transformations(
    sdata: SpatialData, record: StackRecord, matrices: dict[str, np.ndarray], target: str
) -> None:
    from spatialdata.transformations import Affine, Sequence, get_transformation, set_transformation

    for _, name, element in list(sdata.gen_spatial_elements()):
        own = get_transformation(element, get_all=True)
        for section in record.names:
            if section in own:
                affine = Affine(matrices[section], input_axes=("x", "y"), output_axes=("x", "y"))
                set_transformation(element, Sequence([own[section], affine]), to_coordinate_system=target)
                logger.debug("Transformation of %r to %r", name, target)


def _write_coordinates(sdata: SpatialData, record: StackRecord, matrices: dict[str, np.ndarray]) -> None:
    """Registered coordinates of all spots in the stack table, if there is one."""
    if Keys.STACK_TABLE not in sdata.tables:
        return
    table = sdata.tables[Keys.STACK_TABLE]
    xyz = np.column_stack([table.obsm[Keys.SPATIAL], table.obs[Keys.Z].to_numpy(float)])
    for name in record.names:
        rows = (table.obs[Keys.SECTION] == name).to_numpy()
        xyz[rows, :2] = apply_affine(xyz[rows, :2], matrices[name])
    table.obsm[Keys.SPATIAL_3D] = xyz
    log_added(f"tables[{Keys.STACK_TABLE!r}].obsm[{Keys.SPATIAL_3D!r}]")


def _section_row(result: ChainResult, matrix: np.ndarray) -> dict[str, Any]:
    return _jsonable(
        {
            "matrix": matrix.tolist(),
            "route": result.route,
            "path": list(result.path),
            "score": result.score,
            "verdict": result.verdict,
            "disagreement": result.disagreement,
            "reasons": list(result.reasons),
        }
    )


def _jsonable(value: Any) -> Any:
    """Plain Python types only: attrs refuse tuples and NumPy scalars."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
