#!/usr/bin/env bash
# Creates the environment and runs the tests, one process per core; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -n auto --dist worksteal "$@"
