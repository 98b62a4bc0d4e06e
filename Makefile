# make demo     set everything up in .venv and draw samples.png
# make test     the same set-up, then the test suite
#
# On a machine with a GPU:  make demo TORCH=own
# uses the torch (and triton) that PYTHON already has, instead of installing the tested CPU build of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PINS := $(VENV)/constraints.txt
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
ifeq ($(TORCH),own)
VENV_FLAGS ?= --system-site-packages
else
VENV_FLAGS ?=
endif

.PHONY: demo test setup lint format typecheck bench clean

demo: setup
	$(BIN)/fastdiff sample --out samples.png

test: setup
	$(BIN)/pytest $(PYTEST_FLAGS)

setup: $(VENV)/.built

# torch goes first and alone, pinned: asked for by another package, pip would fetch the newest CUDA build of several GB.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
ifeq ($(TORCH),own)
	$(BIN)/python -c "import torch" || { echo "TORCH=own needs a PYTHON that has torch already"; exit 1; }
	grep -vE '^(torch|triton|numpy)==' constraints.txt > $(PINS)
else
	cp constraints.txt $(PINS)
	$(PIP) install -c $(PINS) $(TORCH)
endif
	$(PIP) install -c $(PINS) setuptools wheel ninja numpy
	FASTDIFF_NO_EXTENSION=1 $(PIP) install -c $(PINS) --no-build-isolation -e '.[dev]'
	$(PIP) install -c $(PINS) --no-deps k-diffusion  # the tests read its sampling.py; the rest of it wants torchvision
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python bench/run.py ops

clean:
	rm -rf $(VENV) build dist *.egg-info fastdiff/_C*.so samples.png
