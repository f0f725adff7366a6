#!/usr/bin/env bash
# Creates the environment and runs the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -m pytest "$@"
