"""Plots of stacks, registrations and imputations."""

from spatial_impute.pl._imputed import imputed
from spatial_impute.pl._registration import registration
from spatial_impute.pl._stack import stack

__all__ = ["imputed", "registration", "stack"]
