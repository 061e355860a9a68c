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
MEGATRON := $(VENV)/.installed-megatron
TRACKERS := $(VENV)/.installed-trackers
# TRL's step is timed in an environment of its own.
TRL_VENV ?= .venv-trl
TRL := $(TRL_VENV)/.installed
# Environments and their packages get a virtual environment of their own.
VENV_ENVS ?= .venv-envs
ENVS := $(VENV_ENVS)/.installed
# vLLM holds transformers back: its environment is its own.
VLLM_VENV ?= .venv-vllm
VLLM := $(VLLM_VENV)/.installed
VLLM_BASE := runs/base-vllm
ENGINE ?= torch
TASK ?= frozen_lake
RETAIL_BASE := runs/base-retail_tools
CHART := $(VENV)/.installed-chart
TOOLS := .tools/.ready
RELEASE_NAME ?= lagwise-test
NAMESPACE ?= lagwise-test

.PHONY: help install install-dev format lint types test check demo bench-demo bench-weights bench-loss bench-routes test-s3 chaos base clean \
	tools chart chart-run chart-package generated install-vllm test-vllm bench-rollout demo-torch demo-vllm demo-frozen_lake demo-retail_tools images push test-images test-cluster test-control-plane bench-envs test-envs test-agents test-distributed test-trackers bench-learner fidelity

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

install-vllm: $(VLLM) ## create .venv-vllm: vLLM for CPUs and what its tests need (1.8 GB)

$(VLLM): pyproject.toml constraints-vllm.txt scripts/install.sh
	@PYTHON=$(PYTHON) scripts/install.sh $(VLLM_VENV) rollout-cpu
	@touch $@

demo: demo-$(TASK) ## train a small policy over real services, kill one, audit (SEED=0, TASK=frozen_lake|retail_tools, ENGINE=torch|vllm)

demo-frozen_lake: demo-$(ENGINE)

# The base is made once, within the demo's ten minutes, and depends on what it is made of.
$(RETAIL_BASE)/config.json: $(wildcard examples/retail_tools/*.py) examples/retail_tools/chat_template.jinja | $(DEMO)
	rm -rf $(RETAIL_BASE) $(RETAIL_BASE).partial
	$(RUN) $(BIN)/python examples/retail_tools/make_base.py --out $(RETAIL_BASE).partial
	mv $(RETAIL_BASE).partial $(RETAIL_BASE)

demo-retail_tools: $(DEMO) $(RETAIL_BASE)/config.json
	$(BIN)/lagwise demo --config examples/retail_tools/values.yaml --run-dir runs/demo-retail_tools \
		--seed $(SEED) $(DEMO_ARGS)

demo-torch: $(DEMO)
	$(BIN)/lagwise demo --seed $(SEED)

# vLLM's attention on CPUs knows no heads of size 24: the same policy with heads of 32.
$(VLLM_BASE)/config.json: | $(DEMO)
	rm -rf $(VLLM_BASE) $(VLLM_BASE).partial
	$(RUN) $(BIN)/python examples/frozen_lake/make_base.py --out $(VLLM_BASE).partial --head-dim 32
	mv $(VLLM_BASE).partial $(VLLM_BASE)

demo-vllm: $(DEMO) $(VLLM) $(VLLM_BASE)/config.json
	LAGWISE_ROLLOUT_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/lagwise demo --seed $(SEED) \
		--run-dir runs/demo-vllm --set model.source=$(VLLM_BASE) --set rollout.engine=vllm \
		$(DEMO_ARGS)

bench-demo: $(DEMO) ## the demo over SEEDS=10 seeds: table and runs/bench/demo.json
	$(BIN)/python -m shared.cli.bench_demo --seeds $(SEEDS)

bench-weights: $(DEMO) ## weights over the bus: table and runs/bench/weights.json (7 minutes)
	$(BIN)/python -m shared.cli.bench_weights

bench-loss: $(DEMO) ## loss and diagnostics within a training step: table and runs/bench/loss.json (4 minutes)
	$(RUN) $(BIN)/python -m shared.cli.bench_loss

$(TRL): pyproject.toml constraints.txt scripts/install.sh
	@PYTHON=$(PYTHON) scripts/install.sh $(TRL_VENV) bench-trl
	@touch $@

bench-learner: $(MEGATRON) $(TRL) ## the learner's step against Hugging Face, TRL and both backends: runs/bench/learner.json (20 minutes)
	$(RUN) $(BIN)/python -m shared.cli.bench_learner --trl-python $(TRL_VENV)/bin/python $(LEARNER_ARGS)

bench-routes: $(DEMO) ## every old-logit route against the exact answer: hours, resumable
	$(RUN) $(BIN)/python -m shared.cli.bench_routes $(ROUTES_ARGS)

test: $(DEV) ## the default suite, without the kill matrix
	$(RUN) $(BIN)/python -m pytest -m "not chaos and not chart and not chart_run and not vllm and not distributed and not cluster" -n $(TEST_JOBS) $(PYTEST_ARGS)

$(S3): $(DEV)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) s3-test
	@touch $@

test-s3: $(S3) ## the keyframe store against an S3-compatible server
	$(RUN) $(BIN)/python -m pytest tests/weights/keyframe_store $(PYTEST_ARGS)

$(MEGATRON): $(DEV)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) megatron
	@touch $@

test-distributed: $(MEGATRON) ## backends and services on several ranks: FSDP2 and megatron-core layouts (20 minutes)
	$(RUN) $(BIN)/python -m pytest -m distributed tests/distributed tests/backends $(PYTEST_ARGS)

$(CHART): $(DEV)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) chart
	@touch $@

$(TOOLS): scripts/tools.sh
	@PYTHON=$(PYTHON) scripts/tools.sh
	@touch $@

tools: $(TOOLS) ## fetch helm, kubectl, prometheus, promtool and checkov into .tools/

chart: $(CHART) $(TOOLS) ## the Helm chart: lint, render, validate, accounts, rules, dashboards
	$(RUN) $(BIN)/python -m pytest tests/charts -m chart $(PYTEST_ARGS)

chart-run: $(CHART) $(TOOLS) ## a rendered release as local processes: train, scale 2-4-1, lose nothing
	$(RUN) $(BIN)/python -m pytest tests/charts -m chart_run $(PYTEST_ARGS)

chart-package: $(TOOLS) ## dist/lagwise-VERSION.tgz
	.tools/helm package charts/lagwise --destination dist

generated: $(CHART) ## renew what code writes: schema, NATS accounts, dashboards, docs/wire.md
	$(BIN)/python -m shared.cli.wire_doc --write
	$(BIN)/python -m shared.cli.values_schema --write
	$(BIN)/python -m shared.cli.nats_accounts --write
	$(BIN)/python scripts/dashboards.py --write

images: ## build the images (REGISTRY=, TAG=, BASE_IMAGE=, TORCH=); `make images push REGISTRY=...`
	$(if $(filter push,$(MAKECMDGOALS)),@:,scripts/images.sh build)

push: ## build and push the images to REGISTRY
	scripts/images.sh push

test-images: ## build the images and run them hardened (docker or podman)
	scripts/images.sh test

test-cluster: $(CHART) $(TOOLS) ## install, upgrade, scale, uninstall on a real cluster (KUBECONFIG=, REGISTRY=)
	$(RUN) RELEASE=$(RELEASE_NAME) NAMESPACE=$(NAMESPACE) scripts/test_cluster.sh

test-control-plane: $(CHART) $(TOOLS) ## the same on a control plane built here, with processes as pods (builds for 10 minutes once)
	scripts/control_plane.sh
	$(RUN) $(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

test-vllm: $(VLLM) $(DEV) $(VLLM_BASE)/config.json ## the engine contract and what only vLLM has, on real engines (4 minutes)
	$(RUN) LAGWISE_TEST_ENGINES=vllm $(VLLM_VENV)/bin/python -m pytest \
		tests/rollout/test_engine_contract.py tests/rollout/vllm --timeout 240 -W default \
		-o asyncio_default_test_loop_scope=session -o asyncio_default_fixture_loop_scope=session \
		$(PYTEST_ARGS)
	$(RUN) LAGWISE_ROLLOUT_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
		$(BIN)/python -m pytest tests/e2e/test_vllm.py $(PYTEST_ARGS)

bench-rollout: $(VLLM) $(DEMO) ## against bare vLLM, and asynchronous against synchronous: runs/bench/rollout.json (35 minutes)
	$(RUN) $(VLLM_VENV)/bin/python -m shared.cli.bench_rollout $(ROLLOUT_ARGS)
	$(RUN) LAGWISE_ROLLOUT_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
		$(BIN)/python -m shared.cli.bench_async $(ASYNC_ARGS)

$(ENVS): pyproject.toml constraints.txt scripts/install_envs.sh
	@PYTHON=$(PYTHON) scripts/install_envs.sh $(VENV_ENVS)
	@touch $@

test-envs: $(ENVS) ## environments and verifiers against the real packages (own .venv-envs)
	$(RUN) $(VENV_ENVS)/bin/python -m pytest tests/real_packages $(PYTEST_ARGS)

bench-envs: $(DEMO) ## env steps per second and memory of 200 concurrent episodes (2 minutes)
	$(RUN) $(BIN)/python -m shared.cli.bench_envs

$(AGENTS): $(DEV)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) agents-test
	@# for the template texts that it ships; nothing of it is imported
	@$(BIN)/python -m pip install --quiet --no-deps trl==1.16.0
	@touch $@

test-agents: $(AGENTS) ## against the real datasets and pydantic-ai packages
	$(RUN) $(BIN)/python -m pytest tests/extras $(PYTEST_ARGS)

$(TRACKERS): $(DEV)
	@PYTHON=$(PYTHON) scripts/install.sh $(VENV) trackers-test
	@touch $@

test-trackers: $(TRACKERS) ## trackers against the real tensorboard and wandb (1 minute)
	$(RUN) $(BIN)/python -m pytest tests/extras/test_trackers.py $(PYTEST_ARGS)

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
