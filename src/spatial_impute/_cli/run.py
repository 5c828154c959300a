"""A run from files to a folder with results."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import anndata as ad
import numpy as np
import spatialdata as sd

import spatial_impute as si
from spatial_impute._cli.config import ConfigError, in_words_of_file
from spatial_impute._cli.report import Results, write_report
from spatial_impute._expression import GENE_COLUMNS, looks_like_counts
from spatial_impute._geometry import xy_of
from spatial_impute._image.levels import pixel_edges
from spatial_impute._io.workers import local_workers
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import image_element, section_object
from spatial_impute._stack.record import load_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._cli.config import RunConfig, SectionConfig
    from spatial_impute.models.asign._model import AsignModel
    from spatial_impute.models.asign._panels import AsignPanels

_N_PLOT_GENES = 4
_OF_SECTIONS = (
    "mpp",
    "spot_pitch",
    "fullres_image",
    "bin_size",
    "image_key",
    "shapes_key",
    "table_key",
    "coordinate_system",
)


def check(config: RunConfig) -> None:
    """Open all inputs and choose the genes, as a run does, and write nothing.

    Raises the error that the run would raise when it starts. If there are several, a ``ConfigError`` lists all.
    """
    from spatial_impute._validation import require_device
    from spatial_impute.encoders._encoder import require_encoder_name

    _raise_all(
        [
            lambda: _require_output(config),
            lambda: require_encoder_name(config.encoder),
            lambda: require_device(config.device),
            lambda: _choose_genes(_open_sections(config), config),
        ],
        config,
    )


def _raise_all(steps: Iterable[Callable[[], object]], config: RunConfig) -> None:
    """Take all steps, and raise the error of the only one that fails, or one error that lists those of all."""
    found = []
    for step in steps:
        try:
            step()
        except (OSError, KeyError, TypeError, ValueError) as error:
            found.append(error)
    if len(found) > 1:
        said = [str(e) if isinstance(e, ConfigError) else in_words_of_file(e, config) for e in found]
        raise ConfigError("\n".join(dict.fromkeys(said))) from found[0]
    if found:
        raise found[0]


def run(config: RunConfig) -> Path:
    """Run everything, write data, figures, tables and a report to ``config.output``, and return the path of the report.

    Raises a ``FileExistsError`` if the output folder holds files that no run has written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    started = time.perf_counter()
    figures = _prepare(config)
    sdata = assemble(config)
    with local_workers(config.workers, config.device):
        model, layer, scores = _impute(sdata, config)
    results = Results(
        sdata=sdata,
        scores=scores,
        registration=si.metrics.registration_quality(sdata),
        layer=layer,
        config=asdict(config),
        figures=draw(sdata, plot_genes(sdata, config.plot_genes), figures, layer=layer, model=model, scores=scores),
    )
    _write_data(results, config.output)
    results.seconds = time.perf_counter() - started
    report = write_report(results, config.output)
    logger.info("Wrote %s in %.0f s", report, results.seconds)
    return report


def _impute(sdata: SpatialData, config: RunConfig) -> tuple[AsignModel | AsignPanels | None, str, pd.DataFrame | None]:
    """Take all steps from the registration to the imputation: model, layer with the result, scores of the methods."""
    options: dict[str, Any] = {"device": config.device, "seed": config.seed}
    si.tl.register_stack(sdata, reference=config.reference, method=config.registration, seed=config.seed)
    si.pp.extract_features(sdata, config.encoder, device=config.device, cache_dir=config.output / "features")
    si.tl.build_3d_graph(sdata)
    baselines = [method for method in config.methods if method != Keys.ASIGN]
    for method in baselines:
        si.tl.impute_baseline(sdata, method)
    model, layer = None, Keys.ASIGN if Keys.ASIGN in config.methods else Keys.baseline(baselines[-1])
    if layer == Keys.ASIGN:
        model = si.tl.fit_asign(sdata, model_params=config.asign, **options)
        si.tl.impute_3d(sdata, model, device=config.device)
        model.save(config.output / "asign_model", overwrite=True)
    scores = None if model is None else model.cross_validation
    if config.cross_validate or (config.cross_validate is None and model is None):
        scores = si.tl.cross_validate(sdata, config.methods, model_params=config.asign, **options)
    return model, layer, scores


def assemble(config: RunConfig) -> SpatialData:
    """Stack with spots on every section and genes chosen."""
    sdata = _open_sections(config)
    bare = [section.name for section in load_record(sdata).sections if section.spots is None]
    if bare:
        si.pp.segment_tissue(sdata, sections=bare)
        si.pp.tile_spots(sdata, sections=bare)
    _choose_genes(sdata, config)
    return sdata


def _open_sections(config: RunConfig) -> SpatialData:
    """Stack of the sections as they are in the files; an error has the faults of all of them."""
    try:
        sdata = _open(config, config.sections)
    except (OSError, KeyError, TypeError, ValueError):
        each = config.sections.items()
        _raise_all([partial(_open, config, {name: section}) for name, section in each], config)
        raise
    if not any(found.counts is not None for found in load_record(sdata).sections):
        msg = f"`sections`: none of {list(config.sections)} holds expression; imputation needs a section with counts."
        raise ConfigError(msg)
    _drop_empty_spots(sdata)
    return sdata


def _open(config: RunConfig, given: Mapping[str, SectionConfig]) -> SpatialData:
    """Stack of some of the sections, with counts in ``X``."""
    arguments: dict[str, Any] = {
        key: {name: getattr(section, key) for name, section in given.items() if getattr(section, key) is not None}
        for key in _OF_SECTIONS
    }
    inputs: dict[str, Any] = {}
    for name, section in given.items():
        inputs[name], mpp = _read(name, section)
        if mpp is not None:
            arguments["mpp"][name] = mpp
    heights: dict[str, Any] = {"section_spacing": config.section_spacing}
    if config.section_spacing is None:
        heights = {"z": {name: section.z for name, section in given.items()}}
    reference = config.reference if config.reference in given else None
    sdata = si.pp.assemble_stack(
        inputs, reference=reference, **heights, **{key: value or None for key, value in arguments.items()}
    )
    for found in load_record(sdata).sections:
        chosen = given[found.name]
        if found.counts is not None:
            table = sdata.tables[found.counts]
            if chosen.counts is None:  # an h5ad beside an image came from its layer already
                table = _of_layer(table, chosen.counts_layer, f"sections.{found.name}")
            if not config.log_normalized:  # else checked when genes are chosen
                key = f"sections.{found.name}.{chosen.source if chosen.counts is None else 'counts'}"
                _require_counts(table, chosen.counts_layer, key)
            sdata.tables[found.counts] = table
    return sdata


def _choose_genes(sdata: SpatialData, config: RunConfig) -> None:
    chosen = {"genes": config.genes} if isinstance(config.genes, list) else {"n_top_genes": config.genes}
    si.pp.select_genes(sdata, **chosen, log_normalized=config.log_normalized)


def _layers(table: AnnData) -> list[str]:
    """Names that `counts_layer` may have."""
    return sorted(map(str, table.layers)) + (["raw"] if table.raw is not None else [])


def _of_layer(table: AnnData, layer: str | None, where: str) -> AnnData:
    """Table with a layer, or ``raw``, in ``X``; else an error in terms of the file of the run."""
    if layer is not None and layer not in _layers(table):
        msg = f"`{where}.counts_layer`: there is no layer {layer!r}; found {_layers(table) or 'none'}."
        raise ConfigError(msg)
    if layer == "raw" and "raw" not in table.layers:
        table = table.raw.to_adata()
    elif layer is not None:
        table = table.copy()
        table.X = table.layers[layer]
    return table


def _require_counts(table: AnnData, layer: str | None, key: str) -> None:
    """Raise an error in terms of the file of the run if ``X``, which came from `layer`, holds no raw counts."""
    values: Any = np.empty(0) if table.X is None else table.X
    sample = values.data if hasattr(values, "tocsr") else np.asarray(values)
    if sample.size and looks_like_counts(sample):
        return
    what = f"holds {sample.min():.3g} to {sample.max():.3g}, not all whole numbers" if sample.size else "is empty"
    slot = "X" if layer is None else f"layer {layer!r}"
    others = [name for name in _layers(table) if name != layer]
    hint = (
        f"If one of {others} holds them, add `{key.rpartition('.')[0]}.counts_layer: {others[0]}`."
        if others
        else "Give a file with raw counts; if all sections hold log-normalised values, add `log_normalized: true`."
    )
    msg = f"`{key}`: raw counts are needed (whole numbers from 0), but {slot} {what}. {hint}"
    raise ConfigError(msg)


def _read(name: str, section: SectionConfig) -> tuple[Any, float | None]:
    """Input of ``assemble_stack`` for one section, and its pixel size where that was read here."""
    if section.counts is not None:
        return _spots_on_image(name, section)
    if section.source == "spatialdata":
        return sd.read_zarr(section.path), None
    return str(section.path), None


def _drop_empty_spots(sdata: SpatialData) -> None:
    """Drop spots without a single count, which Space Ranger keeps: a run cannot ask its user about them."""
    for section in load_record(sdata).sections:
        table = None if section.counts is None else sdata.tables[section.counts]
        if table is None or table.X is None:
            continue
        counted = np.ravel(table.X.sum(axis=1)) != 0
        if counted.any() and not counted.all():
            logger.warning(
                "Section %s: %d spots without a single count are taken as not measured", section.name, (~counted).sum()
            )
            sdata.tables[section.counts] = table[counted].copy()


def _spots_on_image(name: str, section: SectionConfig) -> tuple[SpatialData, float]:
    """Image file and AnnData with pixel coordinates as one object, and um per pixel."""
    from spatial_impute._image.reading import open_image

    opened = open_image(section.path)
    edges = pixel_edges(name, opened.pixel_size, section.mpp)
    if edges is None:
        msg = f"`sections.{name}.mpp` is missing, and '{section.path}' does not say how large its pixels are."
        raise ConfigError(msg)
    try:
        table = ad.read_h5ad(section.counts)
    except Exception as error:
        msg = f"`sections.{name}.counts`: '{section.counts}' cannot be read as h5ad: {error}"
        raise ConfigError(msg) from error
    places = table.obsm.get(Keys.SPATIAL)
    if np.ndim(places) != 2 or np.shape(places)[1] < 2:
        msg = f"`sections.{name}.counts`: '{section.counts}' has no `obsm[{Keys.SPATIAL!r}]`, x and y in pixels."
        raise ConfigError(msg)
    if not table.obs_names.is_unique:
        repeated = table.obs_names[table.obs_names.duplicated()][0]
        msg = (
            f"`sections.{name}.counts`: the spot {repeated!r} stands twice in '{section.counts}'; spots need names of "
            "their own."
        )
        raise ConfigError(msg)
    table = _of_layer(table, section.counts_layer, f"sections.{name}")
    mpp = float(np.sqrt(np.prod(edges)))
    centers, pixel = xy_of(places), np.array(edges) / mpp  # may be rectangular
    height, width = opened.levels[0].shape[1:]
    outside = ((centers < 0) | (centers > [width, height])).any(axis=1) | ~np.isfinite(centers).all(axis=1)
    if outside.any():
        msg = (
            f"`sections.{name}.counts`: {int(outside.sum())} of {len(centers)} spots lie outside the image of "
            f"{width} x {height} pixels; `obsm[{Keys.SPATIAL!r}]` must hold x and y in its pixels."
        )
        raise ConfigError(msg)
    uns = {key: mark for key, mark in table.uns.items() if key == "log1p" and section.counts_layer is None}
    found = section_object(
        name,
        image_element(opened.levels, "global", tuple(pixel)),
        centers=centers * pixel,
        radius=cast("float", section.spot_diameter) / 2 / mpp,
        ids=[str(spot) for spot in table.obs_names],
        table=ad.AnnData(
            X=table.X, obs=table.obs.filter([Keys.IN_TISSUE]), var=table.var.filter(GENE_COLUMNS), uns=uns
        ),
    )
    return found, mpp


def _prepare(config: RunConfig) -> Path:
    """Make the folder of figures; only the files of an earlier run are replaced."""
    _require_output(config)
    output = config.output
    figures = output / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    (output / "run.json").touch()
    return figures


def _require_output(config: RunConfig) -> None:
    """Raise an error if the output may not be replaced, or holds an input of the run."""
    require_own_folder(config.output)
    for name, section in config.sections.items():
        for key in (section.source, "counts", "fullres_image"):
            path = getattr(section, key)
            if path is not None and path.resolve().is_relative_to(config.output.resolve()):
                msg = (
                    f"`sections.{name}.{key}`: '{path}' lies in the output of this run, '{config.output}', whose files are replaced. "
                    "Give another `output`."
                )
                raise ConfigError(msg)


def require_own_folder(output: Path) -> None:
    """Raise an error unless the folder is new, empty, or that of an earlier run, whose files may be replaced."""
    if output.exists() and not output.is_dir():
        msg = f"`output`: '{output}' is a file; give a folder."
        raise ConfigError(msg)
    if output.exists() and any(output.iterdir()) and not (output / "run.json").exists():
        msg = f"'{output}' holds files that no run has written. Give another `output`, or empty the folder."
        raise FileExistsError(msg)
    there = next(path for path in (output, *output.parents) if path.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        msg = f"`output`: '{output}' cannot be written, because '{there}' is no folder that you may write to."
        raise ConfigError(msg)


def plot_genes(sdata: SpatialData, wanted: list[str] | None) -> list[str]:
    """Genes to draw: the wanted ones that are in the table, else the most predictable, else the first."""
    table, wanted = sdata.tables[Keys.STACK_TABLE], wanted or []
    if missing := [gene for gene in wanted if gene not in table.var_names]:
        logger.warning("`plot_genes`: %s are not among the genes of the run and are not drawn", missing)
    if found := [gene for gene in wanted if gene in table.var_names]:
        return found
    if Keys.PREDICTABILITY in table.var:
        return list(table.var[Keys.PREDICTABILITY].nlargest(_N_PLOT_GENES).index)
    return list(table.var_names[:_N_PLOT_GENES])


def draw(
    sdata: SpatialData, genes: list[str], folder: Path, *, layer: str, model: Any, scores: pd.DataFrame | None
) -> dict[str, str]:
    """Draw the figures; file names and captions."""
    from matplotlib import pyplot as plt

    drawn = {
        "stack.png": ("The sections and their spots", lambda p: si.pl.stack(sdata, save=p)),
        "registration.png": ("Sections on the reference", lambda p: si.pl.registration(sdata, save=p)),
        "imputed.png": (
            "Expression of some genes on all sections. The framed section shows its measurement",
            lambda p: si.pl.imputed(sdata, genes, layer=layer, save=p),
        ),
        "volume.png": ("Slices through the stack", lambda p: si.pl.volume(sdata, genes, layer=layer, save=p)),
        "genes.png": (
            "Genes by section, the best predicted on top",
            lambda p: si.pl.gene_overview(sdata, layer=layer, save=p),
        ),
        "graph.png": ("Edges of the 3D graph", lambda p: si.pl.graph_3d(sdata, save=p)),
    }
    if scores is not None:
        drawn["scores.png"] = ("Methods on held-out spots", lambda p: si.pl.metrics(sdata, scores, save=p))
    if model is not None:
        drawn["training.png"] = ("Training of the networks", lambda p: si.pl.training(model, save=p))
    if Keys.PREDICTABILITY not in sdata.tables[Keys.STACK_TABLE].var:
        del drawn["genes.png"]
    for name, (_, plot) in drawn.items():
        plot(folder / name)
        plt.close("all")
    return {name: text for name, (text, _) in drawn.items()}


def _write_data(results: Results, output: Path) -> None:
    table = results.sdata.tables[Keys.STACK_TABLE]
    table.write_h5ad(output / "imputed.h5ad")
    results.registration.to_csv(output / "registration.csv")
    if results.scores is not None:
        results.scores.to_csv(output / "scores.csv")
    if Keys.PREDICTABILITY in table.var:
        columns = [key for key in (Keys.PREDICTABILITY, Keys.PREDICTABLE) if key in table.var]
        table.var[columns].sort_values(Keys.PREDICTABILITY, ascending=False).to_csv(output / "genes.csv")
    save_stack(results.sdata, output / "stack.zarr")


def save_stack(sdata: SpatialData, store: Path) -> None:
    """Write the object in place of an earlier one at `store`."""
    if store.exists():
        shutil.rmtree(store)
    with warnings.catch_warnings():
        # zarr warns once per chunked array of changes to come in zarr itself.
        warnings.filterwarnings("ignore", message="Consolidated metadata|zarr v3 autosharding")
        sdata.write(store)
