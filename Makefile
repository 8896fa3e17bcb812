# Targets make the environment in .venv if it is missing. `make help` lists them.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.venv/.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: help demo test export check readme settings release-check docs docs-serve docs-test

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: .venv/.ok ## the whole path on made-up ECGs: pretrain, compare read-outs, fine-tune, predict
	ecg-pma demo

test: .venv/.ok ## every notebook and every test
	OMP_NUM_THREADS=1 nbdev-test --n-workers 2
	pytest --no-notebooks --ignore tests/test_site.py  # `make docs-test` has those

export: .venv/.ok ## notebooks -> modules, outputs refreshed, README and settings.ini rewritten: before a commit
	nbdev-export
	OMP_NUM_THREADS=1 nbdev-test --n-workers 2 --save
	nbdev-clean
	python tools/readme.py
	python tools/settings.py
	touch .venv/.ok  # nbdev-export touches pyproject.toml

check: .venv/.ok ## exports current, notebooks clean, README and settings.ini in step
	pytest tests/test_repository.py

readme: .venv/.ok ## README.md from nbs/index.ipynb
	python tools/readme.py

settings: .venv/.ok ## settings.ini from pyproject.toml
	python tools/settings.py

release-check: .venv/.ok ## wheel built, looked into, installed in a fresh environment, imported, demo run: before a release
	python tools/release_check.py

docs: .venv/.ok ## the HTML site from the notebooks into _docs; a broken link or a figure without alternative text stops it
	OMP_NUM_THREADS=1 python -W ignore tools/docs/build.py

docs-serve: docs ## the site on this machine, as it is built now
	python tools/docs/site_server.py _docs

docs-test: .venv/.ok ## the built site in a browser (chromium)
	SITE=_docs pytest tests/test_site.py
