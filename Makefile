# Two commands: `make demo` runs the main job on the miniature, `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version that the shipped references were measured with; any torch that setup.cfg allows works.
TORCH ?= torch==2.13.0
# One thread: two threads beside another process are several times slower on small machines, and results stay equal.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-all lint types venv test-venv engine docker pdsh clean
help:
	@echo "make demo      set up, then a search agent curates the miniature for five iterations"
	@echo "make test      set up what tests need besides (Docker, debootstrap, pdsh), then run the tests"
	@echo "make test-all  the same with the slow, exhaustive tier"
	@echo "make lint      ruff and mypy"

demo: venv engine
	$(BIN)/python experiments/run.py experiment=demo

test: test-venv engine docker pdsh lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: test-venv engine docker pdsh lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: test-venv
	$(BIN)/ruff check .
	sh .ci/types.sh $(BIN)/python

venv: $(VENV)/.installed
test-venv: $(VENV)/.installed-dev

# torch first: DeepSpeed imports it to build itself, and nothing may pull another build of it.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || PYTHON=$(PYTHON) sh .ci/venv.sh $(VENV)
	$(BIN)/pip install -q "setuptools<85" wheel -c constraints.txt
	$(BIN)/pip install -q $(TORCH) -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt hjson ninja py-cpuinfo psutil einops msgpack pydantic tqdm packaging
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# A sandbox engine for the demo: Docker when it is ready, else bubblewrap.
engine: venv
	@$(BIN)/python -c 'from curation_env.sandbox import available; import sys; sys.exit(not any(r == "" for r in available().values()))' \
	  || sh .ci/packages.sh bubblewrap
	@command -v git >/dev/null || sh .ci/packages.sh git

docker: venv
	PYTHON=$(BIN)/python sh .ci/docker.sh
	@command -v bwrap >/dev/null || sh .ci/packages.sh bubblewrap

# What starts processes on the machines of a hostfile.
pdsh:
	@command -v pdsh >/dev/null || sh .ci/packages.sh pdsh

clean:
	rm -rf $(VENV) build *.egg-info runs
