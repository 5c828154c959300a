"""Command line: a run described by a file, a report, and what is installed. Thin over the public functions."""
