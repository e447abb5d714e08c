# Each target sets up what it needs; a second call starts work at once.
#   make quickstart ARGS="trainer.seed=7"    make test PYTHON=python3.12
#   PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" spares a CPU-only machine the CUDA libraries
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE_STAMP := $(VENV)/.installed-docs
ARGS ?=
PIP_FLAGS ?=
export ARGS PIP_FLAGS PYTHON310 PYTHON312 PYTHON313 ALLOW_MISSING

.DEFAULT_GOAL := help
.PHONY: help install quickstart figure notebooks screenshots demo leaderboard regression test test-slow matrix chaos fuzz fuzz-kernel versions browser lint docs assets clean scaling

help:
	@echo "make quickstart   distil the digits teacher to one step, on a CPU, in minutes: runs/quickstart"
	@echo "make figure       the README's picture, from runs/quickstart"
	@echo "make demo         runs/quickstart beside its teacher, in a browser on this machine"
	@echo "make notebooks    run the notebooks from top to bottom; an error, or 120 seconds, ends it: docs/notebooks"
	@echo "make screenshots  the pictures of docs/: a report and the demo, from runs/quickstart"
	@echo "make leaderboard  eleven methods on the digits, one budget, in two hours on one core: runs/leaderboard"
	@echo "make regression   ten methods that regress on targets, 600 CPU seconds each: runs/regression"
	@echo "                  then make leaderboard-page or regression-page: docs/NAME.md, .csv and .png"
	@echo "make test         the tests; make test-slow: the long ones"
	@echo "make matrix       every method on every family of diffusers, tiny and random"
	@echo "make chaos        kills, nans, damaged files, full disks and stalls, into docs/faults.md: under 40 minutes"
	@echo "make fuzz         10,200 random command lines"
	@echo "make fuzz-kernel  random calls of the attention library under AddressSanitizer, for a minute"
	@echo "make scaling      several processes: bytes of each, weak scaling, what checkpoints take"
	@echo "make versions     the tests on the oldest libraries, Python 3.12 and 3.13; one: version-oldest"
	@echo "make browser      a Chromium for the tests that open reports, where there is none; without it they are skipped"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the site, from docs/, the notebooks and the docstrings: build/docs/index.html; a warning is an error"
	@echo "make assets       train the shipped networks again: runs/assets"
	@echo "make clean        remove what builds and tests leave behind"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "PYTHON must be Python 3.10 or later, got $$($(PYTHON) --version 2>&1). Set it: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) lacks ensurepip and venv. Run: apt-get install python3-venv" >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[dev]"
	@touch $@

$(SITE_STAMP): $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[docs]"
	@touch $@

quickstart: $(STAMP)
	@if [ -e runs/quickstart ]; then \
		n=1; while [ -e runs/quickstart.$$n ]; do n=$$((n + 1)); done; \
		mv runs/quickstart runs/quickstart.$$n; echo "moved runs/quickstart to runs/quickstart.$$n"; \
	fi
	$(BIN)/diffdistill train experiment=digits_dmd2 run_dir=runs/quickstart $(ARGS)

figure: $(STAMP)
	$(BIN)/python -m diffdistill.evaluation.figure runs/quickstart docs/teacher_and_student.png

demo: $(STAMP)
	$(BIN)/diffdistill demo pipeline=runs/quickstart/pipeline teacher=asset:digits $(ARGS)

screenshots: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/screenshots.py runs/quickstart docs

# METHODS may be split between processes that share out=runs/leaderboard; the last call collects
METHODS ?= diff_instruct,dmd,dmd2,vsd,sid,sida,sid_lsg,sid_few_step,sim,f_distill,uni_instruct
leaderboard: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/diffdistill compare data=digits 'distillers=[$(METHODS)]' budget.iterations=2000 \
		budget.seconds=600 budget.batch_size=64 out=runs/leaderboard $(ARGS)

regression: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/diffdistill compare data=digits \
		'distillers=[kd,scm,sct,tbcm,mean_flow,boot,progressive,lcm,agd,guidance_distillation]' \
		budget.seconds=600 out=runs/regression $(ARGS)

%-page: $(STAMP)
	$(BIN)/python -m diffdistill.leaderboard runs/$* docs

# a file's tests share a process: what its fixtures make is made once
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(ARGS)

matrix: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "" tests/test_matrix.py $(ARGS)

chaos: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py --page docs/faults.md $(ARGS)

scaling: $(STAMP)
	for figure in bytes scaling saving; do $(BIN)/python tests/scale_out_figures.py $$figure $(ARGS); done

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --lines 10000 --real 200 $(ARGS)

# SECONDS_LONG and SEED of the random calls; needs a C++ compiler with sanitizers
SECONDS_LONG ?= 60
SEED ?= 0
fuzz-kernel: $(STAMP)
	mkdir -p build
	$(BIN)/python tests/kernels/fuzz_build.py build/fuzz-kernel
	build/fuzz-kernel $(SECONDS_LONG) $(SEED)

versions:
	@.ci/versions

version-%:
	@.ci/versions $*

# never fails: without a browser the tests that need one say that they were skipped
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
		echo "no browser: install Chromium (apt-get install chromium) for the tests that open reports" >&2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# executed copies, which the site shows; made again when a notebook or what it runs changed
NOTEBOOKS := $(patsubst notebooks/%,docs/notebooks/%,$(wildcard notebooks/*.ipynb))
RUN_BY_NOTEBOOKS := $(shell find diffdistill configs kernels -name '*.py' -o -name '*.yaml' -o -name '*.safetensors')
notebooks: $(NOTEBOOKS)

docs/notebooks/%.ipynb: notebooks/%.ipynb docs/execute_notebook.py $(RUN_BY_NOTEBOOKS) | $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python docs/execute_notebook.py $< $@

docs: $(SITE_STAMP) $(NOTEBOOKS)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs

assets: $(STAMP)
	$(BIN)/diffdistill train experiment=digits_teacher run_dir=runs/assets/digits $(ARGS)
	$(BIN)/diffdistill train experiment=gmm2d_teacher run_dir=runs/assets/gmm2d $(ARGS)
	$(BIN)/python -m diffdistill.evaluation.shape_features --out runs/assets/shapes_features
	$(BIN)/python -m diffdistill.shapes_pipeline --out runs/assets/shapes_base
	$(BIN)/diffdistill train experiment=shapes_t2i_teacher networks.path=runs/assets/shapes_base \
		run_dir=runs/assets/shapes_t2i $(ARGS)
	$(BIN)/diffdistill train experiment=moving_digits_teacher run_dir=runs/assets/moving_digits $(ARGS)

clean:
	rm -rf build docs/notebooks dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
