# make sweep: set up and run the main job; make test: set up and pass the tests.
# make reliability, make benchmarks: the full counts and the speeds; they rewrite the figures of docs/.
PYTHON ?= python3
VENV ?= .venv
# munge's user must be able to enter it, which rules out most home folders.
CLUSTER ?= /var/tmp/slurm-cluster
RUN = $(VENV)/bin/python

.PHONY: setup sweep test lint reliability benchmarks cluster cluster-stop

sweep: setup
	$(RUN) -m launch.sweep +sweep=sizes

test: setup lint
	$(RUN) -m pytest --numprocesses 2 --dist loadgroup

reliability: setup
	$(RUN) -m pytest tests/reliability tests/slurm --reliability=full

benchmarks: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/benchmarks -o python_files='bench_*.py'

# A SLURM cluster of three nodes on this machine, to try things on: docs/cluster.md.
cluster: setup
	$(RUN) -m tests.slurm.cluster start $(CLUSTER)

cluster-stop:
	$(RUN) -m tests.slurm.cluster stop $(CLUSTER)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(VENV)/installed

# torch goes first and by its exact version: on a CPU-only machine another request may bring gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[train,deepspeed,test]'
	touch $@
