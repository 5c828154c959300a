"""Command line: ``python -m spatial_impute demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m spatial_impute", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="impute a real stack of sections (or a synthetic one) from start to end")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write to")
    demo.add_argument(
        "--data", choices=["auto", "her2st", "synthetic"], default="auto", help="her2st where it can be had, by default"
    )
    options = parser.parse_args(arguments)

    from spatial_impute._demo import run_demo

    run_demo(options.output, data=options.data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
