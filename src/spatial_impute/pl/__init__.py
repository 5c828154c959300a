"""Plots of stacks, registrations, graphs, imputations, dense maps, training and scores."""

from spatial_impute.pl._dense import dense
from spatial_impute.pl._gene_overview import gene_overview
from spatial_impute.pl._gene_report import gene_report
from spatial_impute.pl._graph_3d import graph_3d
from spatial_impute.pl._imputed import imputed
from spatial_impute.pl._metrics import metrics
from spatial_impute.pl._place_by_hand import place_by_hand
from spatial_impute.pl._registration import registration
from spatial_impute.pl._registration_page import registration_page
from spatial_impute.pl._stack import stack
from spatial_impute.pl._training import training
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
