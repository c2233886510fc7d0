# make demo: learn to re-identify drawn pedestrians, on a laptop
# make test: the tests
# make lint: style

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: $(BIN)/.installed
	$(BIN)/python run.py --config=configs/selective.py

test: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv runs

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/.installed: $(BIN)/python requirements.txt
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
