# Two commands matter: `make run` and `make test`. Both set up .venv first, from the locks, and install Cairn into it
# with its data path compiled; `make cairn` does so again after a change (they do, too).
# the Python to set .venv up with; without, the quickest of those that are there
PYTHON ?=
SOURCES := $(shell find cache proxy -name '*.py' -o -name '*.html' -o -name '*.js' -o -name '*.css')
# for `make run`: base URLs (by commas) to serve before in place of the local engines, and the ports on loopback
UPSTREAM ?=
PORT ?= 8080
ADMIN_PORT ?= 8090
# for bench-fleet and bench-replay: a trace in Mooncake's form
TRACE ?=

# those that meet compiled code
COMPILED_TESTS := tests/test_compiled.py tests/cache/test_prefix.py $(wildcard tests/cache/test_index*.py) \
  tests/cache/test_journal.py tests/proxy tests/scenarios

# two that set .venv up must not do so at once
.NOTPARALLEL:

.PHONY: run test cairn lint format lock setup-run setup-test clean bench-datapath bench-soak bench-fleet bench-replay \
  bench-peers

run: .venv/.cairn
	@exec .venv/bin/python -m demo --end-with-parent --port "$(PORT)" --admin-port "$(ADMIN_PORT)" \
	  $(if $(UPSTREAM),--upstream "$(UPSTREAM)")

# Twice: what is installed, compiled, by the tests that drive it; then the sources as they stand, by all.
test: .venv/.dev .venv/.cairn
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	PYTHONSAFEPATH=1 .venv/bin/python -m pytest --installed --import-mode=append -m "not engine" $(COMPILED_TESTS)
	.venv/bin/python -m pytest

cairn: .venv/.cairn

format: .venv/.dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

lock: .venv/.dev
	sh scripts/lock.sh .venv/bin/uv

.venv/.run: requirements/run.lock scripts/setup.sh
	@PYTHON="$(PYTHON)" sh scripts/setup.sh run

.venv/.dev: requirements/dev.lock scripts/setup.sh
	@PYTHON="$(PYTHON)" sh scripts/setup.sh dev

.venv/.cairn: .venv/.run $(SOURCES) pyproject.toml hatch_build.py scripts/compile.py
	@sh scripts/setup.sh cairn

# What Cairn costs beside a bare pass-through and, where `make bench-peers` put them, the Rust routers.
# ARGS goes to the program: make bench-datapath ARGS="--rounds 1 --seconds 1"
bench-datapath: .venv/.dev .venv/.cairn
	.venv/bin/python -m benchmarks.datapath $(ARGS)

bench-soak: .venv/.dev .venv/.cairn
	.venv/bin/python -m benchmarks.soak $(ARGS)

# Routing rules on a virtual clock, and live on simulated engines beside the routers that are installed.
bench-fleet: .venv/.dev
	.venv/bin/python -m benchmarks.fleet $(TRACE) $(ARGS)

bench-replay: .venv/.dev .venv/.cairn
	.venv/bin/python -m benchmarks.replay $(TRACE) --peers $(ARGS)

bench-peers: .peers/.done

.peers/.done: benchmarks/peers.lock
	@echo "Setting up .peers (sglang-router and vllm-router, a minute) ..."
	@[ -x .peers/bin/pip ] || $(or $(PYTHON),python3) -m venv .peers
	@.peers/bin/pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r benchmarks/peers.lock
	@touch $@

clean:
	rm -rf .venv .cairn .mypy_cache .ruff_cache .pytest_cache .hypothesis
