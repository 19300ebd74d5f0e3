# make demo    the whole story on this machine, no network needed once installed
# make test    the test suite: every kind of test, in five to nine minutes on two cores
# make test-slow  the same kinds for every family, at every moment, over long runs
# make test-ranks  8 and 16 processes, and one rank of 512 at true size
# make attack  a million damaged inputs, a hundred kills of each command; it goes on where it stopped
# make check   formatting, linting, types

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check

.PHONY: demo test test-slow attack check format bench test-ranks clean

# torch first and by its exact version: any other spelling may fetch another build of it.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "upcycle needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: .venv/.ready
	rm -rf demo
	.venv/bin/upcycle demo

test: .venv/.ready
	.venv/bin/python -m pytest -n 2

test-slow: .venv/.ready
	.venv/bin/python -m pytest -n 2 -m slow

# UPCYCLE_ATTACK="--cases 1000000 --minutes 600 --kills 100": how much, and for how long at most. attack.json keeps
# the counts, and the next call goes on after them; without the file it begins anew.
attack: .venv/.ready
	PYTHONPATH=tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python -W ignore \
	    tests/attack/campaign.py --json attack.json $(UPCYCLE_ATTACK)

check: .venv/.ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	for folder in $$(dirname experiments/*/*.py | sort -u); do MYPYPATH=$$folder .venv/bin/mypy $$folder/*.py || exit 1; done

format: .venv/.ready
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/.ready
	.venv/bin/python benchmarks/convert.py
	.venv/bin/python benchmarks/train_step.py
	.venv/bin/python benchmarks/moe_layer.py

test-ranks: .venv/.ready
	.venv/bin/python -m pytest -m 'true_size or many_ranks'

clean:
	rm -rf .venv demo build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
