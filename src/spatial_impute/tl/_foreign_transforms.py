"""Places of sections from and for other programs: matrices, displacement fields, pairs of points, layers of napari."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine, box_after, exchanged_axes, linear_scale, scaling
from spatial_impute._io.files import file_to_write, read_text, written_whole
from spatial_impute._keys import Keys
from spatial_impute._registration import SectionTransform
from spatial_impute._settings import logger
from spatial_impute._stack import answer, load_record, load_transform, registration_problems, section_levels
from spatial_impute._validation import require_key, require_positive
from spatial_impute.tl._places import check_matrix, landmark_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level

_ITK_HEADER = b"#Insight Transform File"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
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
    - A displacement field of ITK or ANTs (``.nii``, ``.nii.gz``, ``.nrrd``) from the reference, as the fixed image, all
      the way to the section. ``antsApplyTransforms -o [field.nii.gz,1]`` writes one for a list of transforms.
    - Pairs of points (``.csv``, ``.tsv``): rows that end in four numbers (x, y in the section, x, y in the reference),
      or in six with z, as BigWarp exports them. Rows that BigWarp marks as not active are left out; so are other rows,
      with a warning.
    - A matrix (``.txt``, ``.json``) from the section to the reference: two or three rows of three numbers, nine numbers
      row by row, or ``matrix(a, b, c, d, e, f)`` of SVG and TrakEM2. Six numbers in one line may stand row by row or
      column by column, and are refused.

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
        if path.name.lower().endswith(_FIELDS):
            return _read_field(path, (here, there))
        is_itk = path.suffix.lower() == ".mat" or path.read_bytes().startswith(_ITK_HEADER)
        matrix = _read_itk(path) if is_itk else _read_numbers(path)
        matrix = check_matrix(scaling(there) @ matrix @ scaling(1 / here))
    except (ValueError, RuntimeError) as error:
        msg = (
            "Expected a 2D linear transform of ITK, a 2D displacement field (`.nii.gz`, `.nrrd`), or six or nine "
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
        Replace a file that is there.

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
        If `path` ends otherwise, or an image is not the one that was registered.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.tl.write_transformation(sdata, "s0", "s0.mat")
    >>> si.tl.read_transformation("s0.mat").shape
    (3, 3)
    """
    record = load_record(sdata)
    path = file_to_write(path, ends=(".mat", ".tfm", ".txt", ".csv", *_FIELDS), overwrite=overwrite)
    answer(registration_problems(sdata, record))
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


def read_placement(viewer: Any, section: str) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Read the place of a section from the window of :func:`spatial_impute.pl.place_by_hand`.

    Parameters
    ----------
    viewer
        Viewer of napari, after a section was dragged or landmarks were clicked.
    section
        Name of the section.

    Returns
    -------
    If there are landmarks: two arrays (n, 2), x and y in um, in the section and in the reference. Else the (3, 3)
    matrix from the section to the reference to which the image was dragged (or the reference under it). Both are taken
    by ``register_stack(transformations={section: place})``, and by ``initial`` as a start.

    Raises
    ------
    TypeError
        If `viewer` is no viewer.
    KeyError
        If the viewer has no layers of this section.
    ValueError
        If the section and the reference have different numbers of landmarks, or only one each, or `section` is the
        reference.

    Examples
    --------
    See :func:`spatial_impute.pl.place_by_hand`.
    """
    if not hasattr(viewer, "layers"):
        msg = f"`viewer` must be the viewer that `si.pl.place_by_hand` returned, found {viewer!r}."
        raise TypeError(msg)
    layers = {layer.name: layer for layer in viewer.layers}
    there = "Open the viewer with `si.pl.place_by_hand(sdata, section)`."
    require_key(section, layers, where="the layers of the viewer", then=there)
    image = layers[section]
    require_key("reference", image.metadata, where=f"the metadata of the layer {section!r}", then=there)
    reference = image.metadata["reference"]
    if section == reference:
        msg = f"`section` must not be the reference {section!r}, which does not move. Name the section placed on it."
        raise ValueError(msg)
    require_key(reference, layers, where="the layers of the viewer", then=there)
    points = []
    for name in (section, reference):
        require_key(Keys.landmarks(name), layers, where="the layers of the viewer", then=there)
        points.append(np.asarray(layers[Keys.landmarks(name)].data, float).reshape(-1, 2)[:, ::-1])
    in_section, in_reference = points
    if len(in_section) == len(in_reference) == 0:
        # The viewer may have more dimensions. The user may have dragged the reference instead.
        affines = (np.asarray(layer.affine.affine_matrix, float)[-3:, -3:] for layer in (layers[reference], image))
        below, place = map(exchanged_axes, affines)
        return np.linalg.inv(below) @ place
    if len(in_section) != len(in_reference) or len(in_section) < 2:
        msg = (
            f"Expected the same number of landmarks, at least two, in the layers {Keys.landmarks(section)!r} and "
            f"{Keys.landmarks(reference)!r}, in the same order; found {len(in_section)} and {len(in_reference)}. "
            "Click the missing ones, or delete all of them to use the place of the image."
        )
        raise ValueError(msg)
    return in_section, in_reference


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
    if found.size not in (6, 9) or re.search(r"[A-DF-Za-df-z]", text):
        msg = f"it holds {found.size} numbers."
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
    with_z = any(re.search("(^|[^a-z])z$", name) for name in header) if header else len(numbers) == 6
    if with_z:
        numbers = [*numbers[-6:-4], *numbers[-3:-1]] if len(numbers) >= 6 else []
    wanted = numbers[-4:] if header else numbers
    return wanted if len(wanted) == 4 and np.isfinite(wanted).all() else None


def _require_order(header: list[str], path: Path) -> None:
    """Raise a ``ValueError`` unless the columns stand in the order x, y in the section, x, y in the reference."""
    section, reference, x, y = (
        [i for i, name in enumerate(header) if re.search(pattern, name)]
        for pattern in ("sec|mov|source|src", "ref|fix|target|tgt", "(^|[^a-z])x$", "(^|[^a-z])y$")
    )
    # x, y, x, y; also not x, x, y, y
    turned = x != sorted(x + y)[::2] if len(x) == len(y) else bool(x and y and x[0] > y[0])
    if turned or (section and reference and section[0] > reference[0]):
        msg = (
            f"Expected the columns x, y in the section, then x, y in the reference, found {header} in {str(path)!r}. "
            "Change the order of the columns."
        )
        raise ValueError(msg)


def _trailing_numbers(cells: list[str]) -> list[float]:
    """Numbers at the end of a row, as far as the last cell that is none."""
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
    import ants

    image = ants.image_read(str(path))
    if image.dimension != 2 or image.components != 2 or not np.allclose(image.direction, np.eye(2)):
        msg = (
            f"it has {image.dimension} dimensions, {image.components} values per pixel and the direction "
            f"{image.direction.tolist()}."
        )
        raise ValueError(msg)
    size, first = np.array(image.spacing), np.array(image.origin)
    shape = np.array(image.shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape)), axis=-1).reshape(-1, 2)
    reference = first + index * size
    section = (reference + image.numpy()[index[:, 0], index[:, 1]]) * units[0]
    reference = reference * units[1]
    matrix = landmark_matrix(section, reference, "affine")
    pull = (apply_affine(section, matrix) - reference).reshape(*shape[::-1], 2).astype(np.float32)
    corner = (first - 0.5 * size) * units[1]
    grid = np.array([[size[0] * units[1], 0, corner[0]], [0, size[1] * units[1], corner[1]], [0, 0, 1.0]])
    push = np.zeros_like(pull)
    for _ in range(_ROUNDS):  # a point that was pushed is pulled to its old place
        back = SectionTransform(np.eye(3), pull, push, grid).inverse(reference + push.reshape(-1, 2))
        push -= (back - reference).reshape(push.shape).astype(np.float32)
    return SectionTransform(matrix, pull, push, grid)


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
    points = first + np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2) * step
    field = (transform.inverse(points) - points).reshape(*shape, 2).astype(np.float32)
    image = ants.from_numpy(field, origin=tuple(first), spacing=(step, step), has_components=True)
    ants.image_write(image, str(path))
