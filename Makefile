# make demo       derains the test pictures of Datasets/demo into results/demo with the weights of this repository
# make test       ruff and the test suite, on the CPU
# make test-slow  the tests that take minutes each
# make test-gpu   the tests that need a GPU
# They install what they need into .venv. VENV=path uses an environment of yours as it is; PYTHON=python3.12 chooses the
# Python of .venv.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
installed = $(if $(filter .venv,$(VENV)),.venv/.$(1),$(BIN)/python)

.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-gpu

demo: $(call installed,requirements.txt)
	$(BIN)/python test.py --input_dir Datasets/demo/test/input --target_dir Datasets/demo/test/target \
		--output_dir results/demo --panel results/demo_panel.png
	@echo "Look at results/demo_panel.png: rainy, derained, clean."

test: $(call installed,requirements-dev.txt)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(call installed,requirements-dev.txt)
	$(BIN)/python -m pytest -m slow

test-gpu: $(call installed,requirements-dev.txt)
	$(BIN)/python -m pytest -m gpu

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

$(filter-out .venv/bin/python,$(BIN)/python):
	@echo "$@ does not exist: make that environment first and install requirements-dev.txt, or omit VENV."; exit 1

.venv/.%.txt: %.txt requirements.txt requirements-extras.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --requirement $<
	touch $@
