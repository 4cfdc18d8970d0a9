"""Import what a server needs, load vLLM's compiled libraries, and name what fails.

    python verify.py kit.json

Part of a kit that scripts/offline_kit.py assembled; `install.sh` runs it. The compiled libraries need an NVIDIA driver:
on a machine without one they are named as not checked. The last line is one JSON object; exit code 1 if anything
failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DRIVER = "libcuda.so.1"
TORCH = "import torch; assert torch.__version__.startswith({version!r}), 'torch is ' + torch.__version__"
PLUGINS = (
    "from importlib.metadata import entry_points as e; "
    "[e(group=g)['rlvr_landscape'] for g in ('vllm.general_plugins', 'vllm.endpoint_plugins')]; "
    "from rlvr_landscape_plugin.serving.versions import require; require()"
)
LIBRARY = (
    "import ctypes, importlib.util as u, pathlib, torch; (place,) = u.find_spec('vllm').submodule_search_locations; "
    "(file,) = pathlib.Path(place).glob({name!r} + '.*so'); ctypes.CDLL(str(file))"
)


def attempt(code: str) -> str | None:
    """Run code in a new process, because a library may end it; the last line of its error, or None."""
    env = os.environ | {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    except subprocess.TimeoutExpired:
        return "took more than 300 s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with code {done.returncode}"


def main() -> int:
    """Try everything; returns the exit code."""
    kit = json.loads(Path(sys.argv[1]).read_text())
    python, compiled = kit["verify"]["python"], kit["verify"]["compiled"]
    checks = {f"torch {kit['torch']}": TORCH.format(version=kit["torch"].removesuffix("*"))}
    # One process for all is five times as fast; only if it fails each has its own.
    together = attempt("; ".join(f"import {name}" for name in python)) is None
    checks |= {name: "" if together else f"import {name}" for name in python}
    checks["entry points of the plugin, and a vLLM that it works in"] = PLUGINS
    checks |= {name: LIBRARY.format(name=name) for name in compiled}
    driver = Path("/dev/nvidiactl").exists()
    verdicts: dict[str, str] = {}
    for name, code in checks.items():
        problem = attempt(code) if code else None
        if problem is None:
            verdicts[name] = "ok"
        elif DRIVER in problem and name in compiled and not driver:
            verdicts[name] = "not checked: this machine has no NVIDIA driver"
        else:
            verdicts[name] = f"FAILED: {problem}"
        print(f"{name}: {verdicts[name]}", flush=True)
    failed = [name for name, verdict in verdicts.items() if verdict.startswith("FAILED")]
    print(json.dumps({"ok": not failed, "failed": failed, "checks": verdicts}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
