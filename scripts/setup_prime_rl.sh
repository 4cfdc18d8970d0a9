#!/usr/bin/env bash
# Make an environment in which a prime-rl checkout and this project run on CPUs, for tests/prime_rl/test_end_to_end.py.
#   scripts/setup_prime_rl.sh PRIME_RL_DIR [VENV]      VENV: default PRIME_RL_DIR/.venv-cpu
# prime-rl's source is not changed. Repeating it is cheap. Needs Python 3.12; 7 GB of disk where PyPI's torch is used.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
checkout=$(cd "$1" 2>/dev/null && pwd) || { echo "error: $1 is no directory" >&2; exit 2; }
[ -d "$checkout/src/prime_rl" ] || { echo "error: $checkout is no prime-rl checkout: it has no src/prime_rl" >&2; exit 2; }
venv=${2:-$checkout/.venv-cpu}
shims=$here/tests/helpers/prime_rl_cpu

stamp=$(cat "$here/pyproject.toml" "$shims"/{pins.py,constraints.txt} "$0" "$checkout"/{pyproject.toml,uv.lock} | cksum)
if [ -x "$venv/bin/rl" ] && [ "$(cat "$venv/.rlvr-landscape" 2>/dev/null)" = "$stamp $here" ]; then
    exit 0
fi

python=""
for candidate in python3.12 python3 "$HOME"/.pyenv/versions/3.12.*/bin/python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "error: prime-rl needs Python 3.12 and none was found" >&2; exit 2; }
echo "setting up $venv with $("$python" --version) (a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo '*' > "$venv/.gitignore"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install uv
lists=$venv/rlvr-landscape
"$venv/bin/python" "$shims/pins.py" "$checkout" "$lists"
. "$lists/versions.sh"
# Settings in prime-rl's pyproject.toml are for its own lock; uv reads them where it is started.
cd "$lists"
uv() { "$venv/bin/uv" "$1" "$2" --quiet --python "$venv/bin/python" "${@:3}"; }

# PyTorch's CPU build where its index can be reached, else PyPI's build, which runs on CPUs as well.
uv pip install "torch==$torch" "torchvision==$torchvision" --torch-backend cpu 2>/dev/null ||
    uv pip install "torch==$torch" "torchvision==$torchvision"

sources=(-e "$checkout/packages/prime-rl-configs")
for package in verifiers renderers pydantic-config; do
    if [ -f "$checkout/deps/$package/pyproject.toml" ]; then
        sources+=(-e "$checkout/deps/$package")
    fi
done
pins=(-c constraints.txt --override overrides.txt)
[ -f "$checkout/deps/verifiers/pyproject.toml" ] || pins+=(-c "$shims/constraints.txt")
uv pip install -r requirements.txt "${sources[@]}" verifiers renderers prime-pydantic-config "${pins[@]}"
uv pip install --no-deps -e "$checkout" "modelexpress==$modelexpress"
uv pip install -e "$here" "${pins[@]}"
uv pip install --no-deps -e "$here/environments/rlvr_alphabet_sort" -e "$here/environments/rlvr_word_problems"
# A run starts a dozen processes; each would compile torch, transformers and vLLM where PYTHONDONTWRITEBYTECODE is set.
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" > "$lists/compile.log" 2>&1 || true    # files for other versions
"$venv/bin/python" -c "import prime_rl, torch, transformers, verifiers, vllm, rlvr_landscape_plugin" ||
    { echo "error: the environment does not import in $venv; remove the directory and try again" >&2; exit 2; }
echo "$stamp $here" > "$venv/.rlvr-landscape"
