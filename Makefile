# Everything from a fresh machine with Python 3.11 and gcc:  make quickstart  ·  make test
# VENV may name an existing environment; PYTHON makes a new one.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A folder for JUnit reports, one a run of pytest (what .ci/run reads skipped tests from).
REPORTS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.neo_ray-installed
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests run side by side in so many processes, a file in one, each with one thread: none needs the machine for itself.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs -n $(WORKERS) --dist loadfile $(if $(REPORTS),--junitxml=$(REPORTS)/$@.xml)

.PHONY: quickstart test check unit test-all rest slow quickstart-short bench clean
.DEFAULT_GOAL := test

quickstart: $(STAMP)
	$(PY) -m neo_ray.sweep sweeps/quickstart.yaml

# About 20 minutes on two cores.
test: check unit

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

unit: $(STAMP)
	$(PYTEST) -m "not slow and not cluster and not gpu"

test-all: test rest

rest: quickstart-short slow

# pytest ends with 5 where no test has the mark.
slow: $(STAMP)
	$(PYTEST) -m "(slow or cluster) and not gpu" || test $$? -eq 5

# The quickstart as a user runs it, with fewer and shorter trials; its results are thrown away.
quickstart-short: $(STAMP)
	results=$$(mktemp -d) && trap 'rm -rf "$$results"' EXIT && $(PY) -m neo_ray.sweep sweeps/quickstart.yaml \
	  storage.path="$$results" sampler.num_trials=4 sampler.startup_trials=2 training.tokens=1500 evaluation.max_tokens=500

# All figures of docs/benchmarks/README.md, which says what they mean, measured here: about twenty minutes on two idle cores.
bench: $(STAMP)
	$(PY) -m neo_ray.bench step --repeats 5 --out docs/benchmarks
	$(PY) -m neo_ray.bench loss --repeats 5 --tokens 2048 512 --vocabulary 49152 128256 --out docs/benchmarks
	$(PY) -m neo_ray.bench reader --repeats 5 --out docs/benchmarks
	$(PY) -m neo_ray.bench sweep --trials 8 --repeats 1 --out docs/benchmarks
	$(PY) -m neo_ray.bench table docs/benchmarks --readme README.md

# torch first: its pin takes the build for a CPU on a machine whose index offers that, the one for CUDA elsewhere.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): a few minutes, once"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find neo_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +
