#!/usr/bin/env bash
# Make .venv hold what setup.cfg asks for, in the versions of requirements.lock. Done in a moment when it already does.
#   tools/setup_venv.sh                       called by every target of the Makefile
#   PYTHON=python3.12 tools/setup_venv.sh     with another interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
# The folder belongs to it: an environment that was copied or moved would import the code of the old place.
wanted=$( (cat setup.cfg pyproject.toml requirements.lock && pwd) | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi

fail() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python: no such command; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$("$python" -V 2>&1) is too old, 3.11 or newer is needed; set PYTHON to another interpreter"
"$python" -c 'import ensurepip, venv' 2>/dev/null \
  || fail "$python has no venv module; install it (python3-venv on Debian and Ubuntu)"

echo "setup: installing the versions of requirements.lock into .venv (the first time about 5 GB, some minutes)" >&2
rm -f .venv/installed
[ -x .venv/bin/python ] || rm -rf .venv # absent, half made, or of an interpreter that is gone
[ -d .venv ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet -c requirements.lock -e '.[dev]' \
  || fail "pip could not install everything (its message is above); call again to go on"
echo "$wanted" >.venv/installed
echo "setup: $(.venv/bin/python -V), $(.venv/bin/asr --version) in .venv" >&2
