# The only commands anyone must know. `make` prints them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip compiles on one core, for a minute. What can't be compiled is of a newer Python.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
# pyenv shows a version that isn't its chosen one only by this name.
PYTHON_3_12 ?= $(shell python3.12 -c 'print("python3.12")' 2>/dev/null || echo "$$(pyenv prefix 3.12 2>/dev/null)/bin/python3.12")
DEMO_DIR ?= build/demo
# A file's tests share fixtures, so one process has them all. In the order of the files: xdist's own ends
# with those of few tests, which take long, so that one core waits for the other.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup native demo test test-slow test-ray test-gpu test-gpu-memory test-old test-3-12 test-versions test-floors fuzz check fmt fmt-check lint types layers docs docs-check recipes wheel-test cov clean

help: ## Print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo]'
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@$(COMPILE)
	@touch $@

# In build/native, where tests find them. It needs Python alone: one core installs packages meanwhile.
native:
	@$(PYTHON) tests/kernels_cpu/build.py

setup: $(VENV)/.dev ## Create .venv with everything that development needs

demo: $(VENV)/.demo ## Quantize a real model, measure and time it beside its original: one table
	$(BIN)/qtool quantize --recipe bcq-w3g128-demo --overwrite demo:smollm2 $(DEMO_DIR)
	$(BIN)/qtool bench $(DEMO_DIR) --baseline demo:smollm2 --perplexity-windows 4 --no-sweep

test: $(VENV)/.dev native ## Run the tests that need neither card, network nor real model
	$(BIN)/python -m pytest -q $(PARALLEL)

test-slow: $(VENV)/.dev ## Run the tests on the real demo model, and the long ones
	$(BIN)/python -m pytest -q -m slow

test-ray: $(VENV)/.dev ## Run the tests on a Ray cluster of two local nodes (installs the extra)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest -q tests/contract/test_engines.py tests/unit/pipeline/test_shared_work.py -k "ray or cluster"

test-gpu: $(VENV)/.dev ## Run the tests that need a CUDA card
	$(BIN)/python -m pytest -q -m gpu

# Without torch's own pool, so that what lies beyond a tensor isn't another one's.
test-gpu-memory: $(VENV)/.dev ## Run the kernels' tests under CUDA's memory checker (compute-sanitizer)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	    --kernel-name kns=bit_ --kernel-name kns=panel $(BIN)/python -m pytest -q -m gpu tests/kernels

.venv-4.57/.done: tests/versions/transformers-4.57.txt | $(BIN)/python
	$(BIN)/python tests/versions/environment.py .venv-4.57 --no-deps -r $<
	@touch $@

.venv-3.12/.done: pyproject.toml constraints.txt
	$(PYTHON_3_12) -m venv --clear .venv-3.12
	.venv-3.12/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt pydantic pyyaml rich typer
	@touch $@

.venv-floors/.done: tests/versions/floors.py pyproject.toml $(VENV)/.dev
	@mkdir -p build
	$(BIN)/python $< > build/floors.txt
	$(BIN)/python tests/versions/environment.py .venv-floors -r build/floors.txt
	@touch $@

test-old: .venv-4.57/.done $(VENV)/.dev ## Load, generate, save and score with transformers 4.57 (CI, in a minute)
	.venv-4.57/bin/python -m pytest -q -m versions tests/found tests/unit/integrations

test-3-12: ## Compile all with Python 3.12, and run what needs no torch (CI, in seconds)
	@if $(PYTHON_3_12) -c '' 2>/dev/null; then $(MAKE) --no-print-directory .venv-3.12/.done \
		&& .venv-3.12/bin/python -W error tests/versions/without_torch.py; \
	else echo 'Skipped test-3-12: there is no $(PYTHON_3_12).'; fi

test-versions: .venv-4.57/.done $(VENV)/.dev ## Run the tests of loading and executing models with transformers 4.57
	.venv-4.57/bin/python -m pytest -q $(PARALLEL) tests/contract/test_families.py \
		tests/unit/modeling tests/unit/runtime tests/runtime_decode tests/cli/test_end_to_end.py

test-floors: .venv-floors/.done ## Run the command line with the lowest versions that pyproject allows
	.venv-floors/bin/python tests/versions/floors.py --check
	.venv-floors/bin/python -m pytest -q -W default $(PARALLEL) tests/recipes \
		tests/cli/test_help.py tests/cli/test_end_to_end.py

fuzz: $(VENV)/.dev ## Try 20,000 damaged, hostile and odd inputs
	HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -q $(PARALLEL) -m fuzz tests/robustness

check: fmt-check lint types layers docs-check test recipes wheel-test test-old test-3-12 ## Everything that CI checks

fmt: $(VENV)/.dev ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

fmt-check: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev ## Lint
	$(BIN)/ruff check .

types: $(VENV)/.dev ## Check the types
	$(BIN)/mypy

layers: $(VENV)/.dev ## Check that imports only point down
	$(BIN)/lint-imports

docs: $(VENV)/.dev ## Write the generated pages of docs/, and the site into build/site
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-check: $(VENV)/.dev ## Check that the generated pages are fresh
	$(BIN)/python docs/generate.py --check

recipes: $(VENV)/.dev ## Dry-run every recipe on the demo model
	$(BIN)/python -m tests.recipes.dry_runs

wheel-test: $(VENV)/.dev ## Build the wheel and load recipes and kernels from it
	$(BIN)/python -m pytest -q -m wheel tests/unit/test_wheel.py

cov: $(VENV)/.dev ## Measure the coverage of the tests
	$(BIN)/python -m pytest -q --cov --cov-report=term-missing

clean: ## Remove what was built
	rm -rf build dist .venv .venv-3.12 .venv-4.57 .venv-floors .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
