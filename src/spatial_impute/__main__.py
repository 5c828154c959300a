"""Command line: ``python -m spatial_impute demo``, ``run`` and ``info``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spatial_impute", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="impute a real stack of sections (or a synthetic one) from start to end")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write to")
    demo.add_argument(
        "--data", choices=["auto", "her2st", "synthetic"], default="auto", help="her2st where it can be had, by default"
    )
    run = commands.add_parser("run", help="impute your own sections, described by a YAML or TOML file")
    run.add_argument("config", type=Path, nargs="?", help="the file; --example prints one")
    run.add_argument("--output", type=Path, help="folder to write to, instead of that of the file")
    run.add_argument("--check", action="store_true", help="check the file and that its inputs exist, then stop")
    run.add_argument("--example", action="store_true", help="print a file to start from")
    commands.add_parser("info", help="print versions, devices, caches and data")
    options = parser.parse_args(arguments)

    if options.command == "demo":
        from spatial_impute._cli.demo import run_demo

        run_demo(options.output, data=options.data)
        return 0
    if options.command == "info":
        from spatial_impute._cli.info import info

        print(info())
        return 0
    return _run(run, options)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from dataclasses import replace

    from spatial_impute._cli.config import EXAMPLE, ConfigError, read_config

    if options.example:
        print(EXAMPLE, end="")
        return 0
    if options.config is None:
        parser.error("name the file of the run, or print one with --example")
    try:
        config = read_config(options.config)
        if options.output is not None:
            config = replace(config, output=options.output)
        if options.check:
            print(f"{options.config}: {len(config.sections)} sections, output to {config.output}")
            return 0
        import spatial_impute as si
        from spatial_impute._cli.run import run

        before = si.settings.show_progress_bar
        si.settings.show_progress_bar = before and sys.stderr.isatty()  # a bar fills the log of a batch job
        try:
            print(run(config))
        finally:
            si.settings.show_progress_bar = before
    except (ConfigError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
