#!/bin/sh
# Makes .venv from requirements/$1.lock, or with `cairn` for $1 installs Cairn itself into it, its data path compiled:
# with uv where there is one, with pip where not.
set -eu
what=$1

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The first of the candidates, unless another is clearly quicker: a Python built without optimisation costs each request
# a third more. Asked in turns, so that a busy moment of the machine does not decide.
quickest() {
  for _ in 1 2 3; do
    place=0
    for candidate in "$@"; do
      place=$((place + 1))
      took=$("$candidate" scripts/speed.py 2>/dev/null) && echo "$candidate $place $took"
    done
  done | awk '
    !($1 in best) || $3 < best[$1] { best[$1] = $3; place[$1] = $2 }
    END {
      for (name in best) if (first == "" || place[name] < place[first]) first = name
      chosen = first
      for (name in best) if (best[name] * 1.15 < best[first] && best[name] < best[chosen]) chosen = name
      if (chosen != first)
        printf "Taking %s: %s is %.1f times slower (PYTHON=%s takes it all the same)\n", chosen, first,
          best[first] / best[chosen], first > "/dev/stderr"
      print chosen
    }'
}

choose() {
  wanted=${PYTHON:-python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11}
  suitable=
  for candidate in $wanted; do
    if suits "$candidate"; then suitable="${suitable:+$suitable }$candidate"; fi
  done
  if [ -z "$suitable" ]; then
    echo "Cairn needs Python 3.11 or newer; found none as: $wanted. Name one: make PYTHON=/path/to/python3.11 run" >&2
    exit 1
  fi
  # shellcheck disable=SC2086 # names without spaces
  python=$(quickest $suitable)
  [ -n "$python" ] || python=${suitable%% *}
}

if [ "$what" = cairn ]; then
  echo "Installing Cairn, its data path compiled (two minutes) ..."
  if [ -x .venv/bin/pip ]; then
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall .
  else
    VIRTUAL_ENV=.venv uv pip install --quiet --no-deps --no-build-isolation --reinstall-package cairn-proxy .
  fi
  # behind the installed packages, so that demo, benchmarks and tests are found beside an installed Cairn
  .venv/bin/python -c 'import os, sysconfig; print(os.getcwd(), file=open(sysconfig.get_path("purelib") + "/cairn-tree.pth", "w"))'
  case $(.venv/bin/cairn --version) in
    *interpreted*) echo "Not compiled, which costs up to two thirds more CPU: a C compiler or Python's headers are missing." \
      "On Debian and Ubuntu: apt install gcc python3-dev" >&2 ;;
  esac
  touch .venv/.cairn
  exit
fi

# a virtual environment whose interpreter has gone, or is too old, is of no use
suits .venv/bin/python || rm -rf .venv
if [ -d .venv ]; then python=.venv/bin/python; else choose; fi

if command -v uv >/dev/null 2>&1; then
  echo "Setting up .venv with uv, once ..."
  [ -d .venv ] || uv venv --quiet --python "$python" .venv
  VIRTUAL_ENV=.venv uv pip install --require-hashes -r "requirements/$what.lock"
else
  echo "Setting up .venv with pip, once; it takes a minute ..."
  if [ ! -x .venv/bin/pip ] && ! "$python" -m venv .venv >.venv.log 2>&1; then
    cat .venv.log >&2
    rm -rf .venv .venv.log
    echo "$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv (or install uv)." >&2
    exit 1
  fi
  rm -f .venv.log
  .venv/bin/python scripts/pip_install.py "requirements/$what.lock"
fi
touch ".venv/.$what"
# what the developers' lock installs is a superset of what running needs
[ "$what" != dev ] || touch .venv/.run
