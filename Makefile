# `make demo` and `make test` start from a bare checkout: they set up .venv, once, and again when pyproject.toml changes.
PYTHON ?= python3
EXTRAS ?= test
WORKERS ?= 3  # one more than 2 cores, for some tests wait; each takes about 4 GB

.PHONY: demo test test-slow lint clean

demo: .venv/.plot
	@.venv/bin/smoljax demo

# Files in their order, not by their number of tests: of the longest some have five, and would begin last.
test: .venv/.$(EXTRAS)
	@.venv/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: .venv/.$(EXTRAS)
	@.venv/bin/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.$(EXTRAS)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check

clean:  # not runs/
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist *.egg-info demo-out
	find smoljax train infer configs tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp for each set of extras. -qq: errors alone.
.venv/.%: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "smoljax needs Python 3.11 or newer, and there is no $(PYTHON)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "smoljax needs Python 3.11 or newer, $(PYTHON) is %d.%d; choose another: make PYTHON=python3.12 $(MAKECMDGOALS)" % sys.version_info[:2] or 0)'
	@echo "setting up .venv with smoljax[$*] (a minute or two, once)"
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	@.venv/bin/pip install -qq --editable '.[$*]'
	@touch $@
