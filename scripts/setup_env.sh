#!/usr/bin/env bash
# Sourced by the other scripts: leaves an active Python environment that has everything pyproject.toml names.
#
# An environment that is active already is used; otherwise .venv in the checkout. What was installed is
# remembered in a stamp file inside the environment, so that a second run installs nothing. Into an environment
# that no script of ours has made, nothing is installed without being asked: on a terminal by a question,
# elsewhere as setup_unasked says, "refuse" or "install".

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
        [[ ! -e "$1/.venv" || -f "$1/.venv/$setup_ours" || -f "$1/.venv/pyvenv.cfg" ]] ||
            setup_fail "$1/.venv exists and is no Python environment; move it away, or activate an environment."
        python=$(setup_find_python) || exit 1
        echo "creating $1/.venv with $($python --version)"
        mkdir -p "$1/.venv"
        touch "$1/.venv/$setup_ours"
        "$python" -m venv "$1/.venv" ||
            setup_fail "could not create $1/.venv; is the package python3.11-venv installed?"
    fi
    # shellcheck disable=SC1091
    source "$1/.venv/bin/activate"
    [[ "$VIRTUAL_ENV" -ef "$1/.venv" ]] ||
        setup_fail "$1/.venv was made as $VIRTUAL_ENV, and does not work elsewhere (was the checkout moved or copied?);" \
            "delete it (rm -r '$1/.venv') and run this command again."
}

setup_install() {  # checkout
    local environment stamp wanted
    environment=${VIRTUAL_ENV:-$CONDA_PREFIX}
    stamp=$environment/telechat2_installed
    wanted="$(cat "$1/pyproject.toml" "$1/constraints.txt" | sha256sum) $1"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    if [[ "$environment" -ef "$1/.venv" && -f "$environment/$setup_ours" ]]; then
        : # made by this checkout
    elif [[ -f "$stamp" && "$(<"$stamp")" == *" $1" ]]; then
        : # filled for this checkout before, with the consent that it needed
    elif setup_is_complete "$1"; then
        return
    else
        setup_ask "$environment"
    fi
    echo "installing what pyproject.toml names into $environment (minutes, the first time)"
    setup_choose_index
    python -m pip install "${setup_index[@]}" --constraint "$1/constraints.txt" -e "$1[test]" ||
        setup_fail "pip could not install the packages of $1/pyproject.toml into $environment; its messages are" \
            "above. Run this command again when their cause is mended: what is there already is kept."
    echo "$wanted" >"$stamp.tmp" && mv "$stamp.tmp" "$stamp"
}

setup_is_complete() {  # checkout: whether the active environment has all that is needed, in these versions
    python - "$1/pyproject.toml" "$setup_extra" 2>/dev/null <<'PYTHON'
import sys, tomllib
from importlib.metadata import version
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
needed = project["dependencies"] + (project["optional-dependencies"][sys.argv[2]] if sys.argv[2] else [])
for name, pinned in (requirement.split("==") for requirement in needed):
    if version(name).split("+")[0] != pinned:
        sys.exit(1)
PYTHON
}

# An environment that this project did not make may be one that other work depends on.
setup_ask() {  # environment
    local answer=no
    if [[ "$setup_unasked" == install ]]; then
        return
    elif [[ -t 0 && -t 2 ]]; then
        read -r -p "Install what pyproject.toml names (pinned versions) into the active environment $1? [y/N] " answer ||
            answer=no
        [[ "$answer" == [yY] || "$answer" == [yY][eE][sS] ]] && return
    fi
    setup_fail "the active environment $1 was not made for this checkout and lacks packages of it; nothing was" \
        "installed. Run the command again with --yes to install them there, or after" \
        "'${CONDA_PREFIX:+conda }deactivate' for one in $setup_checkout/.venv."
}

# On x86 Linux the default index has torch with gigabytes of CUDA packages; PyTorch's own CPU index has none.
# It is asked only there, and only when it answers: a dead index makes pip wait and fail.
setup_choose_index() {  # sets setup_index, arguments of pip
    local cpu=https://download.pytorch.org/whl/cpu
    setup_index=()
    if [[ "$(uname -sm)" == "Linux x86_64" ]] && ! command -v nvidia-smi >/dev/null &&
        ! python -c 'import torch' 2>/dev/null &&
        python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$cpu/torch/" 2>/dev/null; then
        setup_index=(--extra-index-url "$cpu")
    fi
}

setup_checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup_unasked=${setup_unasked:-refuse}
setup_extra=${setup_extra:-}  # of pyproject.toml, what the sourcing script needs besides the dependencies
setup_ours=telechat2_created
setup_activate "$setup_checkout"
setup_install "$setup_checkout"
