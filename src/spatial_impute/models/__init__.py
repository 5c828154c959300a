"""Models and their parameters."""

from spatial_impute.encoders._encoder import Encoder
from spatial_impute.models._params import AsignParams, PixNetParams
from spatial_impute.models.asign._model import AsignModel
from spatial_impute.models.asign._panels import AsignPanels
from spatial_impute.models.pixnet._model import PixNetModel

__all__ = ["AsignModel", "AsignPanels", "AsignParams", "Encoder", "PixNetModel", "PixNetParams"]
