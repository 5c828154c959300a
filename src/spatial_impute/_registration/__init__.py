"""Registration of section images: arrays in, transforms out. Only ``elements`` knows SpatialData."""

from __future__ import annotations

from spatial_impute._registration.chain import ChainResult, chain_to_reference, warp_along_path
from spatial_impute._registration.deform_stack import deform_stack
from spatial_impute._registration.displacement import DisplacementField
from spatial_impute._registration.pair import register_pair
from spatial_impute._registration.parallel import run_all
from spatial_impute._registration.stack_pairs import register_chain
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._registration.types import PairResult, RegistrationParams, SectionImage

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
