# make demo     set everything up in .venv and draw samples.png
# make test     the same set-up, then the test suite
# make slow     the tests of minutes that the suite leaves out: whole products where it meets every pair
#
# make demo TORCH=own PYTHON=python3
#   uses the torch and all else that PYTHON already has (a CUDA build, say) instead of the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?=
TEST_PROCESSES ?= $(shell nproc 2> /dev/null | awk '{ print ($$1 > 4) ? 4 : $$1 }')

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
RUN := PYTHONSAFEPATH=1 $(BIN)/python -m
SITE := import sysconfig; print(sysconfig.get_path('purelib'))
ifeq ($(TORCH),own)
PINS :=
else
PINS := -c constraints.txt
endif

.PHONY: demo test slow setup lint format typecheck bench clean

demo: setup
	$(BIN)/fastdiff sample --out samples.png

test: setup
	$(RUN) pytest -m alone $(PYTEST_FLAGS) $$(grep -l mark.alone tests/*.py)
	$(RUN) pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_FLAGS)

slow: setup
	$(RUN) pytest -m slow -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_FLAGS)

setup: $(VENV)/.built

# Peers come without what they ask for: the tests read k-diffusion's sampling.py, whose other files want torchvision,
# and of torchcfm its networks and paths, which need no more than torch; flow_matching needs torch and torchdiffeq.
# torch goes first and alone, pinned: asked for by another package, pip would fetch the newest CUDA build of several GB.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),own)
	$(PYTHON) -c "$(SITE)" > "$$($(BIN)/python -c "$(SITE)")/own_torch.pth"
	$(BIN)/python -c "import torch" || { echo "TORCH=own needs a PYTHON that has torch"; exit 1; }
else
	$(PIP) install $(PINS) $(TORCH)
endif
	$(PIP) install $(PINS) 'setuptools>=64' wheel ninja numpy
	FASTDIFF_NO_EXTENSION=1 $(PIP) install $(PINS) --no-build-isolation -e '.[dev]'
	$(PIP) install $(PINS) --no-deps k-diffusion flow_matching torchcfm
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies setup.py $(shell find csrc -type f)
	@echo "building the extension"
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: setup
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

typecheck: setup
	$(RUN) mypy

bench: setup
	$(BIN)/python bench/run.py ops
	$(BIN)/python bench/run.py brownian
	$(BIN)/python bench/run.py table

clean:
	rm -rf $(VENV) build dist *.egg-info fastdiff/_C*.so samples.png
