"""Preprocessing: from scans and a measured section to a stack with spots, genes and features."""

from spatial_impute.pp._add_cells import add_cells
from spatial_impute.pp._assemble_stack import assemble_stack
from spatial_impute.pp._extract_features import extract_features
from spatial_impute.pp._pool_features import pool_features
from spatial_impute.pp._segment_tissue import segment_tissue
from spatial_impute.pp._select_genes import select_genes
from spatial_impute.pp._spots import tile_spots

__all__ = [
    "add_cells",
    "assemble_stack",
    "extract_features",
    "pool_features",
    "segment_tissue",
    "select_genes",
    "tile_spots",
]
