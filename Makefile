# Two commands do everything: `make book` and `make test`. `make` alone lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HTML := _build/html/index.html
CHAPTERS = $(wildcard book/*.ipynb)
# What the chapters compute from, besides their own code.
INPUTS = $(sort $(wildcard ddpm_lib/*.py ddpm_lib/datasets/* ddpm_lib/models/*)) constraints.txt

.DEFAULT_GOAL := help
.PHONY: help book serve test unit chapters browser lint format notebooks mutants colab wheel digits digits-noisy-classifier fashion-mnist fashion-mnist-coarse fashion-mnist-blurred scenes scenes-grey scenes-text emoji emoji-text address hooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-23s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[book,test,train]"
	@touch $@

book: $(INSTALLED) ## run every chapter and build the book in _build/html
	@mkdir -p _build
	@echo $(INPUTS) | cat - $(INPUTS) | cksum > _build/.inputs.new
	@cmp -s _build/.inputs.new _build/.inputs || rm -rf _build/.jupyter_cache
	@mv _build/.inputs.new _build/.inputs
	$(BIN)/python tools/vendor.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.execute_chapters _build/.jupyter_cache $(CHAPTERS)
	$(BIN)/jupyter-book build . --all --warningiserror --nitpick --keep-going
	@echo "The book is built. Open $(CURDIR)/$(HTML), or run: make serve"

serve: ## show the built book at http://localhost:8000 (PORT=... for another port)
	@test -f $(HTML) || { echo "There is no book in _build/html yet: run make book first."; exit 1; }
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

test: lint unit chapters ## lint, test the package, and compare every chapter with its stored outputs

unit: $(INSTALLED) ## test the package
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope -m "not browser" tests

chapters: $(INSTALLED) ## compare every chapter with its stored outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadscope -W default \
	    --nbval --nbval-current-env --nbval-cell-timeout 600 book

browser: $(INSTALLED) ## test the built book in a headless Chromium
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m browser tests/browser

lint: $(INSTALLED) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(INSTALLED) ## run every chapter in place and store its text outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.run_notebooks $(CHAPTERS)

mutants: $(INSTALLED) ## plant mistakes in copies of ddpm_lib: the tests must notice each
	$(BIN)/python -m tests.mutants

colab: wheel ## run every chapter as Colab does: alone in a folder, torch already there
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.colab dist/ddpm_lib-*.whl $(CHAPTERS)

wheel: $(INSTALLED) ## build the wheel of ddpm_lib, data and models included, in dist
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

digits: $(INSTALLED) ## train the shipped digits model again
	$(BIN)/python -m ddpm_lib train digits --folder _build/digits --device cpu
	$(BIN)/python -m ddpm_lib export _build/digits ddpm_lib/models/digits.safetensors
	$(BIN)/python -m scripts.model_card digits

digits-noisy-classifier: $(INSTALLED) ## train the shipped classifier of noisy digits again
	$(BIN)/python -m scripts.noisy_classifier

fashion-mnist: $(INSTALLED) ## train the shipped Fashion-MNIST model again (needs its data, see README)
	OMP_NUM_THREADS=1 $(BIN)/python -m ddpm_lib train fashion-mnist --folder _build/fashion-mnist --device cpu
	$(BIN)/python -m ddpm_lib export _build/fashion-mnist ddpm_lib/models/fashion-mnist.safetensors --bits 16
	$(BIN)/python -m scripts.model_card fashion-mnist

fashion-mnist-coarse: $(INSTALLED) ## train the shipped model for super-resolution again (needs Fashion-MNIST)
	OMP_NUM_THREADS=1 $(BIN)/python -m ddpm_lib train $@ --folder _build/$@ --device cpu
	$(BIN)/python -m ddpm_lib export _build/$@ ddpm_lib/models/$@.safetensors --bits 16

fashion-mnist-blurred: $(INSTALLED) ## train the shipped model for deblurring again (needs Fashion-MNIST)
	OMP_NUM_THREADS=1 $(BIN)/python -m ddpm_lib train $@ --folder _build/$@ --device cpu
	$(BIN)/python -m ddpm_lib export _build/$@ ddpm_lib/models/$@.safetensors --bits 16

scenes-text: $(INSTALLED) ## train the shipped text encoder again
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.text_encoder ddpm_lib/models/scenes-text.safetensors

scenes: $(INSTALLED) ## train the shipped model for text to image again
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 -m ddpm_lib train $@ --folder _build/$@ --device cpu
	$(BIN)/python -m ddpm_lib export _build/$@ ddpm_lib/models/$@.safetensors --bits 8

scenes-grey: $(INSTALLED) ## train the shipped model for colourisation again
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 -m ddpm_lib train $@ --folder _build/$@ --device cpu
	$(BIN)/python -m ddpm_lib export _build/$@ ddpm_lib/models/$@.safetensors --bits 16

emoji-text: $(INSTALLED) ## train the shipped text encoder of emoji names again
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.text_encoder --dataset emoji --objective pictures --steps 1000 --layers 1 \
	    ddpm_lib/models/$@.safetensors

emoji: $(INSTALLED) ## train the shipped model of emoji again
	OMP_NUM_THREADS=1 $(BIN)/python -m ddpm_lib train $@ --folder _build/$@ --device cpu
	$(BIN)/python -m ddpm_lib export _build/$@ ddpm_lib/models/$@.safetensors --bits 8

address: ## carry the public address everywhere: make address REPOSITORY=owner/name
	$(PYTHON) -m tools.address $(REPOSITORY)

hooks: $(INSTALLED) ## refuse git commits of notebooks that hold pictures
	cp tools/pre-commit "$$(git rev-parse --git-path hooks)/pre-commit"

clean: ## remove the built book and the caches, keep the environment
	rm -rf _build build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
