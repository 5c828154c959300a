"""Bring the sections of a stack into one frame. The only place where registration meets the data object."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._geometry import scaling
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._keys import Keys
from spatial_impute._logging import log_added, logger
from spatial_impute._registration import (
    ChainResult,
    RegistrationParams,
    SectionImage,
    SectionTransform,
    StackTask,
    deform_stack,
    register_chain,
    run_all,
)
from spatial_impute._stack.elements import displacement_elements, section_levels
from spatial_impute._stack.record import load_record, save_record
from spatial_impute._validation import (
    name_list,
    require_count,
    require_key,
    require_one_of,
    require_positive,
    require_slot_key,
    resolve_params,
)
from spatial_impute.tl._given_transforms import check_skip, read_placements
from spatial_impute.tl._write_registration import registered_coordinates, write_displacements, write_transformations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spatialdata import SpatialData

    from spatial_impute._registration import PairResult
    from spatial_impute._stack.record import StackRecord
    from spatial_impute.tl._given_transforms import Placement

# Tissue rarely fills less than half of the side of its scan, so this leaves it the pixels that registration works at.
_SCAN_PER_TISSUE = 2.2


@dataclass(frozen=True)
class RegistrationResult:
    """What :func:`register_stack` found, returned with ``inplace=False``."""

    matrices: dict[str, np.ndarray]
    """Section name to (3, 3) affine from its frame to that of the reference, um."""
    quality: pd.DataFrame
    """One row per pair of sections."""
    transforms: dict[str, SectionTransform]
    """Section name to its whole way into the common frame, with ``points`` and ``inverse``."""
    sections: pd.DataFrame
    """One row per section: route, verdict, estimated residual error, deformation."""


def register_stack(
    sdata: SpatialData,
    *,
    reference: str | None = None,
    method: str = "affine",
    policy: str = "auto",
    on_failure: str = "raise",
    resolution: float | None = None,
    transformations: Mapping[str, Placement] | None = None,
    initial: Mapping[str, Placement] | None = None,
    skip: str | Sequence[str] = (),
    registration_params: RegistrationParams | Mapping[str, Any] | None = None,
    target_coordinate_system: str = Keys.ALIGNED,
    seed: int = 0,
    show_progress_bar: bool | None = None,
    inplace: bool = True,
) -> RegistrationResult | None:
    """Register the H&E sections of a stack to its reference with antspyx :cite:p:`Avants2011`.

    For each pair of sections all rotations and both faces are searched; the best starts are refined by a rigid and an
    affine fit of the stain inside the tissue, and the pose is chosen by image content. Neighbours are chained to the
    reference; where a neighbour gives no sound link, the next one is tried. With ``method="syn"`` each section then
    gets one smooth deformation onto the next one on its way to the reference, if different parts of the tissue
    ask for the same one; otherwise it keeps its affine place, and its row says why.

    Pairs run in parallel if a :class:`dask.distributed.Client` is active. antspyx uses one thread, which makes results
    repeatable, unless ``ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS`` is set.

    Parameters
    ----------
    sdata
        Stack.
    reference
        Section that stays where it is; that of the stack record by default (the first measured one).
    method
        ``"rigid"``, ``"affine"`` or ``"syn"`` (affine and a deformation).
    policy
        ``"sequential"`` registers neighbours and chains them; ``"star"`` registers every section to the reference;
        ``"auto"`` does both and keeps the chain unless the two disagree and the direct one scores higher.
    on_failure
        ``"raise"`` or ``"warn"`` when a section could not be placed with confidence. It is never replaced by the
        identity in silence.
    resolution
        Pixel size in um at which the images are read. By default the longer side of an image gets 2.2 times the pixels
        at which registration works (704), but none below ``registration_params.min_working_pixel``.
    transformations
        Sections whose place is known. A (3, 3) matrix from the section's frame to that of the reference (um), a pair
        of landmark arrays (n, 2) in um (in the section, in the reference), or ``"aligned"`` for a section that is
        aligned already: its transformation to `target_coordinate_system` is kept, or its frame taken for that of the
        reference if it has none. Taken as they are, without deformation; neighbours are registered to them.
    initial
        The same, as starts: such a section is fitted from there and no other pose is searched.
    skip
        Sections (damaged, wrong stain) that are not registered and to which none is; their neighbours are linked over
        them. Without an entry in `transformations` they are left out of the common frame, so they must have no spots.
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
        the affine part as a transformation to `target_coordinate_system` (um, frame of the reference).
    `sdata.images['{section}_displacement']`, `sdata.images['{section}_displacement_inverse']`
        (2, y, x) float32 ``dx, dy`` in um on a grid of the common frame, for sections with a deformation. The first
        leads from a point of the common frame to its place by the affine part alone (for images), the second back (for
        points). :func:`warp_element` applies them.
    `sdata.tables['stack'].obsm['spatial_3d']` : :class:`numpy.ndarray` (``float64``)
        (n_spots, 3) x, y in the common frame, deformation included, and z, um.
    `sdata.attrs['spatial_impute']['stack']['registration']`
        Matrices, quality of every pair, settings (JSON); see :func:`spatial_impute.metrics.registration_quality`.

    Raises
    ------
    ValueError
        If a section has no tissue, tissue areas differ tenfold (wrong pixel size), a skipped section has spots and no
        place, or a section fails and ``on_failure="raise"``. Nothing is written then.

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
    require_key(reference, record.names, where="the stack's sections", then="Choose one of them with `reference=`.")
    require_one_of(method, {"rigid", "affine", "syn"}, name="method")
    require_one_of(policy, {"auto", "sequential", "star"}, name="policy")
    require_one_of(on_failure, {"raise", "warn"}, name="on_failure")
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    params = resolve_params(registration_params, RegistrationParams)
    seed = require_count(seed, name="seed", least=0)
    require_slot_key(target_coordinate_system, name="target_coordinate_system", taken=record.names)
    kind = "rigid" if method == "rigid" else "affine"
    given, starts = (
        read_placements(
            sdata, record, reference, found or {}, argument=name, kind=kind, target=target_coordinate_system
        )
        for found, name in ((transformations, "transformations"), (initial, "initial"))
    )
    skipped = check_skip(sdata, record, reference, name_list(skip, name="skip"), given)
    if both := sorted(set(given) & set(starts)):
        msg = f"Sections {both} stand in `transformations` and in `initial`; a known place needs no start."
        raise ValueError(msg)

    linked = [name for name in record.names if name not in skipped]
    images, to_section = _thumbnails(sdata, record, linked, resolution, params)
    base = to_section[reference]
    in_thumbnails = [  # from the frames of the sections to those of the thumbnails
        {name: np.linalg.inv(base) @ m @ to_section[name] for name, m in some.items() if name in images}
        for some in (given, starts)
    ]
    run = partial(run_all, show=show_progress_bar)
    task = StackTask(images, reference, policy, kind, *in_thumbnails, params, seed)
    pairs, placed = register_chain(task, run)
    fields: dict[str, Any] = {}
    if method == "syn" and not (on_failure == "raise" and any(r.verdict == "failed" for r in placed.values())):
        fields = deform_stack(images, placed, reference, params=params, seed=seed, run=run)
    _report(placed, on_failure)

    transforms, sections = {}, {}
    for name in record.names:
        if name in placed:
            field, deformation = fields.get(name, (None, None))
            matrix = base @ placed[name].matrix @ np.linalg.inv(to_section[name])
            transforms[name] = SectionTransform.from_field(matrix, field, base)
            sections[name] = _section_row(
                placed[name], matrix, deformation=deformation, deformed=field is not None, pairs=pairs
            )
        elif name in given:
            transforms[name] = SectionTransform(given[name])
            sections[name] = _section_row(ChainResult(given[name], (name, reference), "given", 1.0, "ok"), given[name])
    rows = [{"fixed": f, "moving": m, "method": pair.method, **pair.quality} for (f, m), pair in pairs.items()]
    if not inplace:
        matrices = {name: transform.matrix for name, transform in transforms.items()}
        frame = pd.DataFrame([{"section": name, **row} for name, row in sections.items()]).set_index("section")
        return RegistrationResult(matrices, pd.DataFrame(rows), transforms, frame)

    elements = [displacement_elements(transforms[name], name, target_coordinate_system) for name in transforms]
    coordinates = registered_coordinates(sdata, record, transforms)
    write_transformations(sdata, record, transforms, target_coordinate_system)
    write_displacements(sdata, record, {key: new for some in elements for key, new in some.items()})
    if coordinates is not None:
        sdata.tables[Keys.STACK_TABLE].obsm[Keys.SPATIAL_3D] = coordinates
        log_added(f"tables[{Keys.STACK_TABLE!r}].obsm[{Keys.SPATIAL_3D!r}]")
    registration = {
        "version": version("spatial-impute"),
        "method": method,
        "policy": policy,
        "seed": seed,
        "resolution_um": resolution,
        "coordinate_system": target_coordinate_system,
        "params": _jsonable(asdict(params)),
        "skipped": skipped,
        "sections": sections,
        "pairs": _jsonable(rows),
    }
    save_record(sdata, replace(record, reference=reference, registration=registration))
    log_added(f"attrs[{Keys.ATTRS!r}][{Keys.STACK!r}]['registration']")
    return None


def _thumbnails(
    sdata: SpatialData, record: StackRecord, names: Sequence[str], resolution: float | None, params: RegistrationParams
) -> tuple[dict[str, SectionImage], dict[str, np.ndarray]]:
    """Thumbnail of every section and the affine from its own frame (um from the corner) to that of the section."""
    images, to_section = {}, {}
    for section in (record[name] for name in names):
        levels = section_levels(sdata, section)
        longest = max(levels[0].shape) * levels[0].pixel_size
        wanted = _SCAN_PER_TISSUE * max(params.working_side, params.syn_side)
        rgb, to_um = read_thumbnail(levels, resolution or max(params.min_working_pixel, longest / wanted))
        size_x, size_y = np.linalg.norm(to_um[:2, :2], axis=0)
        try:
            images[section.name] = SectionImage(rgb, pixel_size=(size_x, size_y))
        except ValueError as error:
            msg = (
                f"Section {section.name!r} (`sdata.images[{section.image!r}]`): {error} A section that cannot be "
                f"registered can be left to `skip=[{section.name!r}]`, with its place in `transformations`."
            )
            raise ValueError(msg) from error
        to_section[section.name] = to_um @ scaling(1 / size_x, 1 / size_y)
    return images, to_section


def _report(placed: dict[str, ChainResult], on_failure: str) -> None:
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
            msg += (
                " after `on_failure='warn'`, then give the section a start (`initial`) or its place "
                "(`transformations`), or leave it out (`skip`)."
            )
            raise ValueError(msg)
        warnings.warn(msg + ".", UserWarning, stacklevel=3)


def _section_row(
    result: ChainResult,
    matrix: np.ndarray,
    *,
    deformation: dict[str, Any] | None = None,
    deformed: bool = False,
    pairs: Mapping[tuple[str, str], PairResult] | None = None,
) -> dict[str, Any]:
    link = (pairs or {}).get((result.path[1], result.path[0])) if len(result.path) > 1 else None
    reasons = list(result.reasons)
    if deformation is not None and deformation["note"]:
        reasons.append(deformation["note"])
    return _jsonable(
        {
            "matrix": matrix.tolist(),
            "route": result.route,
            "path": list(result.path),
            "score": result.score,
            "verdict": result.verdict,
            "disagreement": result.disagreement,
            "deformed": deformed,
            # Against the next section on the path, deformation included.
            "residual_um": deformation["residual_um"] if deformation else link and link.quality["residual_um"],
            "deformation": deformation,
            "reasons": reasons,
        }
    )


def _jsonable(value: Any) -> Any:
    """Plain Python types only: attrs refuse tuples and NumPy scalars."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
