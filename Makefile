# `make help` lists the targets; continuous integration calls these and nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
SEED ?= 0
SEEDS ?= 10
TEST_JOBS ?= 2
BIN := $(VENV)/bin
# One thread per process, or several processes collapse on few cores.
RUN := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
S3 := $(VENV)/.installed-s3
AGENTS := $(VENV)/.installed-agents

.PHONY: help install install-dev format lint types test check demo bench-demo bench-weights bench-routes test-s3 test-agents fidelity chaos base clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

install: $(DEMO) ## create .venv with what the demo needs (CPU torch, at most 600 MB)

install-dev: $(DEV) ## the same plus test tools

$(DEMO): pyproject.toml constraints.txt scripts/install.sh
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) demo
	@touch $@

$(DEV): $(DEMO)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) dev
	@touch $@

demo: $(DEMO) ## train a small policy over real services, kill one, audit (SEED=0)
	$(BIN)/lagwise demo --seed $(SEED)

bench-demo: $(DEMO) ## the demo over SEEDS=10 seeds: table and runs/bench/demo.json
	$(BIN)/python -m shared.cli.bench_demo --seeds $(SEEDS)

bench-weights: $(DEMO) ## weights over the bus: table and runs/bench/weights.json (7 minutes)
	$(BIN)/python -m shared.cli.bench_weights

bench-routes: $(DEMO) ## every old-logit route against the exact answer: hours, resumable
	$(RUN) $(BIN)/python -m shared.cli.bench_routes $(ROUTES_ARGS)

test: $(DEV) ## the default suite, without the kill matrix
	$(RUN) $(BIN)/python -m pytest -m "not chaos" -n $(TEST_JOBS) $(PYTEST_ARGS)

$(S3): $(DEV)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) s3-test
	@touch $@

test-s3: $(S3) ## the keyframe store against an S3-compatible server
	$(RUN) $(BIN)/python -m pytest tests/weights/keyframe_store $(PYTEST_ARGS)

$(AGENTS): $(DEV)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) agents-test
	@touch $@

test-agents: $(AGENTS) ## against the real datasets and pydantic-ai packages
	$(RUN) $(BIN)/python -m pytest tests/extras $(PYTEST_ARGS)

fidelity: $(DEV) ## token fidelity of 10,000 tool conversations (COUNT=)
	$(RUN) $(BIN)/python -m tests.env_agents.chat.fidelity --count $(or $(COUNT),10000)

chaos: $(DEV) ## the whole kill matrix; slow
	$(RUN) $(BIN)/python -m pytest -m chaos --timeout 900 $(PYTEST_ARGS)

lint: $(DEV) ## ruff and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(DEV) ## pyright, strict
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV) ## rewrite to the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test ## everything a change must pass

base: $(DEMO) ## warm the demo's base model up again (about a minute)
	$(RUN) $(BIN)/python examples/frozen_lake/make_base.py

clean: ## remove caches; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
