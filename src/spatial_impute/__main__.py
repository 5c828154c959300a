"""Command line: ``python -m spatial_impute demo``, ``run`` and ``info``."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import spatial_impute as si
from spatial_impute._keys import Keys
from spatial_impute._settings import logger, settings

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

_PACKAGES = [
    "anndata",
    "spatialdata",
    "scanpy",
    "squidpy",
    "torch",
    "torch-geometric",
    "antspyx",
    "dask",
    "zarr",
    "numpy",
]
_EXTRAS = {"plot": ["spatialdata-plot"], "interactive": ["plotly"], "encoders": ["timm", "transformers"]}
_BASELINES = ("mean", "nearest", "knn", "kernel", "propagation", "ridge", "cokriging")
_HEADLINE = ["pearson_gene", "pearson_gene_median", "pearson_gene_positive", "mse", "mae", "skill", "pearson_spot"]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spatial_impute", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="impute a real stack of sections (or a synthetic one) from start to end")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write to")
    demo.add_argument(
        "--data", choices=["auto", "her2st", "synthetic"], default="auto", help="her2st if available, by default"
    )
    run = commands.add_parser("run", help="impute your own sections, described by a YAML or TOML file")
    run.add_argument("config", type=Path, nargs="?", help="the file; --example prints one")
    run.add_argument("--output", type=Path, help="folder to write to, instead of that of the file")
    run.add_argument("--check", action="store_true", help="open all inputs as a run does, then stop")
    run.add_argument("--example", action="store_true", help="print a file to start from")
    commands.add_parser("info", help="print versions, devices, caches and data")
    options = parser.parse_args(arguments)

    if options.command == "demo":
        return _demo(options)
    if options.command == "info":
        print(info())
        return 0
    return _run(run, options)


def _demo(options: argparse.Namespace) -> int:
    from spatial_impute._cli.config import ConfigError

    try:
        run_demo(options.output, data=options.data)
    except (ConfigError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from dataclasses import replace

    from spatial_impute._cli.config import EXAMPLE, ConfigError, in_words_of_file, read_config

    if options.example:
        print(EXAMPLE, end="")
        return 0
    if options.config is None:
        parser.error("name the file of the run, or print one with --example")
    try:
        config = read_config(options.config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output is not None:
        config = replace(config, output=options.output)
    from spatial_impute._cli.run import check, run

    def reword(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            record.msg, record.args = in_words_of_file(record.getMessage(), config), ()
        return True

    before = settings._log_progress
    logger.addFilter(reword)
    settings._log_progress = settings.show_progress_bar and not sys.stderr.isatty()
    try:
        if options.check:
            check(config)
            print(f"{options.config}: {len(config.sections)} sections, output to {config.output}")
        else:
            print(run(config))
    except (ConfigError, FileExistsError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except Exception as error:
        if not _is_about_inputs(error):
            raise
        print(f"error: {in_words_of_file(error, config)}", file=sys.stderr)
        return 2
    finally:
        settings._log_progress = before
        logger.removeFilter(reword)
    return 0


def _is_about_inputs(error: Exception) -> bool:
    """True for errors of the operating system, and for those that the package raises on purpose."""
    import traceback

    if isinstance(error, OSError | MemoryError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(str(Path(__file__).parent)) and str(last.line).startswith("raise ")


def run_demo(output: Path, *, data: str = "auto") -> pd.DataFrame:
    """Run all steps, write figures, data and scores to a folder, and return the scores on the unmeasured sections.

    The files of an earlier demo are replaced. `data` is ``"her2st"``, ``"synthetic"``, or ``"auto"`` for HER2ST if it
    is in the cache or can be downloaded.
    """
    import matplotlib as mpl

    from spatial_impute._cli.run import draw, require_own_folder, save_stack
    from spatial_impute._io.workers import local_workers

    mpl.use("Agg")
    start = time.perf_counter()
    require_own_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.json").touch()
    sdata, truth, genes = _demo_stack(data)
    with local_workers():
        si.tl.register_stack(sdata)
        si.pp.extract_features(sdata)
        si.tl.build_3d_graph(sdata)
        for method in _BASELINES:
            si.tl.impute_baseline(sdata, method)
        model = si.tl.fit_asign(sdata)
    si.tl.impute_3d(sdata, model)
    scores = si.metrics.evaluate(sdata, truth)

    by_gene = si.metrics.evaluate(sdata, truth, by="gene")
    figures = draw(sdata, genes, output, layer=Keys.ASIGN, model=model, scores=by_gene)
    scores.to_csv(output / "scores.csv")
    model.save(output / "asign_model", overwrite=True)
    sdata.tables[Keys.STACK_TABLE].write_h5ad(output / "imputed.h5ad")
    save_stack(sdata, output / "stack.zarr")

    logger.info("Scores on unmeasured sections (mean over sections):\n%s", scores[_HEADLINE].round(3).to_string())
    contents = figures | {
        "scores.png": "the methods against the measured truth, and the expected r of each gene",
        "scores.csv": "scores of the baselines and of ASIGN against the measured truth",
        "imputed.h5ad": "the stack table: layers, coordinates, graph",
        "stack.zarr": "the whole SpatialData object",
        "asign_model": "the fitted model",
        "run.json": "the sign that the files of this folder may be replaced",
    }
    lines = [f"  {output / name}: {what}" for name, what in contents.items()]
    logger.info("Wrote in %.0f s:\n%s", time.perf_counter() - start, "\n".join(lines))
    return scores


def _demo_stack(data: str) -> tuple[SpatialData, AnnData, list[str]]:
    """The stack, its truth, and genes to draw."""
    if data in ("auto", "her2st"):
        try:
            sdata, truth = si.datasets.her2st("C", measured=["C4"], truth=True)
        except OSError as error:  # no cache and no network; requests' errors are OSErrors
            if data == "her2st":
                raise
            logger.warning("HER2ST is not available (%s); using the synthetic stack.", error)
        else:
            logger.info("Data: HER2ST, patient C, five sections, C4 measured (files in %s)", si.settings.data_dir)
            genes = [gene for gene in ("ERBB2", "MDK") if gene in sdata.tables[Keys.STACK_TABLE].var_names]
            return sdata, truth, genes or list(sdata.tables[Keys.STACK_TABLE].var_names[:2])
    logger.info("Data: synthetic stack of three sections, the middle one measured")
    sdata, truth = si.datasets.synthetic_stack(truth=True)
    kinds = truth.var["kind"]
    return sdata, truth, [kinds.index[kinds == kind][0] for kind in ("smooth", "texture")]


def info() -> str:
    """Versions, devices, caches and data; for users and for bug reports."""
    import torch

    lines = [f"spatial-impute {version('spatial-impute')}", ""]
    lines += [f"python         {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:<14} {_version(name) or 'MISSING'}" for name in _PACKAGES]
    lines += ["", "extras"]
    for extra, names in _EXTRAS.items():
        found = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in names)
        lines.append(f"  {extra:<12} {found}")
    threads = f"CPU threads    {torch.get_num_threads()} of {os.cpu_count()} cores"
    lines += ["", f"device         {settings.device}", threads]
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        lines.append(f"  cuda:{k}       {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    lines += ["", f"data folder    {settings.data_dir}"]
    if not settings.data_dir.is_dir():
        lines.append("  does not exist yet; the first download makes it")
        return "\n".join(lines)
    for entry in sorted(path for path in settings.data_dir.iterdir() if path.is_dir()):
        files = [path for path in entry.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 2**20
        lines.append(f"  {entry.name:<12} {len(files)} files, {size:.1f} MiB")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
