"""Every name under which the package writes to the data object. Nothing else spells these out."""

from __future__ import annotations


class Keys:
    """Default names of elements, tables and slots (the data contract of the stack)."""

    # sdata.attrs
    ATTRS = "spatial_impute"
    STACK = "stack"

    # tables and their annotation columns
    STACK_TABLE = "stack"
    REGION = "region"
    INSTANCE = "instance_id"
    SECTION = "section"  # ordered categorical; squidpy's `library_key`
    Z = "z"
    MEASURED = "measured"  # obs column (bool) and layer of the same name
    TOTAL_COUNTS = "total_counts"  # as scanpy names it

    # transformations
    ALIGNED = "aligned"  # coordinate system that all registered sections share

    # obsm
    SPATIAL = "spatial"
    SPATIAL_3D = "spatial_3d"
    X_SPOT = "X_spot"
    X_REGION = "X_region"
    X_GLOBAL = "X_global"

    # uns
    FEATURES = "features"
    NORMALIZATION = "normalization"

    # graph
    OVERLAP = "overlap"
    SIMILARITY = "similarity"

    # results
    ASIGN = "asign"
    SUPPORT = "imputation_support"
    SOURCE = "imputation_source"
    DEPTH = "imputation_depth"
    PREDICTABILITY = "imputation_r"
    PREDICTABLE = "imputable"

    # dense maps and regions
    DENSE = "dense"
    PIXNET = "pixnet"
    N_PIXELS = "n_pixels"

    LEVELS = (X_SPOT, X_REGION, X_GLOBAL)

    @staticmethod
    def image(section: str) -> str:
        """Image element of a section."""
        return f"{section}_image"

    @staticmethod
    def spots(section: str) -> str:
        """Shapes element holding the spots of a section."""
        return f"{section}_spots"

    @staticmethod
    def tissue(section: str) -> str:
        """Labels element with the tissue mask of a section."""
        return f"{section}_tissue"

    @staticmethod
    def tissue_outline(section: str) -> str:
        """Shapes element with the outline of the tissue of a section."""
        return f"{section}_tissue_outline"

    @staticmethod
    def displacement(section: str) -> str:
        """Image element with the deformation of a section, for images (pull-back)."""
        return f"{section}_displacement"

    @staticmethod
    def displacement_inverse(section: str) -> str:
        """Image element with the deformation of a section, for points."""
        return f"{section}_displacement_inverse"

    @staticmethod
    def aligned(key: str) -> str:
        """Copy of an element in the common frame, deformation included."""
        return f"{key}_{Keys.ALIGNED}"

    @staticmethod
    def counts(section: str) -> str:
        """Table with the measured counts of a section."""
        return f"{section}_counts"

    @staticmethod
    def connectivities(key: str) -> str:
        """Edge weights in ``obsp`` (squidpy's naming)."""
        return f"{key}_connectivities"

    @staticmethod
    def distances(key: str) -> str:
        """Edge lengths in ``obsp`` (squidpy's naming)."""
        return f"{key}_distances"

    @staticmethod
    def neighbors(key: str) -> str:
        """Graph record in ``uns`` (squidpy's naming)."""
        return f"{key}_neighbors"

    @staticmethod
    def graph_overlap(key: str) -> str:
        """Overlap (IoU) of linked spots in ``obsp``."""
        return f"{key}_{Keys.OVERLAP}"

    @staticmethod
    def graph_similarity(key: str) -> str:
        """Feature similarity of linked spots in ``obsp``."""
        return f"{key}_{Keys.SIMILARITY}"

    @staticmethod
    def sd(key: str) -> str:
        """Layer with the standard deviation of an imputed layer."""
        return f"{key}_sd"

    @staticmethod
    def fold(key: str) -> str:
        """Fold with which a measured spot was held out from a layer."""
        return f"{key}_fold"

    @staticmethod
    def expression(key: str) -> str:
        """Dense map of an image, or table of predictions at shapes."""
        return f"{key}_expression"

    @staticmethod
    def baseline(method: str) -> str:
        """Layer of a baseline imputation."""
        return f"baseline_{method}"
