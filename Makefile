# SPDX-License-Identifier: Apache-2.0
# The contributor's interface. Everything runs in .venv, which `scripts/test.sh` makes.

SHELL := /bin/bash
BIN := .venv/bin
SHELL_FILES := $(shell git ls-files "*.sh" .ci)

.PHONY: help check types fast docs pages site format test test-slurm bench wheel

help:
	@echo "make check       lint, format, strict types, shell scripts"
	@echo "make fast        make check, and the pure tests on all cores: under two minutes"
	@echo "make docs        write the pages that come from the code (make pages), and the site of all pages into build/site (make site)"
	@echo "make format      rewrite files in the project's format"
	@echo "make test        all tests but those on a real Slurm or several hosts"
	@echo "make test-slurm  those on a real Slurm and on several hosts (root on Debian: installs packages)"
	@echo "make bench       benchmarks; each prints its ratios"
	@echo "make wheel       build the wheel into dist/"

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/shellcheck --external-sources $(SHELL_FILES)
	$(BIN)/shfmt --diff --indent 4 --case-indent $(SHELL_FILES)

types:
	$(BIN)/mypy
	cd tests/standins && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --explicit-package-bases tensorrt_llm torch

fast: check
	$(BIN)/python -m pytest --stage fast -n logical --dist worksteal tests/unit tests/scripts

docs: pages site

pages:
	$(BIN)/python -m tools.gen_docs

site:
	$(BIN)/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || { \
		root=$(CURDIR); . scripts/environment.sh; \
		[ -z "$$(other_checkout)" ] || fail 64 "Sphinx isn't in .venv, a link to another checkout's environment" "  expected: an environment of this checkout's own" "  fix:      make docs there first, or rm .venv; scripts/test.sh makes one"; \
		$(BIN)/python -m pip install --quiet --editable '.[docs]'; }
	$(BIN)/python -m tools.build_site build/site
	@echo "build/site/index.html"

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/shfmt --write --indent 4 --case-indent $(SHELL_FILES)

test:
	scripts/test.sh

test-slurm:
	scripts/test.sh --slurm tests/slurm tests/hosts

bench:
	$(BIN)/python tests/bench/check_start.py
	$(BIN)/python tests/bench/status_start.py
	$(BIN)/python tests/bench/launch_to_verdict.py
	$(BIN)/python tests/bench/launch_to_verdict.py --engine trtllm --ranks 8 16 32 64 --runs 3
	$(BIN)/python tests/bench/serving_rate.py
	$(BIN)/python tests/bench/hand_over.py
	$(BIN)/python tests/bench/liveness.py
	$(BIN)/python tests/bench/idle_connections.py
	$(BIN)/python -m tests.bench.idle_ranks
	$(BIN)/python -m tests.bench.faults
	$(BIN)/python -m tests.bench.kills

wheel:
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
