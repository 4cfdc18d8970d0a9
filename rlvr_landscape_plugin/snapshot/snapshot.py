"""A saved policy: a Hugging Face directory of safetensors, and how its identity is checked.

    python -m rlvr_landscape_plugin.snapshot ls outputs/laptop
    python -m rlvr_landscape_plugin.snapshot verify outputs/laptop

A directory from any source can be used: a whole model, or a LoRA adapter beside the base model that it belongs to
(adapter.py); then every tensor is read as base and adapter together. A trainer that wants checksums writes with
`write_snapshot`: the directory then has a `manifest.json` with the SHA-256 of every file, and from there on a file that
is missing, foreign or different is refused by name, in two stages so that nothing big is read twice. `open_snapshot`
checks names, sizes and every small file; `Snapshot.sha256`, which a sweep and a server compute anyway, compares the
weights.

Reading and writing need neither torch nor transformers: the trainer fills the directory, and this module adds the
manifest and publishes it. Nothing here changes a snapshot that exists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.files import file_sha256, publish_directory
from rlvr_landscape_plugin.snapshot.adapter import CONFIG, Adapter, read_adapter
from rlvr_landscape_plugin.snapshot.manifest import FORMAT, MANIFEST, FileEntry, Manifest, outside
from rlvr_landscape_plugin.snapshot.references import SHIPPED, hub_directory, locate
from rlvr_landscape_plugin.snapshot.tensors import DTYPES, TensorInfo, check_finite, read_tensor, safetensors_header

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Snapshot:
    """One policy on disk. Build it with `open_snapshot`, which checks the directory."""

    path: Path
    step: int
    """Optimizer updates behind it; 0 is the base model."""
    tensors: Mapping[str, TensorInfo]
    manifest: Manifest | None = None
    """The manifest of its writer; None for a directory without `manifest.json`."""
    tells_step: bool = True
    """Whether a manifest or a name told the step; otherwise it counts as 0."""
    adapter: Adapter | None = None
    """What is in the directory, if that is a LoRA adapter."""
    base: Snapshot | None = None
    """The model that the adapter belongs to."""

    @property
    def model(self) -> Path:
        """The directory of the configuration, the tokenizer and the chat template: an adapter's are its base's."""
        return self.path if self.base is None else self.base.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name → shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        """The safetensors files in its own directory, sorted."""
        if self.adapter is not None:
            return [self.adapter.file]
        return sorted({info.file for info in self.tensors.values()})

    @cached_property
    def sha256(self) -> str:
        """Hash over config.json and every weight file (names and bytes); of an adapter over its base's and its own.

        Raises `SnapshotError` naming the file where a manifest promises other bytes.
        """
        digest = hashlib.sha256()
        if self.adapter is not None and self.base is not None:
            self._checked_digest(self.adapter.file)
            digest.update(f"adapter\x00{self.base.sha256}\x00{self.adapter.meaning}".encode())
            return digest.hexdigest()
        for file in [self.path / "config.json", *self.files]:
            digest.update(file.name.encode() + b"\x00")
            digest.update(self._checked_digest(file))
        return digest.hexdigest()

    def read(self, name: str) -> np.ndarray:
        """One tensor as stored (bfloat16 as float32); raises `SnapshotError` naming file and tensor."""
        return read_tensor(self.tensors, name)

    def check_finite(self) -> None:
        """Read every weight; raises `SnapshotError` naming file and tensor where one is NaN or infinite.

        Of an adapter its own file: `base` is a snapshot of its own.
        """
        check_finite(self.tensors if self.adapter is None else safetensors_header(self.adapter.file))

    def verify(self) -> None:
        """Read every file and compare it with the manifest; raises `SnapshotError` naming the first that differs.

        `open_snapshot` has compared the small ones already, and what `sha256` covers is read only once.
        """
        if self.manifest is None or not self.manifest.files:
            raise SnapshotError(
                f"{self.path} has no {MANIFEST} with checksums, so there is nothing to verify it against"
            )
        _ = self.sha256
        done = {file.name for file in self.files}
        for name in self.manifest.files:
            if name not in done:
                self._checked_digest(self.path / name)

    def _checked_digest(self, file: Path) -> bytes:
        found = file_sha256(file)
        if self.manifest is not None and self.manifest.files:
            _compare(file, found, self.manifest.files[file.relative_to(self.path).as_posix()]["sha256"])
        return bytes.fromhex(found)


def _compare(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise SnapshotError(
            f"{file} is not the file that {MANIFEST} names: SHA-256 {found[:12]}… on disk, {expected[:12]}… expected; "
            "copy the snapshot again"
        )


def _contents(path: Path) -> list[str]:
    """Relative paths of the files of a policy: all but the manifest, hidden files and a model card."""
    found = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    return [
        name.as_posix()
        for name in found
        if not any(part.startswith(".") for part in name.parts) and name.suffix != ".md" and str(name) != MANIFEST
    ]


def _inside(path: Path, file: Path) -> Path:
    """`file`, which belongs to the snapshot `path`; raises `SnapshotError` if it is a link to somewhere else.

    Otherwise anybody who may write into a directory that a server reads could make it read files elsewhere. The Hugging
    Face cache keeps the files of `snapshots/<revision>/` as links into `blobs/`, which is allowed.
    """
    try:
        real = file.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, before Python 3.13
        raise SnapshotError(f"{file} cannot be followed: {error}; copy the snapshot again") from error
    allowed = [path, *([path.parents[1] / "blobs"] if path.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise SnapshotError(f"{file} is a link to {real}, outside the snapshot; copy the file into the directory")
    return file


def _check_contents(path: Path, manifest: Manifest) -> None:
    """Compare names and sizes with the manifest, and the bytes of everything but the weights."""
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise SnapshotError(f"{path / MANIFEST} names {name}, which is missing; copy the snapshot again")
        if file.stat().st_size != entry["size"]:
            raise SnapshotError(
                f"{file} is not the file that {MANIFEST} names: {file.stat().st_size} bytes on disk, {entry['size']} "
                "expected; copy the snapshot again"
            )
        if file.suffix != ".safetensors":
            _compare(file, file_sha256(file), entry["sha256"])
    if foreign := sorted(set(_contents(path)) - set(manifest.files)):
        raise SnapshotError(f"{path / foreign[0]} is not among the files of {MANIFEST}; remove it or copy again")


def open_snapshot(reference: str | Path, base: str | Path | Snapshot | None = None) -> Snapshot:
    """The snapshot behind a directory path, a Hub id with its revision, or a shipped name.

    `base`: the model that an adapter belongs to, where its adapter_config.json does not name it, or names it for
    another machine; of no effect on a whole model. The step comes from `manifest.json`, else from a name like
    `step_000010` or `checkpoint-10` (layouts.py), else it is 0.

    Raises `SnapshotError` naming the file for: no such directory, no config, no safetensors, a shard or tensor that the
    index promises and the files lack, a tensor in two files, weights that are no floating-point numbers, a truncated
    file, a link that leads out of the directory, an adapter that is not supported (adapter.py) or does not fit its
    base, and, where the manifest has checksums, a file that is missing, foreign or different (weights: in size; their
    bytes are compared by `sha256` and `verify`).
    """
    path, named = locate(reference)
    whole, adapted = _inside(path, path / "config.json").is_file(), (path / CONFIG).is_file()
    if not whole and not adapted:
        raise SnapshotError(
            f"{path} has no config.json; a snapshot is a whole Hugging Face checkpoint directory, or an adapter with "
            f"an {CONFIG}"
        )
    manifest = Manifest.read(_inside(path, path / MANIFEST)) if (path / MANIFEST).is_file() else None
    if manifest is not None and manifest.files:
        _check_contents(path, manifest)
    step = named if manifest is None else manifest.step
    known = step is not None
    if not adapted:
        return Snapshot(path, step or 0, _read_headers(path), manifest, known)
    models = [file.name for file in path.glob("*.safetensors") if not file.name.startswith("adapter")]
    if models:
        raise SnapshotError(
            f"{path} holds an adapter ({CONFIG}) and {models[0]}: which of them is the policy is not clear; move one "
            "of them to a directory of its own"
        )
    for name in (CONFIG, "adapter_model.safetensors"):
        _inside(path, path / name)
    adapter = read_adapter(path)
    model = base if isinstance(base, Snapshot) else _open_base(adapter, base)
    return Snapshot(path, step or 0, adapter.merged(model.tensors), manifest, known, adapter, model)


def _open_base(adapter: Adapter, given: str | Path | None) -> Snapshot:
    """The model that an adapter belongs to: the one given, else the directory or Hub id that its configuration names.

    A relative directory is one below the working directory, or below the adapter's own.
    """
    named = adapter.base_name
    if given is not None:
        reference: str | Path = given
    elif not named:
        raise SnapshotError(f"{adapter.path / CONFIG} names no base model; give it with --base-model")
    else:
        places = (Path(named).expanduser(), adapter.path / named)
        found = None if named in SHIPPED else next((place for place in places if place.is_dir()), None)
        reference = named if found is None else found
    try:
        if given is None and found is None and named not in SHIPPED:
            reference = _base_on_hub(adapter)
        model = open_snapshot(reference)
    except SnapshotError as error:
        raise SnapshotError(
            f"the base model {str(given or named)!r} of {adapter.path}: {error}; give its directory with --base-model"
        ) from error
    if model.adapter is not None:
        raise SnapshotError(f"the base model {model.path} of {adapter.path} is an adapter itself; name a whole model")
    return model


def _base_on_hub(adapter: Adapter) -> Path:
    """The directory of a base model that is named by its Hub id."""
    if adapter.base_name.startswith((".", "/", "~")) or adapter.base_name.count("/") > 1:
        raise SnapshotError("is not a directory on this machine")
    return hub_directory(adapter.base_name, adapter.revision)


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a snapshot's directory, from the index where there is one, else from all safetensors files."""
    promised = _read_index(path)
    files = sorted({path / name for name in promised.values()}) or sorted(path.glob("*.safetensors"))
    if not files:
        raise SnapshotError(
            f"{path} holds no *.safetensors; save it with save_pretrained(..., safe_serialization=True) "
            "(pickled .bin weights are not read)"
        )
    if promised and (single := path / "model.safetensors").is_file() and single not in files:
        raise SnapshotError(
            f"{path} holds {single.name} and {_INDEX}, which names other files: which of them are the weights is not "
            "clear; remove the one that is not"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not _inside(path, file).is_file():
            by = f"{path / _INDEX} names {file.name}, which is missing" if promised else f"{file} is not a file"
            raise SnapshotError(f"{by}; copy the snapshot again")
        for name, info in safetensors_header(file).items():
            if name in tensors:
                raise SnapshotError(
                    f"{path} holds tensor {name!r} twice, in {tensors[name].file.name} and in {file.name}: which of "
                    "them is the policy's is not clear; remove the file that does not belong to it"
                )
            if info.dtype not in DTYPES:
                raise SnapshotError(
                    f"{file}: tensor {name!r} is {info.dtype}, and a landscape moves floating-point weights "
                    f"({', '.join(DTYPES)}) only; save the policy in one of these, not quantised"
                )
            tensors[name] = info
    lost = sorted(name for name, file in promised.items() if name not in tensors or tensors[name].file != path / file)
    if lost:
        raise SnapshotError(
            f"{path / promised[lost[0]]} lacks tensor {lost[0]!r} (and {len(lost) - 1} more) named by {_INDEX}"
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name, as the index promises; empty without an index."""
    index = path / _INDEX
    if not index.is_file():
        return {}
    try:
        weight_map = json.loads(_inside(path, index).read_text(encoding="utf-8"))["weight_map"]
        promised = {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise SnapshotError(f"{index} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{index} is not a safetensors index: {error!r}") from error
    for name, file in promised.items():
        if outside(file):
            raise SnapshotError(f"{index} puts tensor {name!r} into {file!r}, outside the snapshot; copy it again")
    return promised


def snapshot_name(step: int) -> str:
    """Directory name of the snapshot of a step."""
    return f"step_{step:06d}"


def write_snapshot(
    root: Path, manifest: Manifest, fill: Callable[[Path], None], read_back: Callable[[Path], object] | None = None
) -> Path:
    """A whole snapshot `root/step_<N>/`, or none: `fill` puts config, tokenizer and weights into an empty directory.

    The directory has a temporary name until every file is on disk and in the manifest (`manifest.files` is not read),
    then it is renamed. A snapshot that exists is never touched: if it has the same files, its path is returned,
    otherwise `SnapshotError` names the first difference. `read_back` raises for a directory that cannot be read back;
    by default `open_snapshot`, another for an adapter.
    """
    target = root / snapshot_name(manifest.step)
    files: dict[str, FileEntry] = {}

    def fill_and_describe(folder: Path) -> None:
        fill(folder)
        for name in _contents(folder):
            files[name] = {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
        content = {"format": FORMAT, **asdict(manifest), "files": files}
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
        (read_back or open_snapshot)(folder)  # what cannot be read back must not get a name

    safe = "snapshots that exist are safe"
    if not publish_directory(target, fill_and_describe, safe=safe):
        _same_files(target, files)
    return target


def _same_files(target: Path, files: Mapping[str, FileEntry]) -> None:
    names = sorted(set(_contents(target)) | set(files))
    for name in names:
        if name not in files or not (target / name).is_file() or file_sha256(target / name) != files[name]["sha256"]:
            raise SnapshotError(
                f"{target} exists with another {name}; a snapshot is never overwritten, give the run another directory"
            )


def compare_tensors(expected: Mapping[str, tuple[int, ...]], snapshot: Snapshot, model: str) -> None:
    """Raise `SnapshotError` unless `snapshot` has exactly the tensors `expected` (name → shape) of `model`."""
    shapes = snapshot.shapes
    file = {name: info.file.name for name, info in snapshot.tensors.items()}
    problems = [
        *(f"tensor {name!r} is missing" for name in sorted(set(expected) - set(shapes))),
        *(f"tensor {name!r} in {file[name]} is not part of the model" for name in sorted(set(shapes) - set(expected))),
        *(
            f"tensor {name!r} has shape {list(shapes[name])}, expected {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in shapes and shapes[name] != tuple(shape)
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise SnapshotError(f"snapshot {snapshot.path} does not fit {model}: {problems[0]}{more}")
