"""PixNet on measured spots that it has not seen, and the spots that a cross-validation holds out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from spatial_impute._keys import Keys
from spatial_impute._settings import logger, progress_steps
from spatial_impute._stack.elements import rows_of_spots, section_images, section_levels, spots_by_section
from spatial_impute._stack.record import load_record
from spatial_impute._stack.spots import read_spots
from spatial_impute._stack.state import table_state
from spatial_impute._stack.table import measured_ids
from spatial_impute._validation import require_count, require_device, require_positive, require_slot_key, resolve_params
from spatial_impute.tl._fit_pixnet import Pair, PixNetSetup, fit_on_regions, read_pairs
from spatial_impute.tl._provenance import ImputedLayer, measured_hash
from spatial_impute.tl._read_regions import ExpressionChoice, find_frame, read_levels, read_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData
    from torch import nn

    from spatial_impute._stack.record import Section
    from spatial_impute.models import PixNetModel, PixNetParams
    from spatial_impute.models._spots import Spots

_OVERLAP = 0.98  # of the sum of two radii: spots that touch do not overlap, except for rounding


def impute_pixnet(
    sdata: SpatialData,
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    encoder: str | nn.Module = "texture",
    model_params: PixNetParams | Mapping[str, Any] | None = None,
    n_folds: int = 5,
    block_spacings: float = 2.0,
    tile_size: int = 1024,
    device: str | None = None,
    seed: int = 0,
    key_added: str = Keys.PIXNET,
    show_progress_bar: bool | None = None,
) -> None:
    """Predict every spot of a stack from the image with PixNet, each by a model that has not seen its measurement.

    A model fitted on all measured spots predicts the spots that were not measured. Measured spots are split into folds,
    and a model fitted on the other folds predicts each fold. The result can be compared with the measurement.
    :func:`fit_asign` can use it as a further base (``base_layers=["pixnet"]``) and weighs it by its scores on these
    folds.

    Parameters
    ----------
    sdata
        Registered stack.
    table_key
        Name of the stack table.
    layer
        Layer with log-normalised expression.
    encoder
        Encoder of PixNet; see :func:`fit_pixnet`.
    model_params
        Advanced settings of PixNet; see :class:`~spatial_impute.models.PixNetParams`.
    n_folds
        Number of folds if one section is measured. If several are measured, each section is a fold. For a base of
        ASIGN, `n_folds`, `block_spacings` and `seed` must be those of the later :func:`fit_asign` call.
    block_spacings
        Edge of a block in spot spacings: the folds of a single section consist of square blocks.
    tile_size
        Edge of a tile in px, for whole slides.
    device
        Torch device; ``settings.device`` by default.
    seed
        Seed of the folds and of the models.
    key_added
        Layer to write.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``. Writes to `sdata.tables['stack']`:

    `.layers['pixnet']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) predictions in the units of `layer`, also at measured spots. A spot without a pixel on its
        image gets the mean profile.
    `.X`, `.uns['X_layer']`
        A copy of the layer, and its name, for functions of scanpy and squidpy without ``layer``.
    `.obs['pixnet_fold']` : (``int64``)
        Fold of each measured spot; -1 for the others.
    `.uns['pixnet']` : :class:`dict`
        ``encoder``, ``n_folds``, ``block_spacings``, ``seed``, ``measured`` (hash of the expression), ``version``.

    Raises
    ------
    KeyError
        If the stack is not registered, or if the table or layer does not exist.
    ValueError
        If nothing is measured, or if values are raw counts or not finite.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata)
    >>> params = {"n_steps": 0, "resolution": 8.0, "crop": 64}
    >>> si.tl.impute_pixnet(sdata, model_params=params, n_folds=2)
    >>> sorted(int(k) for k in sdata.tables["stack"].obs["pixnet_fold"].unique())
    [-1, 0, 1]
    >>> si.settings.show_progress_bar = True
    """
    from spatial_impute.encoders._pyramids import build_pyramid
    from spatial_impute.models._params import PixNetParams
    from spatial_impute.models._spots import spatial_folds

    params = resolve_params(model_params, PixNetParams)
    if params.loss != "mse+pcc":
        msg = f"A stack holds log values, but the loss {params.loss!r} of `model_params` is for counts. Use 'mse+pcc'."
        raise ValueError(msg)
    n_folds, seed = require_count(n_folds, name="n_folds", least=2), require_count(seed, name="seed", least=0)
    tile_size, device = require_count(tile_size, name="tile_size"), require_device(device)
    block_spacings = require_positive(block_spacings, name="block_spacings")
    require_slot_key(key_added, name="key_added", taken=(layer, *Keys.NO_RESULT))
    record = load_record(sdata)
    table, spots = read_spots(sdata, table_key=table_key, layer=layer, features=False, graph=False)
    folds = spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    setup = PixNetSetup(build_pyramid(encoder, window=params.encoder_window), params, tile_size, device, seed)
    sections = section_spots(sdata, table, table_key=table_key, layer=layer)
    with progress_steps("Imputing with PixNet", show=show_progress_bar) as steps:
        on_fold = steps(len(folds) + 1)
        values = predict_pixnet(sections, spots.known, folds, setup, on_fold)
        model = _fit_on(sections, spots.known, setup)
        values[~spots.known] = _predict_spots(sections, ~spots.known, model, setup)[~spots.known]
        on_fold()
    values[np.isnan(values).any(axis=1)] = spots.expression.mean(axis=0)
    fold = np.full(table.n_obs, -1, dtype=np.int64)
    for k, rows in enumerate(folds):
        fold[rows] = k
    origin = {
        "encoder": model.config["encoder"],
        "n_folds": int(n_folds),
        "block_spacings": float(block_spacings),
        "seed": int(seed),
        "measured": measured_hash(spots),
        Keys.MEASURED_IDS: measured_ids(table),
        Keys.STATE: {**table_state(table, record, layer=layer), "images": section_images(sdata, record)},
        "version": version("spatial-impute"),
    }
    result = ImputedLayer(key_added, values.astype(np.float32), origin, obs={Keys.fold(key_added): fold})
    result.write(table, table_key)


@dataclass(frozen=True)
class SectionSpots:
    """Image and spots of one section."""

    pair: Pair
    layer: str
    rows: np.ndarray
    """(n_shapes,) position of each shape among the spots of all stacks; -1 for shapes that are not in the table."""


def section_spots(
    sdata: SpatialData, table: AnnData, *, table_key: str, layer: str, first: int = 0
) -> list[SectionSpots]:
    """Sections with spots. Rows are counted from `first`."""
    found = []
    for section in load_record(sdata).sections:
        if section.spots is not None:
            rows = rows_of_spots(table, section.name, sdata.shapes[section.spots].index)
            pair = Pair(sdata, section.image, section.spots, table_key)
            found.append(SectionSpots(pair, layer, np.where(rows >= 0, first + rows, -1)))
    return found


def predict_pixnet(
    sections: Sequence[SectionSpots],
    known: np.ndarray,
    folds: Sequence[np.ndarray],
    setup: PixNetSetup,
    on_fold: Callable[[], None],
) -> np.ndarray:
    """(n, n_genes): each fold by a model fitted on the known spots of the others; NaN for spots in no fold."""
    result = np.empty((0, 0))
    for fold in folds:
        model = _fit_on(sections, known & ~fold, setup)
        found = _predict_spots(sections, fold, model, setup)
        result = result if result.size else found
        result[fold] = found[fold]
        on_fold()
    return result


def _fit_on(sections: Sequence[SectionSpots], rows: np.ndarray, setup: PixNetSetup) -> PixNetModel:
    """Model fitted on the spots at these positions, (n,) bool."""
    known = [(s.rows >= 0) & rows[s.rows] for s in sections]
    used = [(s.pair, k) for s, k in zip(sections, known, strict=True) if k.any()]
    pairs, known = [pair for pair, _ in used], [k for _, k in used]
    read = read_pairs(pairs, ExpressionChoice(sections[0].layer), known=known)
    return fit_on_regions(read, setup, lambda _total: lambda: None)


def _predict_spots(
    sections: Sequence[SectionSpots], rows: np.ndarray, model: PixNetModel, setup: PixNetSetup
) -> np.ndarray:
    """(n, n_genes) values at the spots at these positions, (n,) bool; NaN elsewhere and off the images."""
    from spatial_impute._image.resampling import slide_overview

    result = np.full((len(rows), len(model.var_names)), np.nan)
    model.network.to(setup.device)
    for section in sections:
        wanted = np.flatnonzero((section.rows >= 0) & rows[section.rows])
        if not len(wanted):
            continue
        sdata, image_key, shapes_key, _ = section.pair
        frame = find_frame(sdata, image_key, shapes_key)
        regions, _ = read_shapes(sdata, shapes_key, frame)
        levels = read_levels(sdata, image_key, frame)
        slide = model._slide(levels, slide_overview(levels), setup.tile_size)
        in_px = regions.take(wanted).moved(slide.image.from_um)
        result[section.rows[wanted]], _ = model._read_regions(slide, in_px, model.gene_index(None))
    return result


@dataclass(frozen=True)
class HeldOut:
    """Spots of all stacks, and the masks of the spots that are held out together."""

    stacks: list[SpatialData]
    tables: list[AnnData]
    by_stack: list[Spots]
    spots: Spots  # Of all stacks, as the methods need them that use the image alone
    folds: list[np.ndarray]
    table_key: str
    layer: str

    def without(self, fold: np.ndarray) -> list[Spots]:
        """Stacks whose spots of the fold are hidden."""
        ends = np.cumsum([len(spots.known) for spots in self.by_stack])[:-1]
        return [spots.hide(own) for spots, own in zip(self.by_stack, np.split(fold, ends), strict=True)]

    @property
    def genes(self) -> list[str]:
        return list(self.tables[0].var_names)

    @property
    def truth(self) -> np.ndarray:
        """(n, n_genes); NaN where nothing was measured."""
        truth = np.full((len(self.spots.known), self.spots.expression.shape[1]), np.nan)
        truth[self.spots.known] = self.spots.expression
        return truth

    @property
    def first_rows(self) -> list[int]:
        """Position of the first spot of each stack."""
        return np.cumsum([0, *(table.n_obs for table in self.tables[:-1])]).tolist()

    @property
    def fold_of_spot(self) -> np.ndarray:
        """(n,) fold of each spot; -1 for spots in no fold."""
        inside = np.stack(self.folds)
        return np.where(inside.any(axis=0), inside.argmax(axis=0), -1)

    def sections(self) -> Iterator[tuple[SpatialData, Section, np.ndarray, np.ndarray, np.ndarray]]:
        """Stack and section, (n, 2) centers and (n,) radius of its spots in its frame, um, and their (n,) positions."""
        for sdata, table, first in zip(self.stacks, self.tables, self.first_rows, strict=True):
            for section, centers, radius, rows in spots_by_section(sdata, load_record(sdata), table):
                yield sdata, section, centers, radius, first + rows

    def pixnet_sections(self) -> list[SectionSpots]:
        """Sections with spots, as PixNet reads them."""
        options = {"table_key": self.table_key, "layer": self.layer}
        each = zip(self.stacks, self.tables, self.first_rows, strict=True)
        return [s for sdata, table, first in each for s in section_spots(sdata, table, first=first, **options)]

    def parts(self) -> list[np.ndarray]:
        """(n,) mask of the measured spots of each section."""
        section, known = self.spots.section, self.spots.known
        return [known & (section == code) for code in np.unique(section[known])]


def warn_of_shared_groups(data: HeldOut, group: pd.Series) -> None:
    """Warn if measured spots of one group (patient, block of tissue) are both held out and learned from."""
    shared = set()
    for fold in data.folds:
        shared |= set(group[fold]) & set(group[data.spots.known & ~fold])
    if shared:
        logger.warning(
            "Folds share %d of the groups of %r, e.g. %s: the scores are for more tissue of known groups, not for new "
            'groups. Use `split="group"` for new groups.',
            len(shared),
            group.name,
            sorted(map(str, shared))[:3],
        )


def warn_of_overlapping_spots(data: HeldOut) -> None:
    """Warn if held-out spots share tissue with spots that are learned from."""
    known = data.spots.known
    found = np.zeros(len(known), bool)
    for _, _, centers, radius, rows in data.sections():
        for fold in data.folds:
            held, rest = np.flatnonzero(fold[rows]), np.flatnonzero((known & ~fold)[rows])
            if not len(held) or not len(rest):
                continue
            reach = radius[held].max() + radius[rest].max()
            tree, others = cKDTree(centers[held]), cKDTree(centers[rest])
            near = tree.sparse_distance_matrix(others, reach, output_type="coo_matrix")
            overlap = near.data < _OVERLAP * (radius[held[near.row]] + radius[rest[near.col]])
            found[rows[held[near.row[overlap]]]] = True
    if found.any():
        logger.warning(
            "%d of %d held-out spots overlap spots that methods learn from: the scores are too high. Hold out whole "
            'sections (`split="section"`), or remove some of the spots.',
            int(found.sum()),
            int(np.any(data.folds, axis=0).sum()),
        )


def warn_of_equal_images(data: HeldOut) -> None:
    """Warn if two measured sections have the same image and are not held out together."""
    from spatial_impute._image.levels import image_fingerprint

    names, identity, apart = [], [], []
    for sdata, section, _, _, rows in data.sections():
        if data.spots.known[rows].any():
            names.append(section.name)
            identity.append(image_fingerprint(section_levels(sdata, section)))
            apart.append(tuple(bool((fold & data.spots.known)[rows].any()) for fold in data.folds))
    for a, b in combinations(range(len(names)), 2):
        if identity[a] == identity[b] and (apart[a] != apart[b] or sum(apart[a]) > 1):
            logger.warning(
                "Sections %r and %r have the same image and are not held out together: the scores are too high. Remove "
                "one of them.",
                names[a],
                names[b],
            )
