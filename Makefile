# `make demo` and `make test` do all the set-up themselves; see `make help`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints/py311.txt
ENV_FILES := pyproject.toml $(PINS) scripts/setup_env.sh
PYTEST_ARGS ?=
NOTEBOOKS ?=

# Data cache: the environment variable wins, then a shared folder beside the checkout, then the user's cache folder.
ifneq ($(wildcard ../shared/data),)
export SPATIAL_IMPUTE_DATA_DIR ?= $(abspath ../shared/data)
endif
# One thread per process: the tests run in two processes, and results do not depend on the machine.
test: export OMP_NUM_THREADS ?= 1
test: export ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS ?= 1
test: export MPLBACKEND ?= agg

.DEFAULT_GOAL := help
.PHONY: help demo test docs notebooks lint clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON (default python3), TORCH_INDEX_URL, SPATIAL_IMPUTE_DATA_DIR, PYTEST_ARGS, NOTEBOOKS"

$(VENV)/.stamp-%: $(ENV_FILES)
	@PYTHON="$(PYTHON)" bash scripts/setup_env.sh $*

demo: $(VENV)/.stamp-test ## run the whole path on HER2ST or a synthetic stack, into demo_output/
	@$(BIN)/python -m spatial_impute demo --output demo_output

test: $(VENV)/.stamp-test ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist worksteal -q --timeout 900 $(PYTEST_ARGS)
	@echo "Tests passed. Environment: $(VENV)/; nothing else was written but caches (make clean removes them)."

notebooks: $(VENV)/.stamp-docs ## run the tutorials of docs/notebooks and keep their output
	@$(BIN)/python scripts/run_notebooks.py $(NOTEBOOKS)

docs: $(VENV)/.stamp-docs ## build the documentation, warnings are errors
	@offline=$${DOCS_OFFLINE:-$$($(BIN)/python docs/conf.py)}; \
	DOCS_OFFLINE=$$offline $(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html
	@echo "Documentation: docs/_build/html/index.html"

lint: $(VENV)/.stamp-dev ## check style, formatting, complexity, types and dead code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/vulture src --min-confidence 80

clean: ## remove build output, caches and demo_output/ (keeps .venv)
	@rm -rf build dist demo_output docs/_build docs/generated docs/_static/gallery .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
	@echo "Removed build output, caches and demo_output/. The environment $(VENV)/ is kept; rm -rf $(VENV) removes it."
