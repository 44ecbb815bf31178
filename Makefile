# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv and install into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint check format bench results schema zoo clean

demo: $(VENV)/installed
	$(BIN)/safegen demo --out safegen-demo

test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m ""

# A fraction of a second, so that it is part of the tests. pyright is not: it takes a minute, and fetches itself from npm.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet

check: lint
	$(BIN)/pyright

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/transport.py
	$(BIN)/python benchmarks/audit_log.py
	$(BIN)/python benchmarks/scenes.py

schema: $(VENV)/installed-dev
	$(BIN)/python -c 'import json; from safegen.audit.schema import json_schema as schema; \
	print(json.dumps(schema(), indent=1, ensure_ascii=False))' > docs/reference/audit.schema.json
	$(BIN)/python -m safegen.policy.json_schema

# Measures anew what docs/results.md states, and writes it whether or not a floor is missed; forty minutes.
results: $(VENV)/installed-dev
	$(BIN)/python benchmarks/end_to_end.py --json > benchmarks/results/end_to_end.json; \
	status=$$?; $(BIN)/python benchmarks/report.py && exit $$status

# Trains, calibrates and measures every membrane of safegen-mini, and writes them with their cards to $(ZOO); some three
# minutes a membrane, and as long again to measure it. Stopped, it goes on where it was. `make zoo ZOO=membranes` ships them.
ZOO := zoo
zoo: $(VENV)/installed
	$(BIN)/python -m safegen.mini.train_zoo --out $(ZOO)

clean:
	rm -rf $(VENV) safegen-demo build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/installed
