# Everything from a fresh machine with Python 3.11 and gcc. VENV may name an existing environment.
VENV ?= .venv
PYTHON ?= python3.11
PY := $(VENV)/bin/python
STAMP := $(VENV)/.neo_ray-installed

.PHONY: quickstart test check unit test-all clean
.DEFAULT_GOAL := test

# torch first: its pin takes the CPU build on a machine that has one, the CUDA build elsewhere
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(PY) -m neo_ray.sweep sweeps/quickstart.yaml

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy neo_ray

unit: $(STAMP)
	$(PY) -m pytest -q -m "not slow and not cluster and not gpu"

test: check unit

test-all: check
	$(PY) -m pytest -q -m "not gpu"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
