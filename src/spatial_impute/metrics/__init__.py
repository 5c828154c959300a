"""Scores of imputations and of registrations."""

from spatial_impute.metrics._evaluate import evaluate, predictability
from spatial_impute.metrics._registration_quality import registration_quality

__all__ = ["evaluate", "predictability", "registration_quality"]
