# `make demo` and `make test` do all set-up themselves; it is done once and reused.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test faults lint bench inspect clean

demo: $(READY)
	$(BIN)/python -m train.demo

# Triton decides when it is imported whether to interpret its kernels: they have a process of their own.
test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) tests/kernels/fused

# Kills, signals, full drives and damage at other moments each time; `make test` has a short form of it.
faults: $(READY)
	FASTDIFF_FAULTS=long $(BIN)/python -m pytest $(PARALLEL) tests/train/test_faults.py tests/fastdiff/test_checkpoint.py
	$(BIN)/python -m pytest tests/train/test_distributed.py -k dies

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-only

inspect: $(READY)
	$(BIN)/python -m kernels.inspect --markdown docs/results/kernels.md

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fastdiff needs Python 3.11 or newer; name one with make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
