# Everything that a fresh machine with Python 3.10+ needs: each target makes the environment that it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REAL ?= ../shared/real

.PHONY: demo test test-tl4 check bench real flags lesions models weights clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	@touch $@

demo: $(VENV)/.user   ## the main job on the planted world, offline: a table, and pictures in demo/
	$(BIN)/clip-lens demo --out demo

test: $(VENV)/.test   ## every test and doctest
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

$(VENV)-tl4/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tl4
	$(VENV)-tl4/bin/python -m pip install --quiet --disable-pip-version-check 'transformer_lens>=4' \
		'open_clip_torch>=3.3' 'transformers>=5.6' 'pytest>=8.0' 'hypothesis>=6.100'
	@touch $@

test-tl4: $(VENV)-tl4/.done ## the towers on the newest TransformerLens 4.x, where sae_lens does not install yet
	$(VENV)-tl4/bin/python -m pytest -q tests/towers

check: $(VENV)/.dev   ## ruff, types, tests, doctests, documentation
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

bench: $(VENV)/.dev   ## ratios against the named alternatives, written into docs/results.md
	$(BIN)/python -m benchmarks.forward
	$(BIN)/python -m benchmarks.families
	$(BIN)/python -m benchmarks.attribution
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.curves
	$(BIN)/python -m benchmarks.rivals
	$(BIN)/python -m benchmarks.semantics
	$(BIN)/python -m benchmarks.covariance
	$(BIN)/python -m benchmarks.noise_truth
	$(BIN)/python -m benchmarks.planted_spectrum
	$(BIN)/python -m benchmarks.sparse_ablations
	$(BIN)/python -m benchmarks.sparse_methods
	$(BIN)/python -m benchmarks.sparse_scratch
	$(BIN)/python -m benchmarks.sparse_steering
	$(BIN)/python -m benchmarks.sparse_steering_methods
	$(BIN)/python -m benchmarks.sparse_drift
	$(BIN)/python -m benchmarks.planted
	$(BIN)/python -m benchmarks.transcripts

real: $(VENV)/.dev    ## the real OpenAI ViT-B/16 image tower; REAL= is the folder with its weights script and photos
	$(BIN)/python -m benchmarks.real_saes --data $(REAL)
	$(BIN)/python -m benchmarks.real_attribution --data $(REAL)
	$(BIN)/python -m benchmarks.real_heads --data $(REAL)
	$(BIN)/python -m benchmarks.real_spectrum --data $(REAL)
	$(BIN)/python -m benchmarks.real_flags --data $(REAL)
	$(BIN)/python -m benchmarks.real_flags_words --data $(REAL)

flags: $(VENV)/.dev   ## trains five planted worlds, a quarter of an hour each on two cores, and measures flags against their keys
	$(BIN)/python -m benchmarks.flags --seeds 103 104 105 106 107

lesions: $(VENV)/.dev ## the case study of skin lesions again, with its tables and figures
	$(BIN)/python docs/case-studies/skin_lesions/study.py --out runs/skin_lesions --page docs/case-studies/skin_lesions/README.md

models: $(VENV)/.dev  ## builds every model of open_clip without weights, and writes which hooks it has into docs/models.md, and the SAE formats
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.sae_formats

weights: $(VENV)/.dev ## trains the planted world's CLIP and SAEs again, as they ship for seed 0
	$(BIN)/python -m clip_lens_ext.planted.train --seed 0 --out clip_lens_ext/planted/weights
	$(BIN)/python -m benchmarks.sparse_weights

clean:
	rm -rf $(VENV) $(VENV)-tl4 demo build *.egg-info
