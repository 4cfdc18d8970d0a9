#!/usr/bin/env bash
# Assemble a kit that installs vLLM and this project on a machine without a network (docs/servers.md says when).
#   scripts/offline_kit.sh DIR [--vllm 0.26.0] [--for torch2.11-cu130-py312] [--part-size 60M] [--thin]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$here/../.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$here/offline_kit.py" "$@"
