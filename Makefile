# make demo    find, fold and verify a circuit in a trained transformer; writes results/hierarchical_equality
# make demo-real  the same job on a real language model (SmolLM2, 92 MB from the package index; about 17 minutes on two cores)
# make test    lint, types and every test
# make docs    the documentation as a site, in site/ (reads no network)
# make real    fetch the real language model, which some tests need, into the user's cache
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
QUICK = --effort quick --no-align

demo: $(READY)
	$(CLEAN) $(BIN)/tl-sparsify run hierarchical_equality --out results/hierarchical_equality

demo-real: $(READY)
	$(CLEAN) $(BIN)/tl-sparsify fetch smollm2
	$(CLEAN) $(BIN)/tl-sparsify run ioi --model smollm2 --units heads,mlps --keep 0.3 $(QUICK) --out results/real/1_heads_and_mlps
	$(CLEAN) $(BIN)/tl-sparsify run ioi --model smollm2 --units heads,neurons --keep 0.1 $(QUICK) --out results/real/2_heads_and_neurons
	$(CLEAN) $(BIN)/tl-sparsify report results/real

# What needs the model is skipped without it; that it could not be fetched is said here, and again in the tests' summary.
real: $(READY)
	$(CLEAN) $(BIN)/tl-sparsify fetch smollm2 || echo "WARNING: the real language model is not there: its tests will be skipped"

test: $(READY) real
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs

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
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,docs,real]'
	touch $(READY)

clean:
	rm -rf .venv results dist site .pytest_cache .ruff_cache .hypothesis
	find tl_sparsify tasks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: demo demo-real real test docs bench results venv clean
