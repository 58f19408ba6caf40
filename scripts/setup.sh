#!/bin/sh
# Makes .venv from requirements/$1.lock: with uv where there is one, with pip where not.
set -eu
lock=$1
python=${PYTHON:-python3}
"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Cairn needs Python 3.11 or newer; this one is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11")
PY
if command -v uv >/dev/null 2>&1; then
  echo "Setting up .venv with uv ..."
  [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
  VIRTUAL_ENV=.venv uv pip install --quiet --require-hashes -r "requirements/$lock.lock"
  VIRTUAL_ENV=.venv uv pip install --quiet --no-deps --no-build-isolation -e .
else
  echo "Setting up .venv with pip (a minute or two the first time) ..."
  [ -x .venv/bin/pip ] || "$python" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r "requirements/$lock.lock"
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
touch ".venv/.$lock"
# what the developers' lock installs is a superset of what running needs
[ "$lock" != dev ] || touch .venv/.run
