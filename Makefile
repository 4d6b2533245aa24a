# Every target sets up what it needs; a second call installs nothing. `make help` lists the targets.

VENV         ?= .venv
CUDA         ?= auto
PROMPT       ?= Why is the sky blue? Answer in two sentences.
MODEL        ?= $(VENV)/SmolLM2-135M-Instruct.Q4_1.gguf
RUNFLAGS     ?= --chat --max-tokens 128 --temperature 0.4 --top-p 0.9 --repetition-penalty 1.1 --seed 1
TESTFLAGS    ?= -n auto --dist loadgroup
BENCHFLAGS   ?=
FUZZ_SECONDS ?= 60

# The prompt goes through the environment as it was written: make and the shell expand nothing in it.
override export PROMPT := $(value PROMPT)
export VENV CUDA
unexport PYTHONPATH PYTHONHOME
export NO_MKDOCS_2_WARNING := 1

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test check docs bench fuzz wheel clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; \
	do printf '  make %-10s %s\n' "$$name" "$$text"; done

run: ## run a real small model: make run PROMPT="…"
	@.ci/setup
	@$(BIN)/mortice run --model "$(MODEL)" --prompt="$$PROMPT" $(RUNFLAGS)

test: ## run the whole test suite
	@.ci/setup test
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTFLAGS)

check: ## format, lint, types, the one-way rule, the dependencies, the site
	@.ci/setup test dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy .ci/setup.py
	$(BIN)/deptry .
	$(BIN)/python -m pytest -q tests/unit/test_layering.py
	$(BIN)/mkdocs build --strict --quiet

docs: ## build the site into site/
	@.ci/setup docs
	$(BIN)/mkdocs build --strict

bench: ## measure speeds (pytest-benchmark)
	@.ci/setup test
	@$(BIN)/python -m pytest tests/bench --benchmark-enable --benchmark-only $(BENCHFLAGS)

fuzz: ## fuzz the GGUF loader for FUZZ_SECONDS
	@.ci/setup test fuzz
	@$(BIN)/python tests/fuzz/fuzz_gguf.py -max_total_time=$(FUZZ_SECONDS)

wheel: ## build the wheel and the source distribution into dist/
	@.ci/setup test
	@$(BIN)/python -m hatchling build

clean: ## remove what builds and tools leave behind
	@rm -rf dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	@rm -rf "$(VENV)"
