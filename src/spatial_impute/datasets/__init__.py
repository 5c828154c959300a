"""Data sets: a synthetic stack with known truth, and two real ones."""

from spatial_impute.datasets._her2st import her2st
from spatial_impute.datasets._olfactory_bulb import olfactory_bulb
from spatial_impute.datasets._synthetic import synthetic_stack

__all__ = ["her2st", "olfactory_bulb", "synthetic_stack"]
