"""A saved policy on disk. `python -m rlvr_landscape_plugin.snapshot ls|verify DIR`."""

from collections.abc import Sequence

from rlvr_landscape_plugin.files import file_sha256
from rlvr_landscape_plugin.snapshot.adapter import Adapter, read_adapter
from rlvr_landscape_plugin.snapshot.layouts import find_snapshots, run_directory, step_of_path
from rlvr_landscape_plugin.snapshot.manifest import MANIFEST, Manifest
from rlvr_landscape_plugin.snapshot.references import SHIPPED, expand
from rlvr_landscape_plugin.snapshot.snapshot import (
    Snapshot,
    compare_tensors,
    open_snapshot,
    snapshot_name,
    write_snapshot,
)
from rlvr_landscape_plugin.snapshot.tensors import (
    TensorInfo,
    read_tensor,
    safetensors_header,
    write_safetensors,
)

__all__ = [
    "Adapter",
    "MANIFEST",
    "Manifest",
    "SHIPPED",
    "Snapshot",
    "TensorInfo",
    "compare_tensors",
    "expand",
    "file_sha256",
    "find_snapshots",
    "main",
    "open_snapshot",
    "read_adapter",
    "read_tensor",
    "run_directory",
    "safetensors_header",
    "snapshot_name",
    "step_of_path",
    "write_safetensors",
    "write_snapshot",
]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from rlvr_landscape_plugin.snapshot.__main__ import main as command

    return command(argv)
