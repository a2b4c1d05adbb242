# Everything runs in .venv, which any target makes on its own.
PYTHON ?= python3
CONFIG ?= configs/tiny.yaml
ARGS ?=
NPROC ?= 1
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: help setup finetune report eval stream serve bench gpu-check check test slow coverage clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: .venv/.ready  ## make .venv and install (3 GB, some minutes)

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  "Python 3.10 to 3.12 is needed, this is %d.%d: make PYTHON=python3.11 ..." % v)'
	@echo "installing into .venv (torch and CUDA libraries: 3 GB, some minutes)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

ifeq ($(NPROC),1)
TRAIN := $(PY) -m finetune.train
else
TRAIN := .venv/bin/torchrun --standalone --nproc-per-node $(NPROC) -m finetune.train
endif

finetune: setup  ## train as CONFIG says (default configs/tiny.yaml), then measure; NPROC=8 GPUs, ARGS="--max_steps 100"
	@$(TRAIN) $(CONFIG) $(ARGS)

CHECKPOINT := checkpoints/checkpoint_000250
report: setup  ## train the arms of the comparison that are missing (20 minutes), score them all, write runs/eval/tiny-250/report.html
	@for arm in tiny tiny_lora tiny_writing_off tiny_memory_only; do \
	  $(PY) -m finetune.train configs/$$arm.yaml || exit $$?; done
	@$(PY) -m eval.librilight --checkpoint runs/tiny/$(CHECKPOINT) --baseline runs/tiny_lora/$(CHECKPOINT) \
	  --baseline runs/tiny_writing_off/$(CHECKPOINT) --baseline runs/tiny_memory_only/$(CHECKPOINT) $(ARGS)

eval: setup  ## score the newest checkpoint on the held-out recordings; ARGS="--data DIR"
	@$(PY) -m eval.librilight $(ARGS)

stream: setup  ## talk to the newest checkpoint; ARGS="--file in.wav --out out.wav", or --mic
	@$(PY) -m moshi_ttt.stream $(ARGS)

serve: setup  ## talk to it in the browser, many at once; ARGS="--max-sessions 4"
	@$(PY) -m moshi_ttt.serve $(ARGS)

bench: setup  ## time the memories' ops against their baselines
	@$(PY) -m eval.bench.ops $(ARGS)

gpu-check: setup  ## on a CUDA machine: streaming and training at the 7B's shape, random weights
	@$(PY) -m eval.bench.gpu_check $(ARGS)

check: setup  ## ruff, basedpyright and import-linter
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/basedpyright
	@.venv/bin/lint-imports

test: setup  ## the default tests (minutes)
	@$(PY) -m pytest -n auto --dist loadfile $(ARGS)

slow: setup  ## the long tests
	@$(PY) -m pytest -m slow $(ARGS)

coverage: setup  ## the default tests, with the coverage of moshi_ttt
	@$(PY) -m pytest --cov=moshi_ttt --cov-report=term-missing $(ARGS)

clean:  ## remove .venv; data/ and runs/ stay
	rm -rf .venv
