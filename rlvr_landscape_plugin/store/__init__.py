"""What is kept: the journal of points, and the netCDF file it becomes."""

from rlvr_landscape_plugin.store.journal import (
    FULL,
    POINT,
    SCHEMA,
    Annotations,
    Cell,
    Journal,
    Rectangle,
    keep_record,
    landscapes,
    point_name,
    read_record,
    replace_text,
)

__all__ = [
    "Annotations",
    "Cell",
    "FULL",
    "Journal",
    "POINT",
    "Rectangle",
    "SCHEMA",
    "keep_record",
    "landscapes",
    "point_name",
    "read_record",
    "replace_text",
]
