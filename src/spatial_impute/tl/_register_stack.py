"""Register the sections of a stack and write the result to the data object."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from spatial_impute._geometry import linear_scale, scaling
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._io.workers import run_all
from spatial_impute._keys import Keys
from spatial_impute._registration import (
    ChainResult,
    KeptDeformation,
    Likeness,
    RegistrationParams,
    SectionImage,
    SectionTransform,
    StackTask,
    deform_stack,
    exchanged_sections,
    in_inferred_order,
    register_chain,
    section_errors,
)
from spatial_impute._settings import logger
from spatial_impute._stack.elements import section_levels
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import (
    name_list,
    require_count,
    require_key,
    require_one_of,
    require_positive,
    require_slot_key,
    resolve_params,
)
from spatial_impute.tl._places import (
    PlaceReader,
    approved_places,
    check_skip,
    given_tissue,
    tissue_keys,
    write_registration,
)

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

    from spatialdata import SpatialData

    from spatial_impute._registration import DisplacementField, PairResult
    from spatial_impute._stack.record import StackRecord
    from spatial_impute.tl._places import Placement

_MOST_SHRINKING = 0.1  # of one section against the next
# Tissue rarely fills less than half of the side of its scan. It then still has the pixels that registration needs.
_SCAN_PER_TISSUE = 2.2


@dataclass(frozen=True)
class RegistrationResult:
    """Result of :func:`register_stack` with ``inplace=False``."""

    matrices: dict[str, np.ndarray]
    """Section name to (3, 3) affine from its frame to that of the reference, um."""
    quality: pd.DataFrame
    """One row per pair of sections."""
    transforms: dict[str, SectionTransform]
    """Section name to its transformation to the common frame, deformation included, with ``points`` and ``inverse``."""
    sections: pd.DataFrame
    """One row per section: route, verdict, expected error, deformation."""


def register_stack(
    sdata: SpatialData,
    *,
    reference: str | None = None,
    method: str = "affine",
    policy: str = "auto",
    order: str = "given",
    on_failure: str = "raise",
    resolution: float | None = None,
    transformations: Mapping[str, Placement] | None = None,
    initial: Mapping[str, Placement] | None = None,
    skip: str | Sequence[str] = (),
    tissue_key: str | Mapping[str, str] | None = None,
    checked: str | Path | None = None,
    registration_params: RegistrationParams | Mapping[str, Any] | None = None,
    target_coordinate_system: str = Keys.ALIGNED,
    seed: int = 0,
    show_progress_bar: bool | None = None,
    inplace: bool = True,
) -> RegistrationResult | None:
    """Register the H&E sections of a stack to its reference with antspyx :cite:p:`Avants2011`.

    For each pair of sections, all rotations and both faces are searched. The best starts are refined by a rigid and an
    affine fit of the stain inside the tissue, and the pose is chosen by image content. Neighbors are chained to the
    reference. If the registration to a neighbor is not good, the section after it is tried. With ``method="syn"`` each
    section then gets one smooth deformation onto the next section on its path to the reference, if different parts of
    the tissue agree on it. Otherwise the section keeps its affine place, and its row gives the reason.

    Pairs run in parallel if a :class:`dask.distributed.Client` is active. antspyx uses one thread, which makes results
    repeatable, unless ``ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS`` is set.

    Parameters
    ----------
    sdata
        Stack.
    reference
        Section that stays in its place; by default that of the stack record (the first measured section).
    method
        ``"rigid"``, ``"affine"``, ``"syn"`` (affine and a deformation), or ``"auto"`` (a deformation only if tissue
        that was hidden from the fit fits clearly better with it).
    policy
        ``"sequential"`` registers neighbors and chains them. ``"star"`` registers every section to the reference.
        ``"auto"`` does both and keeps the chain unless the two disagree and the direct one scores higher.
    order
        ``"given"`` by the stack, or ``"infer"`` if it is not known. All sections are registered to the reference first,
        and are put in the order in which neighbors are most similar. The heights are assigned in this order. Images do
        not show which end is the upper one; the direction is the one nearer to the present order.
    on_failure
        ``"raise"`` or ``"warn"`` if a section could not be placed with confidence. It never stays unregistered
        silently.
    resolution
        Pixel size in um at which the images are read. By default the longer side of an image gets 2.2 times the pixels
        at which registration works (704), and a pixel is at least ``registration_params.min_working_pixel``.
    transformations
        Sections whose place is known. The place is a (3, 3) matrix from the frame of the section to that of the
        reference (um), a transformation as :func:`read_transformation` returns it for a field, a pair of landmark
        arrays (n, 2) in um (in the section, in the reference), or ``"aligned"`` for a section that is aligned already.
        ``"aligned"`` keeps the transformation to `target_coordinate_system`; without one, the frame of the section is
        that of the reference. These places are used as they are, without a fit; neighbors are registered to them. A section
        whose tissue hardly overlaps that of the next section there is ``"weak"``.
    initial
        Sections whose rough place is known, in the same form. The fit of such a section starts there, and no other pose
        is searched.
    skip
        Sections (damaged, wrong stain) that are not registered and to which no other section is registered. Their
        neighbors are linked directly. Without an entry in `transformations` they are not in the common frame, so they
        must have no spots.
    tissue_key
        Tissue of the sections: names of labels (0 is no tissue) or shapes (outlines) by section, or one name with the
        word ``{section}`` in it, used for each section that has it. ``"{section}_tissue"`` uses the labels of
        :func:`~spatial_impute.pp.segment_tissue`, which you can correct before. By default, and for other sections, the
        tissue is found on the image.
    checked
        File of decisions that the page of :func:`~spatial_impute.pl.registration_page` saved for the present
        registration. Approved sections stay where they are, with their deformation; the others are registered to them.
        A rejected section needs an entry in `transformations`, `initial` or `skip`.
    registration_params
        Advanced settings; see :class:`~spatial_impute._registration.RegistrationParams`.
    target_coordinate_system
        Name of the common coordinate system.
    seed
        Seed of the optimiser; the same seed gives the same result, for a fixed number of threads.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.
    inplace
        Write to `sdata`, or return the result and write nothing.

    Returns
    -------
    ``None``, or a :class:`RegistrationResult` with ``inplace=False``. Writes:

    every element of a section
        The affine part as a transformation to `target_coordinate_system` (um, frame of the reference).
    `sdata.images['{section}_displacement']`, `sdata.images['{section}_displacement_inverse']`
        (2, y, x) float32 ``dx, dy`` in um on a grid of the common frame, for sections with a deformation. The first
        maps a point of the common frame to its place by the affine part alone (for images), the second maps it back
        (for points). :func:`warp_element` applies them.
    `sdata.tables['stack'].obsm['spatial_3d']` : :class:`numpy.ndarray` (``float64``)
        (n_spots, 3) x, y in the common frame, deformation included, and z, um.
    `sdata.attrs['spatial_impute']['stack']['registration']`
        Matrices, quality of every pair, settings (JSON); see :func:`spatial_impute.metrics.registration_quality`.

    Raises
    ------
    ValueError
        If a section has no tissue, tissue areas differ tenfold (wrong pixel size), a skipped section has spots and no
        place, `checked` belongs to another registration or another image, or rejects a section without another entry,
        or a section fails and ``on_failure="raise"``. Nothing is written then.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> sdata.tables["stack"].obsm["spatial_3d"].shape[1]
    3
    """
    record = load_record(sdata)
    if Keys.STACK_TABLE in sdata.tables:
        stack_table(sdata)
    reference = record.reference if reference is None else reference
    require_key(reference, record.names, where="the stack's sections", then="Choose one of them with `reference=`.")
    require_one_of(method, {"rigid", "affine", "syn", "auto"}, name="method")
    require_one_of(policy, {"auto", "sequential", "star"}, name="policy")
    require_one_of(order, {"given", "infer"}, name="order")
    require_one_of(on_failure, {"raise", "warn"}, name="on_failure")
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    params = resolve_params(registration_params, RegistrationParams)
    seed = require_count(seed, name="seed", least=0)
    require_slot_key(target_coordinate_system, name="target_coordinate_system", taken=record.names)
    places = PlaceReader(sdata, record, reference, "rigid" if method == "rigid" else "affine", target_coordinate_system)
    given, starts = places.read(transformations, "transformations"), places.read(initial, "initial")
    skipped = name_list(skip, name="skip")
    approved, approved_rows = approved_places(sdata, record, checked, reference, {*given, *starts, *skipped})
    given |= {name: place.matrix for name, place in approved.items()}
    kept = {name: place for name, place in (transformations or {}).items() if isinstance(place, SectionTransform)}
    kept |= approved
    check_skip(record, reference, skipped, given)
    tissue = tissue_keys(sdata, record, tissue_key)
    if both := sorted(set(given) & set(starts)):
        msg = f"Sections {both} are in `transformations` and in `initial`; a known place needs no start."
        raise ValueError(msg)
    settings = {
        "version": version("spatial-impute"),
        "method": method,
        "policy": policy,
        "order": order,
        "seed": seed,
        "resolution_um": resolution,
        "coordinate_system": target_coordinate_system,
        "params": _jsonable(asdict(params)),
        "skipped": skipped,
        "tissue": tissue,
        "approved": list(approved),
    }
    request = _Request(reference, settings, params, given, starts, kept, approved_rows, on_failure, show_progress_bar)
    found = _register(sdata, record, request)
    if order == "infer":
        names = ", ".join(found.placed)
        logger.warning("Order of the sections by their likeness: %s. The direction is not known", names)
        record = record.in_order(list(found.placed))
    _report(found.placed, on_failure, approved)
    for first, second, gain in found.exchanged:
        logger.warning(
            "Sections %s and %s fit their neighbors better the other way round (correlation higher by %.2f). If their "
            "order is wrong, assemble the stack again in the right order (`z`)",
            first,
            second,
            gain,
        )
    transforms, rows = _in_sections(record, request, found)
    pairs = [{"fixed": f, "moving": m, "method": p.method, **p.quality} for (f, m), p in found.pairs.items()]
    if not inplace:
        matrices = {name: transform.matrix for name, transform in transforms.items()}
        table = pd.DataFrame([{"section": name, **row} for name, row in rows.items()]).set_index("section")
        return RegistrationResult(matrices, pd.DataFrame(pairs), transforms, table)
    registration = {**settings, "sections": rows, "pairs": _jsonable(pairs)}
    write_registration(sdata, replace(record, reference=reference), transforms, registration)
    return None


@dataclass(frozen=True)
class _Request:
    """Checked arguments."""

    reference: str
    settings: dict[str, Any]
    params: RegistrationParams
    given: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]
    kept: dict[str, SectionTransform]  # Places of `given` that are used as they are, with their deformation
    approved: dict[str, dict[str, Any]]  # Rows of approved sections
    on_failure: str
    show_progress_bar: bool | None


@dataclass(frozen=True)
class _Registered:
    """Result of the registration, in the frames of the thumbnails: um from the corner."""

    to_section: dict[str, np.ndarray]  # (3, 3) affines from the frames of the thumbnails to those of the sections
    pairs: dict[tuple[str, str], PairResult]
    placed: dict[str, ChainResult]
    fields: dict[str, tuple[DisplacementField | None, dict[str, Any]]]
    exchanged: list[tuple[str, str, float]]  # Neighbors that fit better the other way round, and the gain in likeness


def _thumbnails(
    sdata: SpatialData, record: StackRecord, request: _Request
) -> tuple[dict[str, SectionImage], dict[str, np.ndarray]]:
    """Images to register, and the affines from their frames to those of the sections."""
    images, to_section, params = {}, {}, request.params
    for section in record.sections:
        if section.name in request.settings["skipped"]:
            continue
        levels = section_levels(sdata, section)
        longest = max(levels[0].shape) * levels[0].pixel_size
        wanted = _SCAN_PER_TISSUE * max(params.working_side, params.syn_side)
        rgb, to_um = read_thumbnail(
            levels, request.settings["resolution_um"] or max(params.min_working_pixel, longest / wanted)
        )
        size_x, size_y = np.linalg.norm(to_um[:2, :2], axis=0)
        try:
            key = request.settings["tissue"].get(section.name)
            mask = None if key is None else given_tissue(sdata, key, section.name, rgb.shape[:2], to_um)
            images[section.name] = SectionImage(rgb, (size_x, size_y), mask)
        except ValueError as error:
            msg = (
                f"Section {section.name!r} (`sdata.images[{section.image!r}]`): {error} If the section cannot "
                f"be registered, use `skip=[{section.name!r}]` and give its place in `transformations`."
            )
            raise ValueError(msg) from error
        to_section[section.name] = to_um @ scaling(1 / size_x, 1 / size_y)
    return images, to_section


def _register(sdata: SpatialData, record: StackRecord, request: _Request) -> _Registered:
    images, to_section = _thumbnails(sdata, record, request)
    reference, from_base = request.reference, np.linalg.inv(to_section[request.reference])
    given, starts = (
        {name: from_base @ matrix @ to_section[name] for name, matrix in matrices.items() if name in images}
        for matrices in (request.given, request.starts)
    )
    method, policy, seed = (request.settings[key] for key in ("method", "policy", "seed"))
    run = partial(run_all, show=request.show_progress_bar)
    kind: Literal["rigid", "affine"] = "rigid" if method == "rigid" else "affine"
    task, known = StackTask(images, reference, policy, kind, given, starts, request.params, seed), None
    if request.settings["order"] == "infer":
        task, known = in_inferred_order(task, run)
    pairs, placed = register_chain(task, run, known)
    failed = any(result.verdict == "failed" for result in placed.values())
    fields = {}
    if method in ("syn", "auto") and not (failed and request.on_failure == "raise"):
        base = to_section[reference]
        kept = {n: KeptDeformation(place, base) for n, place in request.kept.items() if n in images and place.deforms}
        fields = deform_stack(
            images, placed, reference, params=request.params, seed=seed, run=run, certain=method == "auto", kept=kept
        )
    sound = {name: image for name, image in images.items() if placed[name].verdict != "failed"}
    exchanged = exchanged_sections(list(sound), Likeness(sound, placed, request.params)) if len(sound) > 2 else []
    return _Registered(to_section, pairs, placed, fields, exchanged)


def _report(placed: dict[str, ChainResult], on_failure: str, approved: Container[str]) -> None:
    """Warn of weak sections that nobody approved; raise or warn for failed sections."""
    for name, result in placed.items():
        how = "given" if result.route == "given" else f"{result.route}, score {result.score:.2f}"
        logger.info("Section %s: %s (%s)", name, result.verdict, how)
    _warn_of_pixel_size({name: linear_scale(result.matrix) for name, result in placed.items()})
    for verdict in ("weak", "failed"):
        bad = {n: result.reasons for n, result in placed.items() if result.verdict == verdict and n not in approved}
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


def _warn_of_pixel_size(scales: dict[str, float]) -> None:
    """Warn if sections must be scaled by one factor: tissue shrinks by a few per cent, and not equally."""
    scaled = {name: scale for name, scale in scales.items() if abs(np.log(scale)) > _MOST_SHRINKING}
    same = len(scaled) > 1 and max(scaled.values()) / min(scaled.values()) < 1 + _MOST_SHRINKING / 2
    if same and len(scaled) >= len(scales) - 1:
        factor = float(np.median(list(scaled.values())))
        logger.warning(
            "Sections %s all fit the reference when they are scaled by about %.2f; check the pixel size (`mpp`) of the "
            "reference and of these sections",
            list(scaled),
            factor,
        )


def _in_sections(
    record: StackRecord, request: _Request, found: _Registered
) -> tuple[dict[str, SectionTransform], dict[str, dict[str, Any]]]:
    """Transforms in the frames of the sections, and rows of the sections for the record (JSON)."""
    base = found.to_section[request.reference]
    deformed = {name: quality for name, (field, quality) in found.fields.items() if field is not None}
    errors = section_errors(found.pairs, found.placed, deformed, request.approved)
    transforms, rows = {}, {}
    for name in record.names:
        if name in found.placed:
            placed = found.placed[name]
            field, deformation = found.fields.get(name, (None, None))
            matrix = base @ placed.matrix @ np.linalg.inv(found.to_section[name])
            transforms[name] = request.kept.get(name) or SectionTransform.from_field(matrix, field, base)
            rows[name] = _section_row(placed, transforms[name], errors[name], deformation)
        elif name in request.given:
            placed = ChainResult(request.given[name], (name, request.reference), "given", 1.0, "ok")
            transforms[name] = request.kept.get(name) or SectionTransform(placed.matrix)
            rows[name] = _section_row(placed, transforms[name], {"error_um": 0.0, "error_p90_um": 0.0}, None)
    return transforms, rows | request.approved


def _section_row(
    placed: ChainResult, transform: SectionTransform, error: dict[str, float | None], deformation: dict[str, Any] | None
) -> dict[str, Any]:
    note = [deformation["note"]] if deformation and deformation["note"] else []
    row = {
        "matrix": transform.matrix.tolist(),
        "route": placed.route,
        "path": list(placed.path),
        "score": placed.score,
        "verdict": placed.verdict,
        "disagreement": placed.disagreement,
        "deformed": transform.deforms,
        **error,
        "deformation": deformation,
        "reasons": [*placed.reasons, *note],
    }
    return _jsonable(row)


def _jsonable(value: Any) -> Any:
    """Plain Python types only: attrs refuse tuples and NumPy scalars."""
    return json.loads(json.dumps(value, default=lambda scalar: scalar.item()))
