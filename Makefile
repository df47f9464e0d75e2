# The two commands of the README, and the few that a contributor needs. Each makes .venv on a bare machine
# and installs what it needs, once; the stamp files below say that this was done for today's pyproject.toml.
#
#   make test PYTHON=python3.12     use another Python (3.11 or newer)
#   make test VENV=path/to/venv     use another virtual environment; what it already holds (your own build
#                                   of torch, say) is kept if it is new enough
#   make lanes LANE_PYTHONS='A B'   use these Pythons, not the 3.11 and the newest one that are found here

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help quickstart test slow lanes lint types bench faults clean
.NOTPARALLEL:

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/.hdcache-quickstart ## extract, distill and evaluate a small data set into quickstart-out/
	@$(BIN)/hdcache quickstart --out quickstart-out

# A finding of lint or types hides no test result: all three run, and any of them fails the command.
# Two test processes with as many threads each as there are cores would mostly wait for one another.
test: $(VENV)/.hdcache-test ## lint, types, and the tests that take seconds
	@failed=0; for step in lint types; do $(MAKE) --no-print-directory $$step || failed=1; done; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 || failed=1; exit $$failed

slow: $(VENV)/.hdcache-test ## the tests that take minutes
	@$(BIN)/pytest -m slow

# Each lane has an environment of its own under .lanes/.
LANE_PYTHONS ?=

lanes: | $(BIN)/pip ## the store's tests without torch on the oldest and the newest Python and zarr, and each other's stores
	@$(BIN)/python .ci/lanes.py $(LANE_PYTHONS)

lint: $(VENV)/.hdcache-test ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.hdcache-test ## mypy, strict
	@MYPY="$(abspath $(BIN)/mypy)" bash .ci/typecheck

# Every script under benchmarks/ that has a quick form; a test keeps this list whole.
BENCHMARKS := decode epoch extract knn loader remote scale size startup students workers

# What one of them finds is not lost when another fails.
bench: $(VENV)/.hdcache-bench ## the quick forms of all benchmarks, a table each, into bench-out/
	@rm -rf bench-out; mkdir bench-out; failed=0; for name in $(BENCHMARKS); do echo; echo "## $$name"; echo; \
	$(BIN)/python benchmarks/$$name.py --quick --out bench-out/$$name || failed=1; done; exit $$failed

# The campaigns of docs/reliability.md.
FAULTS := failing_calls faults kills

faults: $(VENV)/.hdcache-test ## damage, failing calls and kills in full: more than an hour, a table each, into faults-out/
	@rm -rf faults-out; mkdir faults-out; failed=0; for name in $(FAULTS); do echo; echo "## $$name"; echo; \
	$(BIN)/python benchmarks/$$name.py --out faults-out/$$name || failed=1; done; exit $$failed

clean: ## remove caches and outputs (keeps .venv)
	@rm -rf .lanes .typecheck .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist ./*.egg-info quickstart-out bench-out faults-out
	@find hdcache extract distill evaluate benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing a virtual environment gets, so a half-made one is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hdcache needs Python 3.11 or newer;\
	 $(PYTHON) is $$($(PYTHON) --version 2>&1 || :). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv "$(VENV)"

$(VENV)/.hdcache-%: pyproject.toml | $(BIN)/pip
	@echo "installing hdcache[$*] into $(VENV) (once; torch is large)"
	@$(PIP) install --editable ".[$*]"
	@touch "$@"
