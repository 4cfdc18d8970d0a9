#!/usr/bin/env bash
# Check the project on this machine's GPU in at most ten minutes, or rehearse the check on a CPU (docs/benchmarks.md).
#   scripts/gpu_check.sh [--rehearse] [--minutes 10] [--only SECTION …] [--smollm2 DIRECTORY]
# PYTHON names the Python that has vLLM and this project; without it .venv is used, then python3. A rehearsal makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    case " $* " in *" --rehearse "*) bash scripts/setup.sh >&2 ;; esac
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
# As they are here, not as they were when the project was installed.
export PYTHONPATH=$PWD:$PWD/analysis:$PWD/environments/rlvr_alphabet_sort${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" benchmarks/gpu_check.py "$@"
