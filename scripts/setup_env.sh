#!/usr/bin/env bash
# Make the virtual environment .venv and install the package into it, editable, with one extra.
#
#   scripts/setup_env.sh test|docs|dev
#
# PYTHON           interpreter to make .venv with (default python3; 3.11 or newer)
# TORCH_INDEX_URL  package index to take torch from, e.g. PyTorch's CPU wheels on a machine without a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:?usage: scripts/setup_env.sh test|docs|dev}
python=${PYTHON:-python3}
venv=.venv
py=$venv/bin/python
pins=constraints/py311.txt
log=$venv/setup.log
started=$SECONDS

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
recent() { case $1 in "" | 2.* | 3.[0-9] | 3.10) return 1 ;; esac; }

# Run pip, whole output into the log, one short line per package on the screen.
pip_install() {
    printf '\n== pip install %s\n' "$*" >>"$log"
    "$py" -m pip --disable-pip-version-check install --progress-bar off "$@" 2>&1 | tee -a "$log" | {
        count=0
        while IFS= read -r line; do
            case $line in
                Collecting* | Processing* | *" Collecting "*) count=$((count + 1)); (( count % 20 )) || say "      $count packages resolved" ;;
                *"Downloading "*"("[0-9][0-9]*" MB)"*) say "      ${line#"${line%%[! ]*}"}" ;;
                "Installing collected packages"*) if (( count )); then say "      installing $count packages"; fi ;;
            esac
        done
    } || { tail -n 25 "$log" >&2; fail "pip failed; the whole output is in $log"; }
}

say "[1/4] Python"
if [ ! -x "$py" ]; then
    command -v "$python" >/dev/null || fail "no interpreter '$python'. Install Python 3.11 or newer, or name one: make test PYTHON=/path/to/python3.11"
    found=$(version_of "$python")
    recent "$found" || fail "Python 3.11 or newer is needed, '$python' is ${found:-not a Python}. Name another one: make test PYTHON=/path/to/python3.11"
    "$python" -m venv "$venv" || { rm -rf "$venv"; fail "'$python -m venv' failed. On Debian and Ubuntu the package python$found-venv is needed."; }
fi
version=$(version_of "$py")
recent "$version" || fail "$venv holds ${version:+Python $version}${version:-no working Python}. Remove the folder and run again: rm -rf $venv"
: >"$log"
say "      $version in $venv/"

constraints=()
if [ "$version" = 3.11 ]; then
    constraints=(-c "$pins")
    say "      versions from $pins"
else
    say "      $pins is for Python 3.11: the newest versions are installed"
fi

say "[2/4] torch"
torch_index=()
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    torch_index=(--index-url "$TORCH_INDEX_URL" --no-deps) # what torch needs comes from the usual index in step 3
    say "      from TORCH_INDEX_URL"
elif ! "$py" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null && [ "$(uname -s)" = Linux ]; then
    say "      no NVIDIA GPU found and TORCH_INDEX_URL not set: the default build of torch is taken, which can bring"
    say "      several GB of CUDA libraries. docs/installation.md says how to get the smaller CPU build."
fi
pip_install "${constraints[@]}" "${torch_index[@]}" torch

say "[3/4] spatial-impute and the packages of its extra '$extra' (minutes on the first run)"
pip_install "${constraints[@]}" -e ".[$extra]"

say "[4/4] check"
"$py" -c 'import spatial_impute as si, torch; print(f"      spatial-impute {si.__version__}, torch {torch.__version__}")'
touch "$venv/.stamp-$extra"
say "Environment ready in $((SECONDS - started)) s: $venv/ (log: $log)"
