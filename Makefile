# Two commands for a fresh Debian machine with Python 3.11:  make demo  and  make test.
# Everything is installed into .venv, at the versions that constraints.txt names.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test torture check bench format java hosts clean

demo: $(VENV)/.installed
	$(BIN)/penstock demo

test: java hosts check
	$(BIN)/python -m pytest

torture: java hosts $(VENV)/.tests-installed
	$(BIN)/python -m pytest -m torture

check: $(VENV)/.tests-installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# make bench DATA=folder-of-MNIST; without it the 10,000 images of the package serve.
bench: java hosts $(VENV)/.bench-installed
	$(BIN)/python benchmarks/lenet.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/spark.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/collectives.py --ranks 2,4
	$(BIN)/python benchmarks/collectives.py --hosts 2 --bandwidth 1e9 --ranks 2
	$(BIN)/python benchmarks/collectives.py --hosts 2 --bandwidth 1e9 --ranks 2 --train
	$(BIN)/python benchmarks/feed.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/feed.py --spark $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/feed.py --lenet $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/overlap.py

format: $(VENV)/.tests-installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Spark runs on Java, in tests and in benchmarks; Penstock itself needs none.
java:
	@command -v java >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq openjdk-17-jre-headless; \
	  else \
	    echo "pyspark needs Java: apt-get install openjdk-17-jre-headless (as root)" >&2; exit 1; \
	  fi; }

# Several hosts on one machine, by network namespaces; without them those tests say why they are
# skipped.
hosts:
	@command -v ip >/dev/null && command -v tc >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq iproute2; \
	  else \
	    echo "tests between hosts need ip and tc: apt-get install iproute2 (as root)" >&2; \
	  fi; }

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Penstock and what it needs into $(VENV) (a few minutes the first time)" >&2
	$(PIP) --editable .
	@touch $@

$(VENV)/.tests-installed: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.bench-installed: $(VENV)/.installed
	$(PIP) --editable '.[bench]'
	@touch $@

# Debian keeps ensurepip in a package of its own.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || \
	  { echo "Python 3.11 or later is needed, as PYTHON=... or python3 on the path" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq python3-venv; \
	  else \
	    echo "Python's venv is missing: apt-get install python3-venv (as root)" >&2; exit 1; \
	  fi; }
	$(PYTHON) -m venv $(VENV)
