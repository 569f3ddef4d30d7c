# make help says what there is. Every target sets up its environment first, once: scripts/setup_env.py
# keeps a stamp, says what it will download, and runs the command inside the environment.
#
#   TORCH   auto (default: the CPU build where no NVIDIA GPU is seen), cpu, cuda,
#           or keep: no .venv, the Python and the torch of the environment in use
#   PYTHON  the Python to build .venv with, or to use with TORCH=keep
#   OUT     where quickstart puts its pictures
#   ARGS    more arguments for pytest or quickstart

PYTHON ?= python3
TORCH ?= auto
OUT ?= out/quickstart
ARGS ?=

SETUP = "$(PYTHON)" scripts/setup_env.py --torch $(TORCH)
DEV = $(SETUP) --extra dev

.DEFAULT_GOAL := help
.PHONY: help quickstart demo test test-fast lint typecheck aot gpu-report wheel bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22
	@echo "  TORCH=auto|cpu|cuda|keep (now: $(TORCH)), PYTHON=$(PYTHON), OUT=$(OUT), ARGS="

quickstart:  ## install, then draw pictures with and without guidance on the built-in model
	@$(SETUP) -- -m attn_control quickstart --out "$(OUT)" $(ARGS)
	@echo "The pictures are in $$(cd "$(OUT)" && pwd)"

demo:  ## install, then serve the studio: pictures without and with control, in the browser
	@$(SETUP) --extra demo -- -m attn_control studio $(ARGS)

test:  ## the whole test suite
	@$(DEV) -- -m pytest $(ARGS)

test-fast:  ## the suite without what is marked slow
	@$(DEV) -- -m pytest -m "not slow" $(ARGS)

lint:  ## ruff: rules and format
	@$(DEV) -- -m ruff check .
	@$(DEV) -- -m ruff format --check .

typecheck:  ## mypy on the public API
	@$(DEV) -- -m mypy

aot:  ## compile the Triton kernels for GPUs that are not here, and hold the binaries to limits
	@$(DEV) -- -m attn_control.kernels.aot --extras few --jobs 2

gpu-report:  ## measure the kernels on the GPU that is here, into docs/gpu (without one: not run)
	@$(DEV) -- -m attn_control.kernels.report

wheel:  ## dist/attn_control-*.whl
	@$(DEV) -- -m build --wheel --no-isolation

bench:  ## every benchmark, one after the other
	@$(DEV)
	@set -e; for file in benchmarks/*.py; do \
		[ -e "$$file" ] || continue; \
		echo "== $$file"; $(DEV) -- "$$file"; \
	done

clean:  ## what builds and tests leave behind; .venv and the pictures stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
