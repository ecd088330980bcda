# Everything runs from a virtual environment that is made on first use.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# The pin keeps a plain CPU wheel where one is offered; a looser range may pull CUDA builds.
TORCH ?= torch==2.13.0
CLIP ?= task:ego-motion
MODEL ?= tubelet-vit
BATCH ?= 8
PROMPT ?= large red triangle moving left on stripes
QUESTION ?= which way does the red square go?
OUT ?= out
DEVICE ?= cpu

.PHONY: run test lint bench fidelity docs clean

run: $(BIN)/.ready
	$(BIN)/tubelet compare "$(CLIP)" --model $(MODEL) --batch $(BATCH) --out "$(OUT)" $(ARGS)
	$(BIN)/tubelet compare "$(PROMPT)" --model tubelet-dit --out "$(OUT)/generator"
	$(BIN)/tubelet ask sample "$(QUESTION)" --recipe "FastVID(keep_ratio=0.25)" \
		--recipe "VidCom2(keep_ratio=0.25) + FastV(layer=2)"

test: $(BIN)/.ready
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(BIN)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The figures of bench/results, on this machine: recipes at a mean of about half of the tokens.
bench: $(BIN)/.ready
	$(BIN)/tubelet compare sample --model videomae-base --device $(DEVICE) --repeats 9 \
		--out "$(OUT)/bench" --recipe "ToMe(r=100, inflection=-1.0)" \
		--recipe "VidTLDR(share=(0.5,))" --recipe "EVAD(keep_ratio=0.35, depths=(0.2,))" \
		--recipe RLT --recipe RandomDrop $(ARGS)
	cp "$(OUT)/bench/report.json" bench/results/videomae-base-$(DEVICE).json

# Accuracy against cost on tubelet's own models; for a GPU: make fidelity DEVICE=cuda
fidelity: $(BIN)/.ready
	$(BIN)/tubelet bench fidelity --device $(DEVICE) --out "$(OUT)/fidelity" $(ARGS)
	$(BIN)/tubelet bench generation --device $(DEVICE) --out "$(OUT)/generation" $(ARGS)

docs: $(BIN)/.ready
	$(BIN)/python docs/generate.py

$(BIN)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[hf,plot,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
