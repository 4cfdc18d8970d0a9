"""Assemble a kit that installs vLLM and this project on a machine without a network.

    scripts/offline_kit.sh DIR [--vllm 0.26.0] [--for torch2.11-cu130-py312] [--part-size 60M] [--thin]

The target is a Linux machine (x86_64) that has Python, torch and torch's CUDA libraries, and lacks the rest. All
versions are resolved for it by uv, from this project's extra `gpu`; the wheels are downloaded by pip, torch's own left
out. They are put, with this repository, into one archive, which is cut into parts. DIR then holds

- `kit.tar.000`, …: the parts, none longer than `--part-size`;
- `SHA256SUMS`: of every other file;
- `install.sh`: checks the sums, joins the parts, installs into a new directory, and imports what a server needs;
- `kit.json`: what the kit is for and what is in it; `verify.py`: the imports.

`--thin` is for a dense model in 16 bits on Hopper GPUs (H100, H200): it removes from vLLM's wheel the kernels of other
models and other GPUs, and leaves out packages that only those use. What goes is printed. Needs `uv`, `pip` and `git`.
"""

from __future__ import annotations

import argparse
import base64
import csv
import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
SUMS = "SHA256SUMS"
PART = "kit.tar."
_BLOCK = 2**20
GLIBC = 35
"""Wheels may ask for glibc 2.N up to this N (Ubuntu 22.04 has 2.35)."""

ON_TARGET = ("torch", "triton", "nvidia-*", "cuda-*")
"""Of the packages that torch requires, those that come with it; the others are carried."""
THIN_FILES = {
    "vllm/vllm_flash_attn/_vllm_fa2_C*": "FlashAttention 2 (Ampere, Ada)",
    "vllm/_moe_C*": "mixture of experts",
    "vllm/_flashmla*": "multi-head latent attention",
    "vllm/_qutlass_C*": "4-bit weights",
    "vllm/third_party/deep_gemm/*": "8-bit matrix products",
    "vllm/third_party/fmha_sm100/*": "attention on Blackwell",
    "vllm/vllm-rs": "the front end in Rust, which is off by default",
}
"""Files of vLLM's wheel, and what they are for."""
THIN_PACKAGES = {
    "flashinfer-python": "attention and sampling kernels that vLLM does without",
    "nvidia-cutlass-dsl*": "kernels compiled at run time",
    "quack-kernels": "kernels compiled at run time",
    "cuda-tile": "kernels compiled at run time",
    "humming-kernels": "quantised weights",
    "tilelang": "kernels of sparse attention",
    "z3-solver": "used by tilelang",
    "tokenspeed-*": "multi-head latent attention on Blackwell",
    "nvidia-cuda-nvcc": "the CUDA compiler",
    "nvidia-cuda-crt": "the CUDA compiler",
    "nvidia-nvvm": "the CUDA compiler",
    "nvidia-cuda-cccl": "headers for the CUDA compiler",
    "nvidia-cuda-nvdisasm": "the CUDA disassembler",
    "nvidia-cudnn-frontend": "attention by cuDNN",
    "pynvvideocodec": "video",
    "opencv-python-headless": "video",
    "torchcodec": "video and sound",
    "torchaudio": "sound",
    "torchvision": "images",
}
"""Packages that are not carried, and what they are for."""


class KitError(Exception):
    """The kit cannot be assembled; the message says why and what to do."""


@dataclass(frozen=True)
class Target:
    """The machine without a network."""

    torch: str
    cuda: str
    """As in torch's version: cu130 is CUDA 13.0."""
    python: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """From `torch2.11-cu130-py312`; the last digit of `cu130` is the minor version."""
        found = re.fullmatch(r"torch(\d+\.\d+(?:\.\d+)?)-(cu\d{3})-py3(\d+)", text)
        if found is None:
            raise KitError(f"--for {text!r}: expected such a name as torch2.11-cu130-py312 (torch, CUDA, Python)")
        torch = found[1] if found[1].count(".") == 2 else f"{found[1]}.*"
        return cls(torch, found[2], f"3.{found[3]}")

    @property
    def cuda_major(self) -> int:
        """13 for cu130."""
        return int(self.cuda[2:-1])


def size_in_bytes(text: str) -> int:
    """`60M` is 60 · 2²⁰ bytes; also K and G, or a plain number."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text)
    if found is None or int(found[1]) == 0:
        raise KitError(f"--part-size {text!r}: expected a number of bytes such as 60M (K, M and G: powers of 1024)")
    return int(found[1]) * 1024 ** " KMG".index(found[2] or " ")


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """What a command prints; its last lines are the error's text."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    except FileNotFoundError as error:
        raise KitError(f"{command[0]} is not installed; pip install {Path(str(command[0])).name}") from error
    if done.returncode:
        raise KitError(f"{' '.join(str(part) for part in command[:4])} …:\n{done.stderr.strip()[-3000:]}")
    return done.stdout


def uv() -> str:
    """The resolver: beside this Python (scripts/setup.sh puts it there), else on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "uv"
    return str(beside) if beside.exists() else "uv"


def resolved(
    target: Target, requirements: Sequence[str | Path], constraints: Sequence[str], scratch: Path
) -> list[str]:
    """`name==version` of all that `requirements` need on the target."""
    file = scratch / "constraints.txt"
    file.write_text("\n".join(constraints) + "\n")
    command = [
        *(uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"),
        *("--python-version", target.python, "--python-platform", f"x86_64-manylinux_2_{GLIBC}"),
        *("--constraint", file, *requirements),
    ]
    return [line for line in run(command, scratch).splitlines() if "==" in line]


def name_of(pin: str) -> str:
    """The package of `name==version`."""
    return pin.split("==")[0].split("[")[0].strip()


def matching(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns (`*` stands for anything)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def packages(target: Target, vllm: str, thin: bool, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """(`name==version` of each package to carry, name of each that is left out → why)."""
    constraints = [f"vllm=={vllm}", f"torch=={target.torch}"]
    every = resolved(target, [ROOT / "pyproject.toml", "--extra", "gpu"], constraints, scratch)
    torch = scratch / "torch.in"
    torch.write_text(f"torch=={target.torch}\n")
    with_torch = {name_of(pin) for pin in resolved(target, [torch], constraints, scratch)}
    there = {name for name in with_torch if matching(name, ON_TARGET)}
    left_out = dict.fromkeys(sorted(there), "comes with torch")
    if thin:
        for pin in every:
            why = next((why for pattern, why in THIN_PACKAGES.items() if matching(name_of(pin), [pattern])), None)
            if why is not None and name_of(pin) not in there:
                left_out[name_of(pin)] = why
    return [pin for pin in every if name_of(pin) not in left_out], left_out


def download(target: Target, pins: Sequence[str], wheels: Path, scratch: Path) -> None:
    """The target's wheel of each package, and pip itself, which installs them there."""
    listed = scratch / "pins.txt"
    listed.write_text("\n".join([*pins, "pip"]) + "\n")
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    tag = target.python.replace(".", "")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", wheels, "--requirement", listed),
        *("--implementation", "cp", "--python-version", tag),
        *(part for abi in (f"cp{tag}", "abi3", "none") for part in ("--abi", abi)),
        *(part for platform in platforms for part in ("--platform", platform)),
    ]
    run(command)


def project(wheels: Path, scratch: Path) -> str:
    """This project as it is in the last commit: `repository.tar`, and a wheel made of it; returns the commit."""
    file = scratch / "repository.tar"
    run(["git", "-C", ROOT, "archive", "--format=tar", "--prefix=repository/", "--output", file, "HEAD"])
    with tarfile.open(file) as tar:
        tar.extractall(scratch / "source", filter="data")
    run([uv(), "build", "--quiet", "--wheel", "--out-dir", wheels, scratch / "source" / "repository"])
    (wheels / ".gitignore").unlink(missing_ok=True)
    return run(["git", "-C", ROOT, "rev-parse", "HEAD"]).strip()


def wheel_of(package: str, wheels: Path) -> Path:
    """The file of a package; raises `KitError` unless there is exactly one."""
    found = sorted(wheels.glob(f"{package.replace('-', '_')}-*.whl"))
    if len(found) != 1:
        raise KitError(f"expected one wheel of {package} in {wheels}, found {len(found)}")
    return found[0]


def thinned(wheel: Path, patterns: Sequence[str]) -> tuple[Path, dict[str, int]]:
    """Write a wheel without the files that match, its RECORD without them too, and remove the old one.

    The new one has the build tag `1thin` in its name, so that nobody takes it for the published one. Returns its path
    and the compressed bytes of each file that went.
    """
    name, version, *tags = wheel.name.split("-")
    thin = wheel.with_name("-".join([name, version, "1thin", *tags]))
    gone: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(thin, "w", zipfile.ZIP_DEFLATED) as new:
        (record,) = [member for member in old.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", member)]
        for member in old.infolist():
            if matching(member.filename, patterns):
                gone[member.filename] = member.compress_size
            elif member.filename != record:
                with old.open(member) as source, new.open(member, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, _BLOCK)
        rows = [row for row in csv.reader(io.StringIO(old.read(record).decode())) if row and row[0] not in gone]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        new.writestr(record, text.getvalue())
    wheel.unlink()
    return thin, gone


def check_record(wheel: Path) -> None:
    """Raise `KitError` unless the wheel holds what its RECORD lists, byte for byte."""
    with zipfile.ZipFile(wheel) as archive:
        (record,) = [member for member in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", member)]
        rows = [row for row in csv.reader(io.StringIO(archive.read(record).decode())) if row]
        files = {member for member in archive.namelist() if not member.endswith("/")}
        if files != {row[0] for row in rows}:
            raise KitError(f"{wheel.name} does not hold the files that its RECORD lists")
        for path, digest, _ in rows:
            if digest:
                found = hashlib.sha256(archive.read(path)).digest()
                if base64.urlsafe_b64encode(found).decode().rstrip("=") != digest.removeprefix("sha256="):
                    raise KitError(f"{wheel.name}: {path} differs from its RECORD")


def cuda_of(wheel: Path) -> int | None:
    """The major version of the CUDA runtime that a wheel's libraries ask for; None if they ask for none."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith(".so") and (found := re.search(rb"libcudart\.so\.(\d+)", archive.read(member))):
                return int(found[1])
    return None


def split(source: IO[bytes], folder: Path, limit: int) -> list[Path]:
    """Cut a stream into files of at most `limit` bytes, named so that their order is that of their names."""
    parts: list[Path] = []
    block = source.read(min(limit, _BLOCK))
    while block:
        part = folder / f"{PART}{len(parts):03d}"
        left = limit
        with part.open("wb") as sink:
            while block and left:
                sink.write(block)
                left -= len(block)
                block = source.read(min(left or limit, _BLOCK))
        parts.append(part)
    return parts


def archived(folders: Sequence[Path], folder: Path, limit: int) -> list[Path]:
    """One tar of directories and files, by their own names, in parts."""
    with tempfile.TemporaryFile(dir=folder) as whole:
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for path in folders:
                tar.add(path, path.name)
        whole.seek(0)
        return split(whole, folder, limit)


def write_sums(folder: Path) -> None:
    """`SHA256SUMS` of all files, as `sha256sum --check` reads it."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != SUMS:
            with path.open("rb") as handle:
                lines.append(f"{hashlib.file_digest(handle, 'sha256').hexdigest()}  {path.name}\n")
    (folder / SUMS).write_text("".join(lines))


def to_verify(thin: bool) -> dict[str, list[str]]:
    """Modules that the target must be able to import, and compiled libraries of vLLM that it must be able to load."""
    compiled = ["_C_stable_libtorch", "vllm_flash_attn/_vllm_fa3_C"]
    if not thin:
        compiled += ["vllm_flash_attn/_vllm_fa2_C", "_moe_C_stable_libtorch"]
    python = ["numpy", "safetensors", "transformers", "verifiers", "rlvr_alphabet_sort", "vllm"]
    python += ["vllm.entrypoints.openai.api_server", "vllm.v1.engine.async_llm", "vllm.v1.worker.gpu_model_runner"]
    python += ["vllm.model_executor.models.qwen2", "vllm.v1.attention.backends.flash_attn"]
    python += ["rlvr_landscape_analysis", "rlvr_landscape_plugin.serving.worker.engine"]
    python += ["rlvr_landscape_plugin.serving.endpoint", "rlvr_landscape_plugin.sweep.run"]
    return {"python": python, "compiled": compiled}


def assemble(folder: Path, vllm: str, target: Target, limit: int, thin: bool) -> None:
    """Write the kit; prints what is carried, left out and removed, and the size of each part."""
    if folder.exists() and any(folder.iterdir()):
        raise KitError(f"{folder} is not empty; name a new directory")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".assembling-") as name:
        scratch = Path(name)
        wheels, out = scratch / "wheels", scratch / "out"
        wheels.mkdir()
        out.mkdir()
        pins, left_out = packages(target, vllm, thin, scratch)
        print(f"{len(pins)} packages for torch {target.torch}, {target.cuda}, Python {target.python}")
        for package, why in left_out.items():
            print(f"  left out: {package} ({why})")
        download(target, pins, wheels, scratch)
        commit = project(wheels, scratch)
        big = wheel_of("vllm", wheels)
        if (major := cuda_of(big)) not in (None, target.cuda_major):
            raise KitError(f"{big.name} is built for CUDA {major}, the target has {target.cuda}; choose another --vllm")
        removed: dict[str, int] = {}
        if thin:
            big, removed = thinned(big, list(THIN_FILES))
            for pattern, why in THIN_FILES.items():
                size = sum(size for path, size in removed.items() if matching(path, [pattern]))
                print(f"  removed from vLLM's wheel: {pattern} ({why}), {size / 2**20:.1f} MiB")
        check_record(big)
        parts = archived([wheels, scratch / "repository.tar"], out, limit)
        facts = {
            "vllm": vllm,
            "torch": target.torch,
            "cuda": target.cuda,
            "python": target.python,
            "commit": commit,
            "thin": thin,
            "packages": pins,
            "left_out": left_out,
            "removed": THIN_FILES if thin else {},
            "verify": to_verify(thin),
        }
        (out / "kit.json").write_text(json.dumps(facts, indent=1) + "\n")
        for script, to in (("offline_install.sh", "install.sh"), ("offline_verify.py", "verify.py")):
            shutil.copy(ROOT / "scripts" / script, out / to)
        write_sums(out)
        for path in sorted(out.iterdir()):
            os.replace(path, folder / path.name)
    for part in parts:
        print(f"  {part.name}  {(folder / part.name).stat().st_size / 2**20:.1f} MiB")
    print(f"copy {folder} to the machine, and run there: bash {folder.name}/install.sh NEW_DIRECTORY")


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the kit is put: a new or empty directory")
    parser.add_argument("--vllm", default="0.26.0", help="release of vLLM")
    parser.add_argument("--for", dest="target", default="torch2.11-cu130-py312", help="torch, CUDA and Python there")
    parser.add_argument("--part-size", default="60M", help="most bytes per part (K, M, G: powers of 1024)")
    parser.add_argument("--thin", action="store_true", help="only what a dense 16-bit model on Hopper needs")
    given = parser.parse_args()
    try:
        target, limit = Target.parse(given.target), size_in_bytes(given.part_size)
        assemble(given.directory, given.vllm, target, limit, given.thin)
    except (KitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
