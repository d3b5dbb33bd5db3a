PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
SLOW := .venv/.installed-slow
DOCS := .venv/.installed-docs
LAB := .venv/.installed-lab
NOTEBOOKS ?= nbs
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train test slow gpu matrix model headline plan-fit gpt2 one-file mutants book-stats lab lab-test docs notebooks \
  export readme hooks release-check clean

help:       ## list these targets
	@awk -F '## ' '/^[a-z0-9-]+:.*## / {split($$1, name, ":"); printf "  make %-14s  %s\n", name[1], $$2}' $(MAKEFILE_LIST)

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
	  --init_std 0.02 --learning_rate 2e-3 --max_iters 4000 --eval_interval 500 --save_interval 1000 --seed 1337 $(ARGS)
	rm -f nbs/models/plays/*.json nbs/models/plays/merges.txt nbs/models/plays/model.safetensors
	$(BIN)/gpt2_export --model runs/plays --out nbs/models/plays --dtype float16
	cp runs/plays/log.jsonl nbs/runs/plays.jsonl

headline: $(READY)  ## compare the default recipe with nanoGPT's CPU quick start at equal text, context and seconds
	@$(BIN)/python .ci/headline.py $(ARGS)

plan-fit: $(READY)  ## follow two plans to the end, the default run and --fit for ten minutes: predicted and measured
	@$(BIN)/python .ci/plan_fit.py $(ARGS)

gpt2: $(READY)   ## run the chain of proof, greedy text and HellaSwag with OpenAI's 124M weights
	@$(BIN)/python .ci/gpt2.py $(ARGS)

one-file: $(READY)  ## write nbs/one_file/gpt2.py, a GPT-2 in one file, from the exported cells, and test that it is equal
	@$(BIN)/python .ci/one_file.py

book-stats: $(READY)  ## measure cells, lines, plots and tests of every chapter and module
	@$(BIN)/python .ci/stats.py $(ARGS)

lab: $(READY)    ## open JupyterLab on the notebooks
	@PATH="$(abspath $(BIN)):$$PATH" jupyter lab --notebook-dir $(NOTEBOOKS) $(ARGS)

lab-test: $(LAB) ## run a chapter in JupyterLab in a headless Chromium and look at what a reader sees; ARGS="--out DIR"
	@$(BIN)/python .ci/lab.py $(ARGS)

docs: $(DOCS)    ## build the site from the notebooks as committed, in _site, and check its links
	@$(BIN)/python .ci/docs/build.py

notebooks: $(SLOW)  ## run the notebooks whose code changed (ARGS=--all: all) and save outputs, package and README
	@$(BIN)/python .ci/book.py run $(ARGS)
	@$(MAKE) --no-print-directory export readme

export: $(READY) ## write the package from the notebooks
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_export

readme: $(READY) ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/book.py readme

# nbdev's hooks, but with the full path of its programs, so that they also run where .venv is not active
hooks: $(READY)  ## let git merge notebooks cell by cell; once per clone
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_install_hooks
	@git config --local merge.nbdev-merge.driver '"$(CURDIR)/$(BIN)/nbdev_merge" %O %A %B %P'
	@printf '#!/bin/sh\nexec "%s/nbdev_trust"\n' "$(CURDIR)/$(BIN)" > .git/hooks/post-merge

release-check: $(READY)  ## build the wheel, install it alone, and try every command and ten steps of training
	@$(BIN)/python .ci/release.py $(ARGS)

clean:           ## remove the environment and what was built
	rm -rf .venv .matrix _site build dist *.egg-info

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

$(DOCS): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,docs]"
	@touch $@

$(LAB): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,lab]"
	@touch $@
