# Every target sets up what it needs; on a fresh clone `make distill` alone runs everything.
CONFIG ?= data/demo/demo.toml
VENV ?= .venv
PYTHON3 ?= python3
BIN := $(VENV)/bin

.PHONY: setup cache-teacher distill evaluate demo-teacher test acceptance lint bench clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# The default config is the demo's, so the demo is made where it is wanted.
data/demo/demo.toml: | setup
	$(BIN)/dimefm demo data/demo

cache-teacher: setup $(CONFIG)
	$(BIN)/dimefm cache-teacher $(CONFIG)

distill: cache-teacher
	$(BIN)/dimefm distill $(CONFIG)
	$(BIN)/dimefm evaluate $(CONFIG)

# Scores stand at the end of `distill`, which does again only what is not done.
evaluate: distill

# The demo's teacher, which the package ships, trained again: minutes of one core.
demo-teacher: setup
	$(BIN)/python -m dimefm.stages.demo.tiny_teacher

test: setup
	$(BIN)/pytest

acceptance: setup
	$(BIN)/pytest -m acceptance

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/gather.py
	$(BIN)/python benchmarks/stage_one.py
	$(BIN)/python benchmarks/verify_speed.py
	$(BIN)/python benchmarks/distill_vs_online.py
	$(BIN)/python benchmarks/distill_vs_bare.py
	$(BIN)/python benchmarks/wide_softmax.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/loader_memory.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
