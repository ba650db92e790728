# make demo   set up, train LoRA and Flat-LoRA on 23 icons, draw them side by side
# make test   set up, run all tests; make test-fast: the quick ones
# make app    set up, serve a page that compares the two
# make quality  lint, formatting, types, layers of imports

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast app quality

demo: $(READY)
	$(BIN)/python train_dreambooth_flat.py --config assets/demo.yaml

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow and not process and not browser and not distributed"

app: $(READY)
	$(BIN)/python app.py

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
