"""What is kept: the journal of points, and the netCDF file it becomes."""

from rlvr_landscape_plugin.store.cells import Cells, Extent, missing
from rlvr_landscape_plugin.store.dataset import (
    Annotations,
    Held,
    asked_for,
    consolidate,
    held,
    holds,
    lacks,
    landscapes,
)
from rlvr_landscape_plugin.store.frame import Dimension, Frame, Label, Place, Subset
from rlvr_landscape_plugin.store.journal import Journal, keep_record, read_record, replace_text
from rlvr_landscape_plugin.store.requests import differences, refuse

__all__ = [
    "Annotations",
    "Cells",
    "Dimension",
    "Extent",
    "Frame",
    "Held",
    "Journal",
    "Label",
    "Place",
    "Subset",
    "asked_for",
    "consolidate",
    "differences",
    "held",
    "holds",
    "keep_record",
    "lacks",
    "landscapes",
    "missing",
    "read_record",
    "refuse",
    "replace_text",
]
