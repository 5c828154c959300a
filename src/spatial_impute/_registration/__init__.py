"""Registration of section images: arrays in, transforms out. Only ``_elements`` knows SpatialData."""

from __future__ import annotations

from spatial_impute._registration._align import deform_stack
from spatial_impute._registration._chain import ChainResult, chain_to_reference, warp_along_path
from spatial_impute._registration._field import DisplacementField
from spatial_impute._registration._pair import register_pair
from spatial_impute._registration._parallel import run_all
from spatial_impute._registration._stack_pairs import register_chain
from spatial_impute._registration._transform import SectionTransform
from spatial_impute._registration._types import PairResult, RegistrationParams, SectionImage

__all__ = [
    "ChainResult",
    "DisplacementField",
    "PairResult",
    "RegistrationParams",
    "SectionImage",
    "SectionTransform",
    "chain_to_reference",
    "deform_stack",
    "register_chain",
    "register_pair",
    "run_all",
    "warp_along_path",
]
