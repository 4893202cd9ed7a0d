# Two commands: `make demo` runs the main job, `make test` passes the tests. Each installs what it needs.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMPS := .cache
# What dataplane/Cargo.toml asks for; Debian 12's own cargo is older.
RUST_MIN := 1.85
DEBIAN_PACKAGES := $(shell grep -v '^\#' deploy/debian-packages.txt)
RUST_SOURCES := $(shell find dataplane -name '*.rs' -not -path '*/target/*' -not -path '*/fuzz/*') dataplane/Cargo.toml dataplane/Cargo.lock \
	dataplane/core/Cargo.toml dataplane/binding/Cargo.toml
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo || echo 'no-sudo-here:-run-as-root')

.PHONY: demo test check build packages bench bench-quick soak fmt clean sizes fuzz test-python test-rust help lock sim sim-long sim-canaries

help:
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*##/ -/'

build: $(STAMPS)/built  ## the virtual environment and the compiled data plane

packages: $(STAMPS)/packages  ## Debian packages: QEMU tools, nbdkit, fio, libnbd

$(STAMPS)/packages: deploy/debian-packages.txt
	@mkdir -p $(STAMPS)
	@missing=$$(for p in $(DEBIAN_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing Debian packages:" $$missing; \
	$(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >$(STAMPS)/apt.log 2>&1 \
	|| { tail -20 $(STAMPS)/apt.log; exit 1; }; fi
	@touch $@

$(STAMPS)/venv: requirements.lock | $(STAMPS)/packages
	@mkdir -p $(STAMPS)
	@command -v python3.11 >/dev/null || { echo "python3.11 is missing: install Python 3.11, then run this again"; exit 1; }
	@command -v cc >/dev/null || { echo "a C compiler is missing: 'apt-get install gcc' as root, then run this again"; exit 1; }
	@have=$$(cargo --version 2>/dev/null | cut -d' ' -f2); \
	[ "$$(printf '%s\n' $(RUST_MIN) "$${have:-0}" | sort -V | head -1)" = $(RUST_MIN) ] || { \
	echo "Rust $(RUST_MIN) or newer is needed, found: $${have:-none}. Install Rust stable with rustup, then run this again"; exit 1; }
	@echo "creating the virtual environment"
	@python3.11 -m venv $(VENV)
	@$(VENV)/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(STAMPS)/built: $(STAMPS)/venv $(RUST_SOURCES) pyproject.toml
	@echo "compiling the data plane"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/maturin develop --release --locked -q --features sim -m dataplane/binding/Cargo.toml
	@$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: build  ## the main job: a replicated volume loses a replica and nobody notices
	@$(VENV)/bin/dolmen demo

test: test-rust test-python  ## all tests

test-rust: $(STAMPS)/venv
	@cd dataplane && cargo test --locked --release -q -p dolmen-core

test-python: build
	@$(PY) -m pytest tests

SEED ?= 1
SEEDS ?= 1
MINUTES ?= 10
TRACE ?=

sim: build  ## replay a simulated cluster: SEED=n, SEEDS=how many from there, TRACE=1 prints what happens
	@$(PY) -m tests.sim --seed $(SEED) --seeds $(SEEDS) $(if $(TRACE),--trace)

sim-long: build  ## new seeds for MINUTES=m, in as many processes as there are cores
	@$(PY) -m tests.sim --minutes $(MINUTES) --seed $(if $(filter 1,$(SEED)),$$(date +%s)00,$(SEED)) --processes $$(nproc)

sim-canaries: build  ## every switchable bug must be caught; writes docs/testing-canaries.md
	@$(PY) -m tests.sim.canaries --write docs/testing-canaries.md

check: build  ## what CI checks besides tests
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@cd dataplane && cargo fmt --check && cargo clippy --locked --release -q --all-targets --features dolmen-binding/sim -- -D warnings

fmt: build  ## format everything
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix . && cd dataplane && cargo fmt

bench: build  ## measure beside other systems: interleaved rounds, table and picture in bench/out
	@$(VENV)/bin/dolmen bench compare

bench-quick: build  ## the same in a few minutes
	@$(VENV)/bin/dolmen bench compare --rounds 2 --seconds 3

$(STAMPS)/fuzz-tools: tests/fuzz/requirements.lock | $(STAMPS)/venv
	@command -v c++ >/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ >/dev/null; }
	@$(VENV)/bin/pip install -q --disable-pip-version-check --require-hashes -r tests/fuzz/requirements.lock
	@touch $@

fuzz: build $(STAMPS)/fuzz-tools  ## fuzz frames, NBD, store files, parsers and the REST API: SECONDS=60 for each target
	@$(PY) -m tests.fuzz.run --seconds $(or $(SECONDS),60)

soak: build  ## mixed I/O with a random fault every 20 s: MINUTES=60 SEED=7 GUEST=1
	@$(PY) -m tests.soak --minutes $(MINUTES) $(if $(filter file,$(origin SEED)),,--seed $(SEED)) $(if $(GUEST),--guest)

sizes:  ## the longest files
	@git ls-files '*.py' '*.rs' | xargs wc -l | sort -n | tail -15

clean:  ## remove what was built
	rm -rf $(STAMPS) $(VENV) dataplane/target *.so

lock:  ## make requirements.lock again from pyproject.toml (needs uv)
	@uv pip compile -q --python-version 3.11 --generate-hashes --extra dev --extra bench pyproject.toml -o requirements.lock --no-emit-index-url --no-header
