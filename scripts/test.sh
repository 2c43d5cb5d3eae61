#!/usr/bin/env bash
# Install what is missing, check style, run the tests. Arguments go to pytest: bash scripts/test.sh -k tokenizer

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$checkout/scripts/setup_env.sh"

cd "$checkout"
echo "style"
ruff check
ruff format --check
echo "tests"
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
