"""The stack inside a SpatialData object: its record, the elements of its sections, its table, its registration."""
