# Each target does all the set-up it needs on a machine with Python >= 3.11. Everything is installed into .venv (for
# test-newest into .venv-newest). Options: PYTHON=python3.12, TESTS="tests/test_index.py -k pack", PROCESSES=4.

SHELL := /bin/bash
adaptnet := .venv/bin/adaptnet
TESTS ?= tests
export PYTHON
# Without bytecode files each process of a test or a run would compile torch, Ray and MLflow anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo test test-slurm test-browser test-faults test-server test-long test-newest check bench clean

help:
	@echo "make demo    draw images, train a gated net on them, evaluate and register it"
	@echo "make test    run all tests but the next five; with ADAPTNET_DATA=FOLDER also those on real images"
	@echo "make test-slurm, test-browser, test-server, test-faults"
	@echo "             run the tests on a real SLURM, in a real browser, with a real PostgreSQL, of kills and"
	@echo "             odd inputs (FAULTS_MINUTES=20 kills at random for longer)"
	@echo "make test-long"
	@echo "             run the tests that need none of these, but much time: large nets, exports, whole trainings"
	@echo "make test-newest"
	@echo "             run the quick tests on the newest Ray, MLflow, torch, DALI and submitit (in .venv-newest)"
	@echo "make check   check formatting, lint, types and import order"
	@echo "make bench   measure our speed as ratios to that of named peers"
	@echo "make venv    only set up .venv from constraints.txt"
	@echo "make clean   remove .venv, .venv-newest, caches and the demo's run; other runs stay"

venv:
	@infra/venv.sh

demo: venv
	$(adaptnet) data toy runs/toy-data
	$(adaptnet) train convnet_aig/toy
	$(adaptnet) evaluate runs/convnet_aig-toy
	@echo
	@echo "Look next:"
	@echo "  .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db     curves, checkpoints, registry"
	@echo "  $(adaptnet) evaluate runs/convnet_aig-toy --facts          which gates open for which class"
	@echo "  $(adaptnet) train convnet_aig/toy family.target_rate=0.4 name=aig-cheaper"

test: venv
	infra/test.sh $(TESTS)

test-slurm test-browser test-server test-faults test-long: test-%: venv
	.venv/bin/python -m pytest -m $* tests

test-newest: venv
	infra/newest.sh

check: venv
	infra/check.sh

bench: venv
	$(adaptnet) bench loader --index-only
	$(adaptnet) bench step baseline/cifar10_small
ifdef ADAPTNET_DATA
	$(adaptnet) data pack "$(ADAPTNET_DATA)/imagenet-sample" packed/imagenet-sample
	$(adaptnet) bench loader packed/imagenet-sample
	$(adaptnet) bench loader packed/imagenet-sample --read-latency 5ms
else
	@echo "bench loader on photographs is left out: set ADAPTNET_DATA"
endif

clean:
	rm -rf .venv .venv-newest .pytest_cache .mypy_cache .ruff_cache build *.egg-info runs/toy-data runs/convnet_aig-toy
	find pipeline jobs tuning tests -name __pycache__ -type d -prune -exec rm -rf {} +
