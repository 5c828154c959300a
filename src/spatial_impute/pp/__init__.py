"""Preprocessing: from scans and a measured section to a stack with spots, genes and features."""

from spatial_impute.pp._assemble import assemble_stack
from spatial_impute.pp._features import extract_features
from spatial_impute.pp._genes import select_genes
from spatial_impute.pp._pool import pool_features
from spatial_impute.pp._tile import tile_spots
from spatial_impute.pp._tissue import segment_tissue

__all__ = ["assemble_stack", "extract_features", "pool_features", "segment_tissue", "select_genes", "tile_spots"]
