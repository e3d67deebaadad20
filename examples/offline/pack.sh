#!/usr/bin/env bash
# Packs every wheel that a night needs, for a runner without a network. Run where there is one, from the checkout.
#
#   PYTHON=python3.12 examples/offline/pack.sh [--glibc 2.31] OUT [REQUIREMENT...]
#
# PYTHON       of the runner's version: pip judges environment markers by the interpreter that runs it
# --glibc      the runner's glibc (ldd --version), where it is older than this machine's or this machine has none
# OUT          a folder; wheels that are there already are not fetched again
# REQUIREMENT  instead of all that tox -e nightly and tox itself need
#
# CONSTRAINTS (constraints-gpu.txt) pins the versions. The architecture is this machine's.
set -euo pipefail

stop() {
    echo "pack.sh: $1" >&2
    exit 2
}

python=${PYTHON:-python3.12}
constraints=${CONSTRAINTS:-constraints-gpu.txt}
glibc=""
if [[ ${1-} == --glibc ]]; then
    glibc=${2-}
    [[ $glibc =~ ^2\.[0-9]+$ ]] || stop "--glibc wants a version such as 2.31, not '$glibc'"
    shift 2
fi
[[ ${1-} && ${1-} != -* ]] || stop "say where to: pack.sh [--glibc 2.31] OUT [REQUIREMENT...]"
out=$1
shift
command -v "$python" > /dev/null || stop "there is no $python here: set PYTHON to a Python of the runner's version"
"$python" -m pip --version > /dev/null 2>&1 || stop "$python has no pip: python3.12 -m ensurepip, or a venv's Python"
[[ -f $constraints ]] || stop "there is no $constraints here: run it from the checkout, or set CONSTRAINTS"
mkdir -p "$out"

sources=() # packages that are published as source alone; of pure Python, so that a wheel made here serves there
if [[ $# -eq 0 ]]; then
    set -- '.[tests,awq-peer,bnb,vllm]' 'tox>=4.30' 'setuptools>=77' # setuptools builds the project itself, there
    sources=(autoawq)
fi
if [[ ${#sources[@]} -gt 0 ]]; then
    "$python" -m pip wheel --no-deps --find-links "$out" --constraint "$constraints" --wheel-dir "$out" "${sources[@]}"
fi

platforms=()
if [[ $glibc ]]; then # pip takes a platform by its letter: every older one is named, too
    machine=$(uname -m)
    for minor in $(seq 5 "${glibc#2.}"); do
        platforms+=(--platform "manylinux_2_${minor}_$machine")
    done
    platforms+=(--platform "manylinux2014_$machine" --platform "manylinux2010_$machine" --platform "manylinux1_$machine")
    platforms+=(--platform "linux_$machine")
fi
"$python" -m pip download --only-binary=:all: "${platforms[@]}" --find-links "$out" --constraint "$constraints" \
    --dest "$out" "$@"

(cd "$out" && sha256sum -- *.whl > SHA256SUMS)
echo "$(wc -l < "$out/SHA256SUMS") wheels in $out; on the runner: sha256sum --check --quiet SHA256SUMS"
