# make demo    find, fold and verify a circuit in a trained transformer; writes results/hierarchical_equality
# make test    lint, types and every test
# make docs    the documentation as a site, in site/ (reads no network)
# make bench   how fast scores, search and folded models are (about a quarter of an hour, alone on the machine)
# make results the tables and figures of README.md and docs (a few hours; variants, neighbours, prediction and tasks go on
#              from what is in benchmarks/results)
#
# Everything runs in .venv, whatever environment is activated. PYTHON (3.11 or newer) makes it, TORCH_ARGS goes to the
# installation of torch. On Linux the plain package index serves torch with several GB of GPU libraries; for the CPU
# build name an index of CPU wheels: make demo TORCH_ARGS="--index-url ..."

PYTHON ?= python3
TORCH_ARGS ?=

BIN = .venv/bin
CLEAN = PYTHONPATH= PYTHONHOME=
PY = $(CLEAN) $(BIN)/python
PIP = $(PY) -m pip --disable-pip-version-check
READY = .venv/.installed

demo: $(READY)
	$(CLEAN) $(BIN)/tl-sparsify run hierarchical_equality --out results/hierarchical_equality

test: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(READY)
	$(PY) benchmarks/speed.py
	$(PY) benchmarks/folding_speed.py
	$(PY) benchmarks/score_speed.py
	$(PY) benchmarks/large.py

results: demo bench
	$(PY) benchmarks/demo.py
	$(PY) benchmarks/orders.py
	$(PY) benchmarks/prediction.py
	$(PY) benchmarks/perceptron.py
	$(PY) benchmarks/variants.py
	$(PY) benchmarks/neighbours.py
	$(PY) benchmarks/truth.py
	$(PY) benchmarks/algorithms.py
	$(PY) benchmarks/side_by_side.py
	$(PY) benchmarks/overlap.py
	$(PY) benchmarks/every_task.py
	$(PY) benchmarks/readme.py

venv: $(READY)

# torch and the build tools first and pinned; then no build is isolated, so none can fetch a torch of its own.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(CLEAN) $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install -c constraints.txt setuptools hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,docs]'
	touch $(READY)

clean:
	rm -rf .venv results dist site .pytest_cache .ruff_cache .hypothesis
	find tl_sparsify tasks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: demo test docs bench results venv clean
