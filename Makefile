PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
SLOW := .venv/.installed-slow
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train test slow mutants gpu matrix model one-file book-stats lab notebooks export readme clean

help:       ## list these targets
	@awk -F '## ' '/^[a-z-]+:.*## / {split($$1, name, ":"); printf "  make %-14s  %s\n", name[1], $$2}' $(MAKEFILE_LIST)

train: $(READY)  ## train GPT-2 on Shakespeare's plays in minutes on a CPU; flags of gpt2_train go in ARGS="..."
	@$(BIN)/gpt2_train $(ARGS)

test: $(READY)   ## run every check and every notebook's tests
	@$(BIN)/python .ci/book.py check

slow: $(SLOW)    ## run the notebooks' tests with the slow ones
	@$(BIN)/python .ci/book.py slow $(ARGS)

mutants: $(READY)  ## make plausible mistakes one at a time, and print the test that catches each; ARGS="--list", "--only NAME", ...
	@$(BIN)/python .ci/mutants.py $(ARGS)

matrix: $(READY) ## run tests on other instruction sets, threads, Pythons and torches; ARGS="--quick", "--rows 2,5" or "--list"
	@$(BIN)/python .ci/matrix.py $(ARGS)

# needs no environment of ours: a PYTHON that is named, else that of .venv where there is one, else python3
gpu:             ## run the tests that need a GPU, then measure training on it, in under 6 minutes
	@$(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON)) .ci/gpu.py $(ARGS)

model: $(READY)  ## train the small model that the chapters use, in about 20 minutes on two cores
	$(BIN)/gpt2_train --out runs/plays --vocab_size 2048 --n_layer 4 --n_head 4 --n_embd 256 --block_size 128 \
	  --learning_rate 2e-3 --max_iters 4000 --eval_interval 500 --save_interval 1000 --seed 1337 $(ARGS)
	rm -f nbs/models/plays/*.json nbs/models/plays/merges.txt nbs/models/plays/model.safetensors
	$(BIN)/gpt2_export --model runs/plays --out nbs/models/plays --dtype float16
	cp runs/plays/log.jsonl nbs/runs/plays.jsonl

one-file: $(READY)  ## write nbs/one_file/gpt2.py, a GPT-2 in one file, from the exported cells, and test that it is equal
	@$(BIN)/python .ci/one_file.py

book-stats: $(READY)  ## measure cells, lines, plots and tests of every chapter and module
	@$(BIN)/python .ci/stats.py $(ARGS)

lab: $(READY)    ## open JupyterLab on the notebooks
	@PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --notebook-dir nbs

notebooks: $(READY)  ## run every notebook top to bottom and save its outputs, package and README
	@$(BIN)/python .ci/book.py run
	@$(MAKE) --no-print-directory export readme

export: $(READY) ## write the package from the notebooks
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_export

readme: $(READY) ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/book.py readme

clean:           ## remove the environment and what was built
	rm -rf .venv .matrix build dist *.egg-info

# torch first and by its pin, so that no later package pulls in another build of it
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else "Python 3.10 or later is needed, this is %d.%d; say which with make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

$(SLOW): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,slow]"
	@touch $@
