#!/bin/sh
# Renews both locks. They carry hashes and markers for every platform, and name no index.
set -eu
uv=$1
common="--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet"
$uv pip compile $common pyproject.toml --extra demo --group build -o requirements/run.lock
$uv pip compile $common pyproject.toml --extra demo --group dev -o requirements/dev.lock -c requirements/run.lock
