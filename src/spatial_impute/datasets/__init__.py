"""Data sets: a synthetic stack with known truth, and a real one."""

from spatial_impute.datasets._her2st import her2st
from spatial_impute.datasets._synthetic import synthetic_stack

__all__ = ["her2st", "synthetic_stack"]
