"""Models and their parameters."""

from spatial_impute.models._asign import AsignModel
from spatial_impute.models._encoders import Encoder
from spatial_impute.models._panels import AsignPanels
from spatial_impute.models._params import AsignParams, PixNetParams
from spatial_impute.models._pixnet import PixNetModel

__all__ = ["AsignModel", "AsignPanels", "AsignParams", "Encoder", "PixNetModel", "PixNetParams"]
