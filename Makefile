# Needs Python 3.11 or newer, make, and a package index. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help demo test bench docs format clean

help:
	@echo "make demo    run the demonstration"
	@echo "make test    check format, lint and types, run the tests; PYTEST_ARGS='-n 2 -k dropout' for some"
	@echo "make bench   measure what is claimed of speed; results also go to benchmark_results.json"
	@echo "make docs    write the API pages to site/"
	@echo "make format  format the code and repair what ruff can repair"
	@echo "make clean   remove everything that these commands made"

demo: $(VENV)/demo.stamp
	$(VENV)/bin/funcbayes demo

test: $(VENV)/test.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# One file in benchmarks/ makes one claim; files whose names begin with _ are what they share.
bench: $(VENV)/bench.stamp
	$(VENV)/bin/python -m benchmarks

docs: $(VENV)/docs.stamp
	$(VENV)/bin/pdoc --docformat google --output-directory site funcbayes

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist site demo_output benchmark_results.json .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: what is installed is installed again only after its list has changed.
%/venv.made:
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: funcbayes needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("funcbayes needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $*
	@touch $@

# What one of the peers brings along is made for another build of torch, fails as it is imported, and is not used.
$(VENV)/bench.stamp: pyproject.toml constraints.txt | $(VENV)/venv.made
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[bench]'
	$(VENV)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/venv.made
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[$*]'
	@touch $@
