#!/bin/sh
# Makes .venv from requirements/$1.lock: with uv where there is one, with pip where not.
set -eu
lock=$1

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
python=
wanted=${PYTHON:-python3}
[ "$wanted" != python3 ] || wanted="python3 python3.14 python3.13 python3.12 python3.11"
for candidate in $wanted; do
  if suits "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "Cairn needs Python 3.11 or newer; found none as: $wanted. Name one: make PYTHON=/path/to/python3.11 run" >&2
  exit 1
fi
# a virtual environment whose interpreter has gone, or is too old, is of no use
suits .venv/bin/python || rm -rf .venv

if command -v uv >/dev/null 2>&1; then
  echo "Setting up .venv with uv, once ..."
  [ -d .venv ] || uv venv --quiet --python "$python" .venv
  VIRTUAL_ENV=.venv uv pip install --require-hashes -r "requirements/$lock.lock"
  VIRTUAL_ENV=.venv uv pip install --quiet --no-deps --no-build-isolation -e .
else
  echo "Setting up .venv with pip, once; it takes a minute ..."
  if [ ! -x .venv/bin/pip ] && ! "$python" -m venv .venv >.venv.log 2>&1; then
    cat .venv.log >&2
    rm -rf .venv .venv.log
    echo "$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv (or install uv)." >&2
    exit 1
  fi
  rm -f .venv.log
  .venv/bin/python scripts/pip_install.py "requirements/$lock.lock"
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
touch ".venv/.$lock"
# what the developers' lock installs is a superset of what running needs
[ "$lock" != dev ] || touch .venv/.run
