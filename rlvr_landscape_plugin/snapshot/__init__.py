"""A saved policy on disk. `python -m rlvr_landscape_plugin.snapshot ls|verify DIR`."""

from collections.abc import Sequence

from rlvr_landscape_plugin.files import file_sha256
from rlvr_landscape_plugin.snapshot.manifest import MANIFEST, Manifest
from rlvr_landscape_plugin.snapshot.snapshot import (
    SHIPPED,
    Snapshot,
    compare_tensors,
    find_snapshots,
    open_snapshot,
    snapshot_name,
    step_of_name,
    write_snapshot,
)
from rlvr_landscape_plugin.snapshot.tensors import (
    TensorInfo,
    read_tensor,
    safetensors_header,
    write_safetensors,
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from rlvr_landscape_plugin.snapshot.__main__ import main as command

    return command(argv)
