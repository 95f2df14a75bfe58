VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# files of tests are spread over processes, see pytest_xdist_auto_num_workers
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0

.PHONY: demo test test-fast lint docs builds

demo: $(STAMP)
	$(VENV)/bin/flashmoe run demo --cache 25% --temp 0 -n 96 --chat -p "What is a mixture of experts?"

test: $(STAMP)
	$(PYTHON) -m tests.kernels
	$(PYTHON) -m pytest $(PARALLEL) --durations=25

# what most changes need, in a minute and a half; handed out test by test: few fixtures of a file take long
test-fast: $(STAMP)
	$(PYTHON) -m pytest -n auto --dist worksteal --max-worker-restart=0 tests/cache tests/prefetch tests/routing tests/simulate tests/storage tests/test_floors.py tests/test_budget.py

# exactness on earlier builds of llama.cpp, whose wheels are fetched for it, and on kernels that are compiled for it
builds: $(STAMP)
	$(PYTHON) -m tests.builds

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m mypy

# the documentation site, in site/; a link that leads nowhere is an error
docs: $(STAMP)
	$(PYTHON) scripts/cli_reference.py docs/reference/cli.md
	$(VENV)/bin/zensical build --strict

$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
