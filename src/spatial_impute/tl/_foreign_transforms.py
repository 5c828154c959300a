"""Places of sections from and for other programs: matrices, displacement fields, pairs of points."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._geometry import apply_affine, box_after, linear_scale, scaling
from spatial_impute._io.files import file_to_write, read_text, written_whole
from spatial_impute._registration import SectionTransform
from spatial_impute._settings import logger
from spatial_impute._stack.elements import load_transform, section_levels
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import raise_or_warn, registration_problems
from spatial_impute._validation import require_key, require_positive
from spatial_impute.tl._places import check_matrix, landmark_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level

_ITK_HEADER = b"#Insight Transform File"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_ROLES = ("sec|mov|source|src", "ref|fix|target|tgt")  # names of the section, and of the reference
# x in `x`, `x1`, `section_x`, `x (px)`, `sx` and `fixedX`, and for rows and columns of pixels
_AXIS = re.compile(rf"(?:^|[^a-z]|(?:{'|'.join(_ROLES)})[a-z]*)([a-oq-z]?[xyz]|rows?|col(?:umn)?s?)(?![a-z])")
_LATTICE = 12  # points along a side of the image: a deformation bends less than between two of them
_FAR = 1e4  # ITK moves points in single precision: their distance is that of a section in um
_MOST_SCALE = 1.5  # serial sections shrink or stretch by some per cent; magnifications of scans differ by a factor of 2
_MARGIN = 0.02  # of the side of the image: points lie inside
_FIELDS = (".nii", ".nii.gz", ".nrrd")
_COARSE = 16  # pixels along the image for a place without deformation: between them it is linear
_ROUNDS = 30  # of the inversion; a deformation without folds needs fewer


def read_transformation(
    path: str | Path, *, section_unit: float | None = None, reference_unit: float | None = None
) -> np.ndarray | tuple[np.ndarray, np.ndarray] | SectionTransform:
    """Read the place of a section from a file of another program, for ``register_stack(transformations=...)``.

    - A matrix of ITK or ANTs (``.mat``, ``.tfm``, ``.txt``) with the reference as the fixed image.
    - A displacement field of ITK or ANTs (``.nii``, ``.nii.gz``, ``.nrrd``), or a composite transform with one
      (``.h5``), from the reference, as the fixed image, all the way to the section. ``antsApplyTransforms -o
      [field.nii.gz,1]`` writes a field for a list of transforms.
    - Pairs of points (``.csv``, ``.tsv``): rows that end in four numbers (x, y in the section, x, y in the reference),
      or in six with z, as BigWarp exports them. Rows that BigWarp marks as not active are left out; so are other rows,
      with a warning.
    - A matrix (``.txt``, ``.json``) from the section to the reference: two or three rows of three numbers, nine numbers
      row by row, or ``matrix(a, b, c, d, e, f)`` of SVG and TrakEM2. Six numbers in one line are refused, because their
      order is not clear: row by row or column by column.

    Parameters
    ----------
    path
        File.
    section_unit, reference_unit
        Micrometres per unit of length in the file: 1 for um, 1000 for mm, the pixel size for pixels. Give both, or none
        if both are um.

    Returns
    -------
    A (3, 3) matrix, two arrays (n, 2) of points in the section and in the reference, or for a field a transformation
    with ``points`` and ``inverse``, um.

    Raises
    ------
    ValueError
        If the file holds none of these, one unit is given without the other, or most rows hold no pair of points.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> np.savetxt("s1.txt", [[1, 0, 20], [0, 1, 10], [0, 0, 1]])
    >>> si.tl.read_transformation("s1.txt", section_unit=0.5, reference_unit=0.5)[:2, 2]
    array([10.,  5.])
    """
    path = Path(path).expanduser()
    if (section_unit is None) != (reference_unit is None):
        msg = (
            "Expected both `section_unit` and `reference_unit`, found one of them. Give 1.0 for the one that is in um, "
            "or the same number twice."
        )
        raise ValueError(msg)
    given = {"section_unit": section_unit, "reference_unit": reference_unit}
    here, there = (require_positive(1.0 if unit is None else unit, name=name) for name, unit in given.items())
    if not path.is_file():
        msg = f"`path` must be a file with a transformation, found nothing at {str(path)!r}."
        raise FileNotFoundError(msg)
    if path.suffix.lower() in (".csv", ".tsv"):
        pairs = _read_pairs(path)
        section, reference = pairs[:, :2] * here, pairs[:, 2:] * there
        _warn_of_units(path, np.sqrt(reference.var(axis=0).sum() / max(section.var(axis=0).sum(), 1e-12)))
        return section, reference
    try:
        if path.name.lower().endswith((*_FIELDS, ".h5")):
            return _read_field(path, (here, there))
        is_itk = path.suffix.lower() == ".mat" or path.read_bytes().startswith(_ITK_HEADER)
        matrix = _read_itk(path) if is_itk else _read_numbers(path)
        matrix = check_matrix(scaling(there) @ matrix @ scaling(1 / here))
    except (ValueError, RuntimeError) as error:
        msg = (
            "Expected a 2D linear transform of ITK, a 2D displacement field (`.nii.gz`, `.nrrd`, `.h5`), or six or nine "
            f"numbers of a matrix, found something else in {str(path)!r}: {error}"
        )
        raise ValueError(msg) from error
    _warn_of_units(path, linear_scale(matrix))
    return matrix


def _warn_of_units(path: Path, scale: float) -> None:
    if not 1 / _MOST_SCALE < scale < _MOST_SCALE:
        logger.warning(
            "%s makes the section %.3g times as large in um; check `section_unit` and `reference_unit`", path, scale
        )


def write_transformation(sdata: SpatialData, section: str, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the place of a registered section for other programs, in um.

    Parameters
    ----------
    sdata
        Registered stack.
    section
        Name of the section.
    path
        File to write. ``.mat`` and ``.tfm``: affine part as an ITK transform with the reference as the fixed image, for
        ``antsApplyTransforms``. ``.txt``: affine part as a (3, 3) matrix from the section to the reference. ``.csv``:
        pairs of points, deformation included (x, y in the section, x, y in the reference). ``.nii``, ``.nii.gz`` and
        ``.nrrd``: displacement field with the affine part and the deformation, for ``antsApplyTransforms``.
    overwrite
        Replace an existing file.

    Returns
    -------
    ``None``. Writes the file.

    Raises
    ------
    FileExistsError
        If there is a file at `path` and `overwrite` is False.
    FileNotFoundError
        If the folder of `path` does not exist.
    KeyError
        If the section is not registered.
    ValueError
        If `path` has another ending, or an image is not the one that was registered.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.write_transformation(sdata, "s0", "s0.mat")
    >>> si.tl.read_transformation("s0.mat").shape
    (3, 3)
    """
    record = load_record(sdata)
    path = file_to_write(path, ends=(".mat", ".tfm", ".txt", ".csv", *_FIELDS), overwrite=overwrite)
    raise_or_warn(registration_problems(sdata, record))
    transform = load_transform(sdata, record, section)
    if transform.deforms and path.suffix.lower() in (".mat", ".tfm", ".txt"):
        logger.warning(
            "Section %s is deformed; %s holds the affine part only. Pairs of points and fields hold both", section, path
        )
    with written_whole(path) as part:
        if path.suffix.lower() == ".csv":
            _write_pairs(part, transform, section_levels(sdata, record[section])[0])
        elif path.suffix.lower() == ".txt":
            np.savetxt(part, transform.matrix, "%.12g")
        elif path.suffix.lower() in (".mat", ".tfm"):
            _write_itk(part, transform.matrix)
        else:
            then = "The field covers its image."
            require_key(record.reference, record.names, where="the stack's sections", then=then)
            _write_field(part, transform, section_levels(sdata, record[record.reference])[0])


def _write_pairs(path: Path, transform: SectionTransform, level: Level) -> None:
    """Points of the image of a section, and their places in the reference."""
    steps = (np.linspace(_MARGIN, 1 - _MARGIN, _LATTICE) * n for n in level.shape[::-1])
    corners = np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 2)
    points = apply_affine(corners, level.to_um)
    header = "section_x,section_y,reference_x,reference_y"
    np.savetxt(path, np.hstack([points, transform.points(points)]), "%.4f", ",", header=header, comments="")


def _write_itk(path: Path, matrix: np.ndarray) -> None:
    """Matrix as ITK keeps it, from fixed points to moving ones."""
    import ants

    back = np.linalg.inv(matrix)
    affine = ants.create_ants_transform(
        "AffineTransform", precision="double", dimension=2, matrix=back[:2, :2], translation=back[:2, 2]
    )
    ants.write_transform(affine, str(path))


def _read_itk(path: Path) -> np.ndarray:
    """Matrix from the moving to the fixed image; ITK keeps the map from fixed points to moving ones."""
    import ants

    with TemporaryDirectory() as folder:  # a copy, because ITK does not know `.MAT`
        transform: Any = ants.read_transform(str(shutil.copy(path, Path(folder) / f"place{path.suffix.lower()}")))
    if transform.dimension != 2:
        msg = f"it has {transform.dimension} dimensions."
        raise ValueError(msg)
    points = _FAR * np.array([[0, 0], [1, 0], [0, 1]])
    moved = np.array([transform.apply_to_point(tuple(point)) for point in points], float)
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = (moved[1:] - moved[0]).T / _FAR, moved[0]
    return np.linalg.inv(matrix)


def _read_numbers(path: Path) -> np.ndarray:
    """Matrix of six or nine numbers, if their layout distinguishes rows from columns."""
    text = read_text(path).strip()
    by_column = re.fullmatch(r"matrix\s*\((.*)\)", text, re.DOTALL)
    text = by_column.group(1) if by_column else text
    mark = "]" if text.count("]") > 1 else ";" if ";" in text else "\n"
    rows = [[float(n) for n in re.findall(_NUMBER, row)] for row in text.split(mark)]
    rows = [row for row in rows if row]
    found = np.array([number for row in rows for number in row])
    others = re.sub(rf"{_NUMBER}|[\s,;\[\](){{}}]", "", text)  # such as a typographic minus
    if found.size not in (6, 9) or others:
        msg = f"it holds {found.size} numbers{f' and {others[:20]!r}' if others else ''}."
        raise ValueError(msg)
    if by_column and found.size == 6:
        return np.vstack([found.reshape(3, 2).T, [0, 0, 1]])
    # Nine numbers in one row end in 0, 0, 1; column by column they do so only without a shift.
    plain = found.size == 9 and (found[[2, 5]].any() or found[1] == found[3])
    if {len(row) for row in rows} != {3} and not plain:
        msg = (
            f"its {found.size} numbers may stand row by row or column by column. Write them in lines of three: a b c, "
            "then d e f, for x' = a x + b y + c and y' = d x + e y + f."
        )
        raise ValueError(msg)
    return np.array([*found, 0, 0, 1][:9], float).reshape(3, 3)


def _read_pairs(path: Path) -> np.ndarray:
    """(n, 4) points: x, y in the section and x, y in the reference."""
    pairs: list[list[float]] = []
    header: list[str] = []
    inactive = unread = 0
    for line in filter(str.strip, read_text(path).splitlines()):
        # Where semicolons or tabs part the cells, a comma is the decimal point of many countries.
        cells = re.split(r"[;\t]", line.replace(",", ".")) if re.search(r"[;\t]", line) else line.split(",")
        cells = [cell.strip().strip('"').lower() for cell in cells]
        numbers = _trailing_numbers(cells)
        if not numbers and not (pairs or inactive or unread):
            header = cells
            _require_order(header, path)
        elif "false" in cells:
            inactive += 1
        elif (pair := _pair(numbers, header)) is None:
            unread += 1
        else:
            pairs.append(pair)
    if len(pairs) < 2 or unread > len(pairs):
        msg = (
            "Expected rows that end in four numbers (x, y in the section, x, y in the reference) or in six with z, "
            f"found {len(pairs)} such rows, {inactive} that are not active and {unread} others in {str(path)!r}. At "
            "least two pairs are needed, and most rows must be pairs. Save a matrix as `.txt`, in lines of three numbers."
        )
        raise ValueError(msg)
    if inactive or unread:
        log = logger.warning if unread else logger.info
        log("%s: %d pairs; %d rows are not active and %d hold no pair", path, len(pairs), inactive, unread)
    return np.array(pairs, float)


def _pair(numbers: list[float], header: list[str]) -> list[float] | None:
    """x, y, x, y of a row that ends in these numbers; None without a finite pair. A header says if there is z."""
    with_z = "z" in map(_axis, header) if header else len(numbers) == 6
    if with_z:
        numbers = [*numbers[-6:-4], *numbers[-3:-1]] if len(numbers) >= 6 else []
    wanted = numbers[-4:] if header else numbers
    return wanted if len(wanted) == 4 and np.isfinite(wanted).all() else None


def _axis(column: str) -> str:
    """Axis that a column is named by, ``"x"``, ``"y"`` or ``"z"``; empty without one."""
    found = _AXIS.search(column)
    if found is None:
        return ""
    return found[1][-1] if len(found[1]) < 3 else {"r": "y", "c": "x"}[found[1][0]]


def _require_order(header: list[str], path: Path) -> None:
    """Raise a ``ValueError`` unless the named columns at the end are x, y in the section, x, y in the reference."""
    axes = [_axis(name) for name in header]
    order = list("xyzxyz" if "z" in axes else "xyxy")
    section, reference = ([i for i, name in enumerate(header) if re.search(role, name)] for role in _ROLES)
    turned = section and reference and section[0] > reference[0]
    if turned or (any(axes) and axes[-len(order) :] != order):
        msg = (
            f"Expected that the last columns are x, y in the section, then x, y in the reference (four numbers, or six with z), "
            f"found {header} in {str(path)!r}. Change the order of the columns, and leave out those behind them."
        )
        raise ValueError(msg)


def _trailing_numbers(cells: list[str]) -> list[float]:
    """Numbers at the end of a row, after the last cell that is no number."""
    numbers: list[float] = []
    for cell in reversed(cells):
        try:
            numbers.insert(0, float(cell))
        except ValueError:
            break
    return numbers


def _read_field(path: Path, units: tuple[float, float]) -> SectionTransform:
    """Place from a field that leads from points of the reference all the way to the section; `units` are um per unit.

    The matrix that fits the whole field best becomes the affine part, and the rest the deformation.
    """
    (size, first, shape), found = (_sample_composite if path.suffix.lower() == ".h5" else _sample_image)(path)
    section, reference = found * units[0], _lattice(size, first, shape) * units[1]
    matrix = landmark_matrix(section, reference, "affine")
    pull = (apply_affine(section, matrix) - reference).reshape(*shape[::-1], 2).astype(np.float32)
    corner = (first - 0.5 * size) * units[1]
    grid = np.array([[size[0] * units[1], 0, corner[0]], [0, size[1] * units[1], corner[1]], [0, 0, 1.0]])
    push = np.zeros_like(pull)
    for _ in range(_ROUNDS):  # a point that was pushed is pulled to its old place
        back = SectionTransform(np.eye(3), pull, push, grid).inverse(reference + push.reshape(-1, 2))
        push -= (back - reference).reshape(push.shape).astype(np.float32)
    return SectionTransform(matrix, pull, push, grid)


def _lattice(size: np.ndarray, first: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """(n, 2) centres of pixels, row by row, from their size, the first centre, and the number along x and y."""
    return first + np.stack(np.meshgrid(*map(np.arange, shape)), axis=-1).reshape(-1, 2) * size


def _sample_image(path: Path) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Lattice of a displacement field, and the places to which it moves the points of the lattice."""
    import ants

    image = ants.image_read(str(path))
    if image.dimension != 2 or image.components != 2 or not np.allclose(image.direction, np.eye(2)):
        msg = f"it has {image.dimension} dimensions, {image.components} values per pixel and the direction {image.direction}."
        raise ValueError(msg)
    lattice = np.array(image.spacing), np.array(image.origin), np.array(image.shape)
    return lattice, _lattice(*lattice) + image.numpy().transpose(1, 0, 2).reshape(-1, 2)


def _sample_composite(path: Path) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Lattice of the field in a composite transform, and the places to which the whole transform moves its points."""
    import ants
    import h5py

    fields = []
    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            parts = list(file.get("TransformGroup", {}).values())
            fields = [p["TransformFixedParameters"][:] for p in parts if b"DisplacementField" in p["TransformType"][0]]
    if len(fields) != 1 or len(fields[0]) != 10 or not np.allclose(fields[0][6:], [1, 0, 0, 1]):
        msg = f"it has {len(fields)} displacement fields; expected one of two dimensions that is not turned."
        raise ValueError(msg)
    shape, first, size = fields[0][:6].reshape(3, 2)
    lattice = size, first, shape.astype(int)
    moved = ants.apply_transforms_to_points(2, pd.DataFrame(_lattice(*lattice), columns=["x", "y"]), [str(path)])
    return lattice, moved[["x", "y"]].to_numpy()


def _write_field(path: Path, transform: SectionTransform, reference: Level) -> None:
    """Write the way from points of the reference image to the section, in um, affine part included."""
    import ants

    low, high = box_after((0, 0), reference.shape[::-1], reference.to_um)
    extent = high - low
    step = extent.max() / _COARSE
    if transform.grid is not None:
        step = min(step, float(np.linalg.norm(transform.grid[:2, 0])))
    shape = np.ceil(extent / step).astype(int)
    first = low + 0.5 * step
    points = _lattice(step, first, shape)
    field = (transform.inverse(points) - points).reshape(*shape[::-1], 2).transpose(1, 0, 2).astype(np.float32)
    image = ants.from_numpy(field, origin=tuple(first), spacing=(step, step), has_components=True)
    ants.image_write(image, str(path))
