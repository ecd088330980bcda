# Everything runs from a virtual environment that is made on first use.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# The pin keeps a plain CPU wheel where one is offered; a looser range may pull CUDA builds.
TORCH ?= torch==2.13.0
CLIP ?= sample
MODEL ?= videomae-small
OUT ?= out

.PHONY: run test lint bench docs clean

run: $(BIN)/.ready
	$(BIN)/tubelet compare "$(CLIP)" --model $(MODEL) --out "$(OUT)" $(ARGS)

test: $(BIN)/.ready
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(BIN)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The figures of bench/results, on this machine.
bench: $(BIN)/.ready
	$(BIN)/python -m bench.encoders $(ARGS)

docs: $(BIN)/.ready
	$(BIN)/python -m docs.generate

$(BIN)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[hf,plot,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
