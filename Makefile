# Everything a fresh machine needs is Python 3.11 or later with pip, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin

MOVIELENS = jobs/configs/movielens-100k.yaml
CONFIG ?= $(MOVIELENS)

.PHONY: setup quickstart compare test lint bench bench-prepare bench-train bench-retrieval bench-serve bench-events chaos-serve benchmark-quality fuzz-http audit clean

setup: $(VENV)/.installed

# constraints.txt pins what is tested; with torch pinned, pip takes the CPU build where the index offers one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/python -m springtide.quickstart

# Every preset on one log. Without item texts `embed` has nothing to do, so its failure does not end the run: where
# vectors are missing, `compare` says so.
compare: setup
ifeq ($(CONFIG),$(MOVIELENS))
	$(BIN)/python -c 'from pathlib import Path; from springtide.quickstart import fetch_movielens; fetch_movielens(Path("data/ml-100k"))'
endif
	$(BIN)/python jobs/prepare.py --config $(CONFIG)
	-$(BIN)/python jobs/embed.py --config $(CONFIG)
	$(BIN)/python jobs/compare.py --config $(CONFIG)

# Unit tests side by side, for they use one core each; those with Ray one after the other, for it uses all. The second
# half runs though the first failed.
test: setup
	status=0; \
	$(BIN)/python -m pytest --numprocesses=2 -m "not ray and not cluster" || status=1; \
	$(BIN)/python -m pytest --durations=15 -m "ray or cluster" || status=1; \
	exit $$status

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: bench-prepare bench-train bench-serve

bench-prepare: setup
	$(BIN)/python benchmarks/prepare.py

bench-train: setup
	$(BIN)/python benchmarks/train.py

# Durable events per second of the event log, in SQLite and in Redis.
bench-events: setup
	$(BIN)/python benchmarks/events.py

bench-retrieval: setup
	$(BIN)/python benchmarks/retrieval.py

bench-serve: setup
	$(BIN)/python benchmarks/serve.py

# Faults under a steady load, three minutes each; ARGS="--seconds 25 --faults scorer" is quicker.
chaos-serve: setup
	$(BIN)/python benchmarks/chaos.py $(ARGS)

# 10,000 valid and broken requests from the OpenAPI document: none may be answered by a 5xx.
fuzz-http: setup
	$(BIN)/python benchmarks/fuzz_http.py $(ARGS)

audit: setup
	$(BIN)/python .ci/audit.py

# What the model reaches on real logs, beside its peers; ARGS="--seeds 0" is quicker. See benchmarks/quality.py.
ifneq ($(strip $(DATA)),)
benchmark-quality: setup
	$(BIN)/python benchmarks/quality.py "$(DATA)" $(ARGS)
else
benchmark-quality:
	@echo 'Say where the raw logs are: make benchmark-quality DATA=FOLDER, with ml-latest-small/ and others below it.' >&2
	@exit 2
endif

clean:
	rm -rf $(VENV) workspace
