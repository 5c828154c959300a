"""The stack inside a SpatialData object: its record, the elements of its sections, its table, its registration.

Scripts that look into a stack find the names of its parts here; the package imports them from their modules.
"""

from spatial_impute._stack.elements import element_affine, section_levels, spot_geometry
from spatial_impute._stack.record import Section, StackRecord, load_record, save_record
from spatial_impute._stack.table import measured_mask, stack_table
