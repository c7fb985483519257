# One word each. Every target does its own set-up first: git, make and Python 3.11-3.13 are enough.
#
#   make quickstart   train, evaluate and report a small sweep on this machine (minutes; again: seconds)
#   make test         the test suite, without what needs a GPU, a cluster or patience (-m gpu, cluster, slow)
#   make test-cluster the tests that bring up a Kubernetes: needs Go; real pods too as root on Linux
#   make test-gpu     the tests that need a CUDA device: the same numbers there, also after a kill
#   make check        format, lint, types, import contracts, lock: what CI asks before it runs the tests
#   make bench        measure the numbers in docs/benchmarks.md
#   make bench-cluster the same of the cluster backend, on a real API server, at full size
#   make bench-gpu    the same of the parts that a GPU changes, on one
#   make parity       compare the loss, and whole steps, with TRL's GKD trainer (its own environment)
#   make image        build the image of the pods: IMAGE=registry.example/team/stillhouse pushes it there

UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready
# TRL's environment: what is compared with is not what is published.
PARITY := .cache/parity

# The uv on PATH, or, where there is none (or `make UV=`), one that pip puts into .venv.
UV ?= $(shell command -v uv 2>/dev/null)
THE_UV = $(or $(UV),$(BIN)/uv)
# The project's environment is .venv, whatever else is active in this shell.
export UV_PROJECT_ENVIRONMENT := .venv
unexport VIRTUAL_ENV
# Importing torch and its family from source files alone costs 13 s more, in every process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test test-cluster test-gpu check bench bench-cluster bench-gpu parity image

help:
	@sed -n '1,/^$$/p' Makefile

quickstart: $(READY)
	$(BIN)/stillhouse preflight pair=tiny quant=int4 || case $$? in 3|4) ;; *) exit 1;; esac
	$(BIN)/stillhouse run sweeps/quickstart.yaml
	$(BIN)/stillhouse report quickstart

# A file's tests share what is costly to make, so a file stays with one process, and tests/conftest.py
# says which begin first. Tests also wait, for processes and servers: two workers more than there are cores.
test: $(READY)
	$(BIN)/python -m pytest -q -n $$(($$(getconf _NPROCESSORS_ONLN) + 2)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The first line is the one that may need a network: Go modules, Debian packages.
test-cluster: $(READY)
	$(BIN)/python -m tests.cluster.binaries
	tests/cluster/alone $(BIN)/python -m pytest -q -m cluster tests/cluster

test-gpu: $(READY)
	$(BIN)/python -m pytest -q -m gpu tests/test_gpu.py

check: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tools/lock.py check
	$(BIN)/python tools/lines.py

bench: $(READY)
	$(BIN)/python benchmarks/run.py

bench-cluster: $(READY)
	$(BIN)/python -m tests.cluster.binaries
	tests/cluster/alone $(BIN)/python -m benchmarks.cluster --write

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu --write

# Offline, and so without the usage report that TRL sends; on the CPU, so that any machine can repeat it.
parity: $(PARITY)/.ready
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(PARITY)/bin/python benchmarks/parity.py
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(PARITY)/bin/python -m benchmarks.trl_steps tiny

image:
	@UV_VERSION=$(UV_VERSION) $(or $(PYTHON),python3) tools/image.py $(IMAGE)

FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
HAS_UV_OR_PIP = { command -v "$(THE_UV)" || $(BIN)/python -m pip --version; } >/dev/null 2>&1
PYTHONS := $(PYTHON) python3 python3.13 python3.12 python3.11

# Hashes are proven against uv.lock before anything is installed (tools/lock.py restore). The last
# step takes the hosts out again, so that the checkout stays as clean as it was cloned.
$(READY): pyproject.toml uv.lock
	@$(BIN)/python -c '$(FITS)' 2>/dev/null && $(HAS_UV_OR_PIP) || { \
	  for python in $(PYTHONS) ""; do $$python -c '$(FITS)' 2>/dev/null && break; done; \
	  if [ -n "$(UV)" ]; then \
	    $(UV) venv --quiet --clear $${python:+--python "$$python"} .venv; \
	  elif [ -z "$$python" ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 among: $(PYTHONS)." >&2; \
	    echo "Install one, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  elif ! $$python -m venv --clear .venv; then \
	    echo "$$python makes no virtual environment (Debian: apt install python3-venv)." >&2; \
	    exit 1; \
	  fi; }
	@command -v "$(THE_UV)" >/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "Installing the locked packages into .venv (5.7 GB, a minute or so) ..."
	@PATH="$(dir $(THE_UV)):$$PATH" $(BIN)/python tools/lock.py restore
	@$(THE_UV) sync --frozen --quiet
	@$(BIN)/python tools/lock.py write
	@touch $@

# uv.lock is written here too, and must not look newer than what .venv was made from.
$(PARITY)/.ready: $(READY)
	@echo "Installing the locked packages and TRL into $(PARITY) (mostly links to uv's cache) ..."
	@PATH="$(dir $(THE_UV)):$$PATH" $(BIN)/python tools/lock.py restore
	@UV_PROJECT_ENVIRONMENT=$(PARITY) $(THE_UV) sync --frozen --quiet --no-default-groups \
	  --group parity --python $(BIN)/python
	@$(BIN)/python tools/lock.py write
	@touch $(READY) $@
