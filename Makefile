# make setup | test | test-cuda | lint | bench | results: each does everything on a fresh machine with Python 3.11 and pip.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# 2 processes for 2 cores, each kernel on one thread: fewer would idle, more would fight.
JOBS ?= 2

.PHONY: setup test test-cuda lint format bench results readme

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda,test,lint]'
	touch $@

# In three runs: a process grows by 3.5 MB for each kernel that it compiles, and one that had half of all tests to 12.5 GB.
test: setup
	for files in 'a-c' 'd-m' 'n-z'; do $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/test_[$$files]*.py || exit 1; done

# The CUDA kernels alone, on an emulator; with a GPU, `pytest -m gpu` runs them there.
test-cuda: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/test_ptx.py tests/test_cuda*.py tests/test_bench_cuda.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/check_imports.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/fastpool bench commute

# Goes on where it was stopped; the rows of a machine are one file.  To measure anew, delete that first.
results: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	mkdir -p bench/results
	$(BIN)/fastpool bench pool --resume --json bench/results
	$(BIN)/fastpool bench conv --resume --json bench/results
	$(BIN)/fastpool bench commute --threads 1 --threads 2 --resume --json bench/results
	$(BIN)/fastpool bench commute --conv --threads 1 --threads 2 --resume --json bench/results
	$(BIN)/fastpool bench block --resume --json bench/results
	$(BIN)/fastpool laws --claims --keep bench/results
	$(MAKE) readme

readme: setup
	$(BIN)/python -m fastpool.bench.readme
