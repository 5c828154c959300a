"""Registration of section images: arrays in, transforms out. Nothing here knows SpatialData."""

from __future__ import annotations

from spatial_impute._registration._chain import ChainResult, chain_to_reference, warp_along_path
from spatial_impute._registration._field import DisplacementField
from spatial_impute._registration._pair import register_pair
from spatial_impute._registration._types import PairResult, RegistrationParams, SectionImage

__all__ = [
    "ChainResult",
    "DisplacementField",
    "PairResult",
    "RegistrationParams",
    "SectionImage",
    "chain_to_reference",
    "register_pair",
    "warp_along_path",
]
