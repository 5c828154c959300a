"""Registration of section images: arrays in, transforms out."""

from spatial_impute._registration.chain import (
    Likeness,
    StackTask,
    chain_to_reference,
    exchanged_sections,
    in_inferred_order,
    register_chain,
)
from spatial_impute._registration.deform import deform_stack
from spatial_impute._registration.pair import register_pair
from spatial_impute._registration.quality import section_errors
from spatial_impute._registration.transform import DisplacementField, KeptDeformation, SectionTransform
from spatial_impute._registration.types import ChainResult, PairResult, RegistrationParams, SectionImage
