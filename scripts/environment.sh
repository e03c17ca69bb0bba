# Sourced by demo.sh and test.sh: a virtual environment with nasq in it. An active one is used; otherwise .venv is made.
# $1: what to install, such as "." or ".[dev]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python3.13 python3.12 python3.11; do
            if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                break
            fi
        done
        echo "making .venv with $python" >&2
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
echo "installing nasq (the first time this downloads torch, several minutes)" >&2
# The default torch and torchvision belong together; the CPU-only torch wheel has no matching torchvision.
python -m pip install --quiet --disable-pip-version-check -e "$1" >&2
