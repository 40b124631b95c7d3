.PHONY: test fast lint quickstart

PYTHON ?= python

test:  ## all tests
	$(PYTHON) -m pytest

fast:  ## tests that take at most a few seconds each
	$(PYTHON) -m pytest -m "not slow"

lint:  ## style and types, as .ci/run checks them
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

quickstart:  ## train on generated scenes, some eight minutes on two cores
	$(PYTHON) examples/train.py
