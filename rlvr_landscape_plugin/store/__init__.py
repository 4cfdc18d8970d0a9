"""What is kept: the journal of points, and the netCDF file it becomes."""

from rlvr_landscape_plugin.store.dataset import Annotations, consolidate, holds, landscapes
from rlvr_landscape_plugin.store.frame import Dimension, Frame, Label, Place, Subset
from rlvr_landscape_plugin.store.journal import Journal, keep_record, read_record, replace_text

__all__ = [
    "Annotations",
    "Dimension",
    "Frame",
    "Journal",
    "Label",
    "Place",
    "Subset",
    "consolidate",
    "holds",
    "keep_record",
    "landscapes",
    "read_record",
    "replace_text",
]
