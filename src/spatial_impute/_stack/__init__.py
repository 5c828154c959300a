"""The stack inside a SpatialData object: its record, the elements of its sections, its table, its registration."""

from spatial_impute._stack.elements import (
    as_circles,
    displacement_elements,
    element_affine,
    image_element,
    in_rgb_order,
    load_transform,
    plane_affine,
    registered_radius,
    require_element_key,
    require_registration,
    rows_of_spots,
    section_levels,
    section_object,
    spot_geometry,
    spots_by_section,
    square_edge,
    to_frames,
)
from spatial_impute._stack.record import (
    Section,
    StackRecord,
    load_record,
    require_section_names,
    require_spatialdata,
    resolve_sections,
    save_record,
)
from spatial_impute._stack.table import (
    build_stack_table,
    dense_rows,
    measured_ids,
    measured_mask,
    registered_spots,
    require_same_measured,
    section_ranks,
    stack_table,
    values_by_spot,
    write_slots,
)
