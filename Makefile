# Every target does its own set-up on a fresh machine; stamp files in the environment remember what is installed.
#
#   PYTHON=...   interpreter that makes the environment (default: python3). If it can import torch, that torch is used.
#   VENV=...     an environment of your own to install into; default .venv, which is created.
#   TORCH=...    another version of torch than the one in constraints.txt, for a new environment.
#   JOBS=2       how many files of tests run at once; 0: one, in this process, for a debugger.
#   ARGS=...     extra arguments of pytest or of the benches;  ONLY=name, QUICK=1: see bench.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=$(abspath $(VENV))/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/pip -qq
DATA ?= data
JOBS ?= 2
AT_ONCE := -n $(JOBS) --dist loadfile
MAKEFLAGS += --no-print-directory

.PHONY: setup demo test test-all test-fast test-clusters test-transformers fuzz lint docs package bench help

help:
	@echo "make setup | demo | test | test-fast | test-all | test-clusters | test-transformers | fuzz [CASES=500] [SEED=1] | lint | docs | package | bench [ONLY=name] [QUICK=1]"

setup: $(VENV)/.stamp-test

# The environment and torch. A torch that is already there stays, and pip is kept from replacing it; otherwise the CPU
# build pinned in constraints.txt is installed (a plain "torch" brings gigabytes of CUDA packages).
$(VENV)/.stamp-torch: constraints.txt
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  $(BIN)/python -c 'import torch; print("torch==" + torch.__version__); print("setuptools<81")' > $(VENV)/constraints.txt; \
	else sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt > $(VENV)/constraints.txt; fi
	@echo "setup: torch"
	@$(PIP) install torch numpy
	@touch $@

# The demo does without the packages that only tests need.
$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml
	@echo "setup: modelparallel and what the examples need"
	@$(PIP) install -e '.[examples]'
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	@echo "setup: modelparallel and what its tests and examples need"
	@$(PIP) install -e '.[test,mpi,examples]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-test
	@echo "setup: linters"
	@$(PIP) install -e '.[dev]'
	@touch $@

$(DATA)/MNIST/.stamp: examples/mnist/get_mnist.py | $(VENV)/.stamp-torch
	@echo "MNIST: $(DATA)/MNIST/raw"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python examples/mnist/get_mnist.py $(DATA)
	@touch $@

# The seed's two training jobs, 8 processes each, on real MNIST.
demo: $(VENV)/.stamp-demo $(DATA)/MNIST/.stamp
	@$(BIN)/python examples/mnist/demo.py --data $(DATA) $(ARGS)

test: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest -q -m "not slow" $(AT_ONCE) $(ARGS)

# Those that start no process, in a minute: while you write.
test-fast: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest -q -rfE -m "not slow" --without-ranks $(ARGS)

test-all: $(VENV)/.stamp-dev $(DATA)/MNIST/.stamp
	@$(BIN)/python -m pytest -q $(AT_ONCE) $(ARGS)

# Several hosts (network namespaces, which need root) and the engines of clusters. What the machine refuses is skipped,
# with the reason. NUM_ROUNDS=10: a hundred small jobs by every means; NUM_STARTS=40: so many starts beside other work.
test-clusters: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest -q $(AT_ONCE) $(ARGS) tests/clusters

# What has to do with transformers, once more with the oldest version that is supported (which lies beside the
# environment's own).
OLDEST_TRANSFORMERS ?= transformers==4.57.*
$(VENV)/transformers-oldest/.stamp: $(VENV)/.stamp-test
	@echo "setup: $(OLDEST_TRANSFORMERS)"
	@$(PIP) install --upgrade --target $(@D) '$(OLDEST_TRANSFORMERS)'
	@touch $@

test-transformers: $(VENV)/transformers-oldest/.stamp
	@PYTHONPATH=$(abspath $(VENV))/transformers-oldest $(BIN)/python -m pytest -q \
	  tests/test_huggingface.py tests/test_huggingface_training.py tests/test_huggingface_examples.py \
	  tests/test_plan_families.py tests/test_recorded_values.py tests/test_export_hf.py tests/test_trainer.py \
	  $(ARGS)

# CASES random programs on random pipelines, and CASES random scripts with side doors (hooks, kept values, edited
# gradients, copies) at random degrees, compared with one process. A failing one is made small and printed.
CASES ?= 500
SEED ?= $(shell date +%j%H%M)
fuzz: $(VENV)/.stamp-test
	@echo "fuzz: $(CASES) programs and $(CASES) scripts with side doors, SEED=$(SEED)"
	@FUZZ_SEED=$(SEED) FUZZ_SETS=$$((($(CASES) + 7) / 8)) FUZZ_SIDE_DOORS=$(CASES) \
	  $(BIN)/python -m pytest -q -s --timeout 0 tests/test_fuzz.py tests/test_fuzz_side_doors.py -k random $(ARGS)

$(VENV)/.stamp-docs: $(VENV)/.stamp-torch pyproject.toml
	@echo "setup: what builds the documentation"
	@$(PIP) install -e '.[docs]'
	@touch $@

# The site in site/: python -m http.server -d site shows it. A dead link or a missing anchor is an error.
docs: $(VENV)/.stamp-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: site/index.html"

lint: $(VENV)/.stamp-dev
	@$(BIN)/ruff check src tests examples bench docs
	@$(BIN)/ruff format --check src tests examples bench docs
	@$(BIN)/mypy
	@$(BIN)/codespell

# The source archive and the wheel, made from it: what is released. tests/test_package.py installs the wheel and uses it.
package: $(VENV)/.stamp-dev
	@rm -f dist/modelparallel-*.whl dist/modelparallel-*.tar.gz
	@PIP_CONSTRAINT=$(abspath $(VENV))/constraints.txt $(BIN)/python -m build --quiet --outdir dist
	@ls dist/modelparallel-*

# The peer of one benchmark, transformers' own tensor parallelism, needs accelerate.
bench: $(VENV)/.stamp-test
	@$(PIP) install -e '.[bench]'
	@$(BIN)/python -m bench $(ARGS)
