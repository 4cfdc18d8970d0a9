#!/usr/bin/env bash
# Install this kit into a new directory, without a network, and import what a server needs.
#   bash install.sh DIRECTORY         PYTHON=python3.12 in the environment: the Python that has torch
# Exit code 0: installed and all imports work; 1: installed, some import failed; 2: not installed.
set -euo pipefail
die() { echo "error: $*" >&2; exit 2; }
[ $# = 1 ] || die "usage: bash install.sh DIRECTORY"
kit=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "$python is not here; set PYTHON to the Python that has torch"
python=$(command -v "$python")

wanted=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["python"])' "$kit/kit.json") || die "$kit/kit.json cannot be read"
has=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$has" = "$wanted" ] || die "this kit is for Python $wanted, $python is $has; set PYTHON to another"
[ ! -e "$1" ] || [ -z "$(ls -A "$1")" ] || die "$1 is not empty; name a new directory"
mkdir -p "$1"
target=$(cd "$1" && pwd)

(cd "$kit" && sha256sum --check --quiet --strict SHA256SUMS) || die "the files named above are missing or differ; copy them again"

work=$target/.unfinished
mkdir "$work"
cat "$kit"/kit.tar.* | tar -x -C "$work"
tar -xf "$work/repository.tar" -C "$work"
pip=$(echo "$work"/wheels/pip-*.whl)
mkdir "$work/with-pip"
mv "$pip" "$work/with-pip/"
# --target keeps the dist-info directories: vLLM finds its plugins by them.
"$python" "$work/with-pip/$(basename "$pip")/pip" --disable-pip-version-check --quiet install \
    --no-index --no-deps --no-compile --no-warn-script-location --target "$work/packages" "$work"/wheels/*.whl ||
    die "pip could not install the wheels (see above); remove $target and try again"
mv "$work/packages" "$work/repository" "$target/"
cat > "$target/env.sh" <<END
# . env.sh : use what is installed here
export PYTHONPATH=$target/packages\${PYTHONPATH:+:\$PYTHONPATH}
export PATH=$target/packages/bin:\$PATH
END
rm -r "$work"
echo "installed in $target; use it with: . $target/env.sh"
cd "$target"
PYTHONPATH=$target/packages "$python" "$kit/verify.py" "$kit/kit.json"
