"""All names under which the package writes to the data object. No other file spells them out."""

from __future__ import annotations


class Keys:
    """Default names of elements, tables and slots (the data contract of the stack)."""

    # sdata.attrs
    ATTRS = "spatial_impute"
    STACK = "stack"
    TISSUE = "tissue"  # fingerprints of the images whose tissue was segmented

    # tables and their annotation columns
    STACK_TABLE = "stack"
    REGION = "region"
    INSTANCE = "instance_id"
    SECTION = "section"  # ordered categorical; squidpy's `library_key`
    Z = "z"
    MEASURED_IDS = "measured_spots"
    MEASURED = "measured"  # obs column (bool) and layer of the same name
    TOTAL_COUNTS = "total_counts"  # as scanpy names it
    IN_TISSUE = "in_tissue"  # as Space Ranger names it

    # transformations
    ALIGNED = "aligned"  # coordinate system that all registered sections share

    # obsm
    SPATIAL = "spatial"
    SPATIAL_3D = "spatial_3d"
    X_SPOT = "X_spot"
    X_REGION = "X_region"
    X_GLOBAL = "X_global"
    FEATURES_AT = "features_spatial"  # x, y and diameter of the spots when their features were computed

    # uns
    FEATURES = "features"
    NORMALIZATION = "normalization"
    SEEN = "seen_sections"  # unmeasured sections whose measurement the model has seen
    X_LAYER = "X_layer"  # the layer that X is a copy of
    STATE = "state"  # fingerprints of what a slot was computed from

    NO_RESULT = (MEASURED, FEATURES, NORMALIZATION, X_LAYER, "spatialdata_attrs")  # names that no layer may take

    # results
    ASIGN = "asign"
    MATCHED = "matched"
    MATCHED_FROM = "matched_from"  # layer of the measurement that a matched one was made from
    SUPPORT = "imputation_support"
    SOURCE = "imputation_source"
    DEPTH = "imputation_depth"
    PREDICTABILITY = "imputation_r"
    PREDICTABLE = "imputable"

    # var
    MITOCHONDRIAL = "mt"  # as scanpy's tutorials name it
    RIBOSOMAL = "ribo"

    # dense maps and regions
    DENSE = "dense"
    PIXNET = "pixnet"
    N_PIXELS = "n_pixels"

    STACK_POINTS = "stack_points"  # spots as points with x, y and z

    LEVELS = (X_SPOT, X_REGION, X_GLOBAL)

    # names of the elements of a section
    image = "{}_image".format
    spots = "{}_spots".format  # shapes
    counts = "{}_counts".format  # table with the measured counts
    tissue = "{}_tissue".format  # labels
    tissue_outline = "{}_tissue_outline".format  # shapes
    displacement = "{}_displacement".format  # deformation for images (pull-back), an image element
    displacement_inverse = "{}_displacement_inverse".format  # deformation for points

    # names of elements that are derived from another one
    aligned = "{}_aligned".format  # copy in the common frame, deformation included
    carried = "{}_on_{}".format  # copy of shapes in the frame of another section
    expression = "{}_expression".format  # dense map of an image, or table of predictions at shapes

    landmarks = "{} landmarks".format  # layer of napari

    # names of slots that are derived from a key; connectivities, distances and neighbors as squidpy names them
    connectivities = "{}_connectivities".format  # edge weights in obsp
    distances = "{}_distances".format  # edge lengths in obsp
    neighbors = "{}_neighbors".format  # graph record in uns
    graph_overlap = "{}_overlap".format  # overlap (IoU) of linked spots in obsp
    graph_similarity = "{}_similarity".format  # feature similarity of linked spots in obsp
    sd = "{}_sd".format  # layer with the standard deviation of an imputed layer
    part = "{}_{}".format  # layer with the prediction of a part of a model
    fold = "{}_fold".format  # fold in which a measured spot was held out from a layer
    baseline = "baseline_{}".format  # layer of a baseline imputation
