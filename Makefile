# make demo       derains the test pictures of Datasets/demo into results/demo with the weights of this repository
# make test       ruff and the test suite
# make test-slow  the tests that take minutes each
# Each installs what it needs into .venv first; VENV=path uses another environment, PYTHON=python3.12 another Python.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test test-slow

demo: $(VENV)/.requirements.txt
	$(BIN)/python test.py --input_dir Datasets/demo/test/input --target_dir Datasets/demo/test/target \
		--output_dir results/demo --panel results/demo_panel.png
	@echo "Look at results/demo_panel.png: rainy, derained, clean."

test: $(VENV)/.requirements-dev.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.requirements-dev.txt
	$(BIN)/python -m pytest -m slow

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%.txt: %.txt requirements.txt requirements-extras.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement $<
	touch $@
