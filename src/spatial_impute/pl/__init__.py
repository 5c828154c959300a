"""Plots of stacks, registrations, imputations and dense maps."""

from spatial_impute.pl._dense import dense
from spatial_impute.pl._imputed import imputed
from spatial_impute.pl._registration import registration
from spatial_impute.pl._stack import stack

__all__ = ["dense", "imputed", "registration", "stack"]
