"""Tools: register sections, link them in 3D, fit and impute; dense maps from one image."""

from spatial_impute.tl._base_layers import add_prediction
from spatial_impute.tl._build_3d_graph import build_3d_graph
from spatial_impute.tl._cross_validate import cross_validate
from spatial_impute.tl._export import points_3d, write_geojson, write_ome_tiff
from spatial_impute.tl._fit_asign import fit_asign
from spatial_impute.tl._fit_pixnet import fit_pixnet
from spatial_impute.tl._foreign_transforms import read_transformation, write_transformation
from spatial_impute.tl._impute_3d import impute_3d, impute_baseline
from spatial_impute.tl._impute_pixnet import impute_pixnet
from spatial_impute.tl._match_sections import match_sections
from spatial_impute.tl._places import read_placement
from spatial_impute.tl._predict_dense import genes_from_features, predict_dense
from spatial_impute.tl._predict_regions import predict_regions
from spatial_impute.tl._register_stack import register_stack
from spatial_impute.tl._warp_element import transfer_shapes, warp_element

__all__ = [
    "add_prediction",
    "build_3d_graph",
    "cross_validate",
    "fit_asign",
    "fit_pixnet",
    "genes_from_features",
    "impute_3d",
    "impute_baseline",
    "impute_pixnet",
    "match_sections",
    "points_3d",
    "predict_dense",
    "predict_regions",
    "read_placement",
    "read_transformation",
    "register_stack",
    "transfer_shapes",
    "warp_element",
    "write_geojson",
    "write_ome_tiff",
    "write_transformation",
]
