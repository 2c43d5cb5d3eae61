#!/usr/bin/env bash
# Write to constraints.txt the newest packages that those of pyproject.toml, with all its extras, may stand on.
# Installs nothing. Run the tests in an environment made anew afterwards.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$checkout/scripts/setup_env.sh"

report=$(mktemp) && trap 'rm -f "$report"' EXIT
extras=$(python -c 'import sys, tomllib
print(",".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]))' "$checkout/pyproject.toml")
setup_choose_index
python -m pip install "${setup_index[@]}" --dry-run --ignore-installed --quiet --report "$report" "$checkout[$extras]"
python - "$checkout" "$report" <<'PYTHON'
import json
import re
import sys
import tomllib
from pathlib import Path

checkout, report = map(Path, sys.argv[1:])
project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
named = [project["name"], *project["dependencies"], *sum(project["optional-dependencies"].values(), [])]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.split("==")[0]).lower()


found = {plain(p["metadata"]["name"]): p["metadata"]["version"] for p in json.loads(report.read_text())["install"]}
lines = [f"{name}=={found[name].split('+')[0]}\n" for name in sorted(found.keys() - set(map(plain, named)))]
head = "# What the packages of pyproject.toml stand on. Refresh: bash scripts/refresh_constraints.sh\n"
(checkout / "constraints.txt").write_text(head + "".join(lines))
print(f"{checkout / 'constraints.txt'}: {len(lines)} packages")
PYTHON
