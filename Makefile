# Everything runs in .venv, which the first target that needs it makes. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types examples clean

demo: .venv/.installed  ## train plain and TokenLearner ViTs on handwritten digits; see runs/demo/report.html
	$(BIN)/tokenlearner demo

test: .venv/.installed  ## the test suite, on both cores
	$(BIN)/python -m pytest -n 2

check: lint types test examples  ## exactly what CI runs

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

examples: .venv/.installed  ## the numbered scripts of examples/, each to its end
	$(BIN)/python -m pytest -q examples/run_examples.py

clean:
	rm -rf .venv runs

# constraints.txt pins every version, torch's among them, so that a fresh machine gets what was tested.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'tokenlearner needs Python 3.11 or newer; run make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,onnx,parquet,tensorboard,transformers]"
	touch $@
