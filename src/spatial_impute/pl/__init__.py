"""Plots of stacks, registrations, graphs, imputations, dense maps, training and scores."""

from spatial_impute.pl._by_hand import place_by_hand, registration_page
from spatial_impute.pl._genes import gene_overview, gene_report
from spatial_impute.pl._graph_3d import graph_3d
from spatial_impute.pl._maps import dense, imputed
from spatial_impute.pl._metrics import metrics, training
from spatial_impute.pl._registration import registration
from spatial_impute.pl._stack import stack
from spatial_impute.pl._volume import volume

__all__ = [
    "dense",
    "gene_overview",
    "gene_report",
    "graph_3d",
    "imputed",
    "metrics",
    "place_by_hand",
    "registration",
    "registration_page",
    "stack",
    "training",
    "volume",
]
