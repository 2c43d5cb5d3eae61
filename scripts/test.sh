#!/usr/bin/env bash
# Install what is missing, check style, spelling and types, run the tests. Arguments go to pytest: bash scripts/test.sh -k tokenizer
# --yes, as the first argument, installs into an active environment without asking; so does a run without a
# terminal, which is that of a CI in an environment of its own.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ "${1:-}" == --yes ]]; then
    setup_unasked=install
    shift
elif [[ ! -t 0 ]]; then
    setup_unasked=install
fi
setup_extra=test
# shellcheck source=scripts/setup_env.sh
source "$checkout/scripts/setup_env.sh"

cd "$checkout"
echo "style, spelling, types"
ruff check
ruff format --check
python -m codespell_lib
python -m mypy
echo "tests"
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
