# Both main targets set up what they need: Python, make, gcc and npm are enough to start with.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   := runs

.PHONY: quickstart test setup lint clean

quickstart: setup  ## build a data set from this Python's documentation, fine-tune, evaluate, export, ask llama.cpp
	$(BIN)/python -m quickstart.make_data build/quickstart
	$(BIN)/whet run recipes/quickstart.yaml --runs $(RUNS)
	$(BIN)/python -m quickstart.answers $$(ls -td $(RUNS)/quickstart-* | head -n 1)

# Bytecode is kept, also where the environment says otherwise: each process would compile all of whet again. Three on
# two cores, since tests also wait: for processes of their own, and for disks.
test: setup  ## the whole suite
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

setup: $(VENV)/.ready .node/.ready

# torch first and by its pin: the rest then finds it there
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# llama.cpp, as npm ships it for Node; without npm, a recipe that exports GGUF is refused with what to type
.node/.ready: | $(VENV)/.ready
	mkdir -p .node
	if command -v npm >/dev/null; then $(BIN)/python -c "from whet.export.llama_cpp import install; install()"; fi
	touch $@

clean:
	rm -rf $(VENV) .node build $(RUNS)
