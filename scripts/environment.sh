# Sourced by the other scripts: creates .venv on first use (Python 3.11 or newer) and puts it first on PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -f .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
    echo "installing into .venv (once, a few minutes)" >&2
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; then
        echo "scripts/environment.sh: the packages are not all installed; the next call tries again" >&2
        return 1 2>/dev/null || exit 1
    fi
    touch .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
[ "${BASH_SOURCE[0]}" != "$0" ] || echo "for the commands of the README, once per shell: source scripts/environment.sh" >&2
