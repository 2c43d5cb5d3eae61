#!/usr/bin/env bash
# Sourced by the other scripts: leaves an active Python environment that has everything pyproject.toml names.
#
# An environment that is active already is used; otherwise .venv in the checkout. What was installed is
# remembered in a stamp file inside the environment, so that a second run installs nothing.

setup_fail() {
    echo "error: $*" >&2
    exit 1
}

setup_find_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    setup_fail "no Python 3.11 found on the PATH, and mindspore 2.9.0 with mindformers 1.9.0 needs it:" \
        "install it (for instance: apt install python3.11 python3.11-venv, or conda create -n telechat python=3.11)."
}

setup_activate() {  # checkout
    local python
    # conda activates its own environment "base" at every login; nobody asked for that one
    if [[ "${CONDA_DEFAULT_ENV:-}" == base ]]; then
        unset CONDA_PREFIX
    fi
    if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
        python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
            setup_fail "the active environment ${VIRTUAL_ENV:-$CONDA_PREFIX} is not Python 3.11;" \
                "deactivate it, or activate one that is."
        return
    fi
    if [[ ! -f "$1/.venv/bin/activate" ]]; then
        python=$(setup_find_python) || exit 1
        echo "creating $1/.venv with $($python --version)"
        "$python" -m venv "$1/.venv" ||
            setup_fail "could not create $1/.venv; is the package python3.11-venv installed?"
    fi
    # shellcheck disable=SC1091
    source "$1/.venv/bin/activate"
}

setup_install() {  # checkout
    local stamp wanted
    stamp=${VIRTUAL_ENV:-$CONDA_PREFIX}/telechat2_installed
    wanted="$(sha256sum <"$1/pyproject.toml") $1"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "installing what pyproject.toml names into ${VIRTUAL_ENV:-$CONDA_PREFIX} (minutes, the first time)"
    # On x86 Linux the default index has torch with gigabytes of CUDA packages; PyTorch's own CPU index has
    # none. It is asked only there, and only when it answers: a dead index would make pip wait and fail.
    local index=()
    if setup_wants_cpu_torch; then
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
    python -m pip install "${index[@]}" -e "$1[test]" ||
        setup_fail "pip could not install the packages of $1/pyproject.toml; its messages are above."
    echo "$wanted" >"$stamp.tmp" && mv "$stamp.tmp" "$stamp"
}

setup_wants_cpu_torch() {
    [[ "$(uname -sm)" == "Linux x86_64" ]] && ! command -v nvidia-smi >/dev/null &&
        ! python -c 'import torch' 2>/dev/null &&
        python -c 'import urllib.request as r; r.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=5)' \
            2>/dev/null
}

setup_checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup_activate "$setup_checkout"
setup_install "$setup_checkout"
