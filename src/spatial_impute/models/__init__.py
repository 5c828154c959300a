"""Models and their parameters."""

from spatial_impute.models._asign import AsignModel
from spatial_impute.models._encoders import Encoder
from spatial_impute.models._params import AsignParams

__all__ = ["AsignModel", "AsignParams", "Encoder"]
