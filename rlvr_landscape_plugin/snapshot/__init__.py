"""A saved policy on disk. `python -m rlvr_landscape_plugin.snapshot ls|verify DIR`."""

from rlvr_landscape_plugin.files import file_sha256
from rlvr_landscape_plugin.snapshot.snapshot import (
    MANIFEST,
    SHIPPED,
    Manifest,
    Snapshot,
    TensorInfo,
    compare_tensors,
    find_snapshots,
    main,
    open_snapshot,
    read_tensor,
    safetensors_header,
    snapshot_name,
    step_of_name,
    write_safetensors,
    write_snapshot,
)

__all__ = [
    "MANIFEST",
    "Manifest",
    "SHIPPED",
    "Snapshot",
    "TensorInfo",
    "compare_tensors",
    "file_sha256",
    "find_snapshots",
    "main",
    "open_snapshot",
    "read_tensor",
    "safetensors_header",
    "snapshot_name",
    "step_of_name",
    "write_safetensors",
    "write_snapshot",
]
