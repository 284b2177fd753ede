# `make` alone shows what there is.  Everything that is made here is in .venv/, demo-output/ and the tools' own caches; images and
# environments are in the user's cache folder and stay there.

.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# The tests start the program very often: without it each start translates all modules anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
STAMP := $(VENV)/.made
BIN := $(VENV)/bin
# Further arguments for pytest: make test PYTEST_ARGS="-k clock -x"
PYTEST_ARGS ?=
# Another interpreter: make venv PYTHON=python3.13
PYTHON ?=

##@ Use

.PHONY: help
help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' \
		$(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: deps venv ## build the time-trap example twice: it fails with today's date and passes in a VM whose clock says 2020
	@./demo

##@ Set up

.PHONY: deps
deps: ## install the system packages that are missing (through apt, as root or with sudo)
	@./install-host-packages

# Debian starts an sshd when it is installed: only who runs the tests gets one.
.PHONY: test-deps
test-deps:
	@./install-host-packages grub-common grub-pc-bin openssh-server qemu-utils

# What is measured beside us; a tool that is missing is a row that says so.
.PHONY: bench-deps
bench-deps: venv
	@./install-host-packages debvm genext2fs kmod
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'

.PHONY: venv
venv: $(STAMP) ## make the virtual environment .venv with offload and its tools in it

# Its recipe finds the newest interpreter under the name python3, or one with a version in its name.
$(STAMP): pyproject.toml
	@good() { command -v "$$1" >/dev/null && "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
	python=; \
	for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3); do \
		if good "$$candidate"; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "offload needs Python 3.11 or newer with its venv module (Debian: python3-venv)." >&2; \
		echo "None of these will do: $(or $(PYTHON),python3 python3.11 ... python3.14 /usr/bin/python3)." >&2; \
		exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "Making $(VENV) with $$($$python --version)"; \
		$$python -m venv --clear $(VENV); \
	fi
	@echo "Installing offload and its tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

##@ Check

.PHONY: test
test: test-deps venv ## run the whole test suite: unit, integration, real VMs
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: unit
unit: venv ## run the tests that need no process and no socket (seconds)
	@$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

.PHONY: lint
lint: venv ## run ruff (rules and format), mypy --strict and the import linter
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: bench
bench: bench-deps ## measure clones, boots, transfers and builds against the bare tools
	@$(BIN)/python bench/run.py

.PHONY: clean
clean: ## remove what was made here (images and environments stay in the user's cache folder)
	rm -rf $(VENV) demo-output dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
