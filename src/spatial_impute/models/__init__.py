"""Models and their parameters."""

from spatial_impute.models._asign import AsignModel
from spatial_impute.models._encoders import Encoder
from spatial_impute.models._params import AsignParams, PixNetParams
from spatial_impute.models._pixnet import PixNetModel

__all__ = ["AsignModel", "AsignParams", "Encoder", "PixNetModel", "PixNetParams"]
