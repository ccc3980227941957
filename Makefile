# make demo   compile a real MoE model with backend "kt" and generate text
# make test   everything that CI runs
# make check  a developer's loop, under three minutes
# Each does its own set-up in .venv. Needs Python >= 3.10 with venv, a C++20 compiler and make.
PYTHON ?= python3
# Each process of the tests would compile what it imports anew, torch among it.
export PYTHONDONTWRITEBYTECODE :=
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
# Most tests use one core; torch and the kernels of two workers share what there is.
PYTEST := $(BIN)/pytest -q -n logical --maxprocesses 4 --dist worksteal
NATIVE := $(shell find native cmake -type f) CMakeLists.txt
# Where the extension module is built, and the native tests of the same objects.
BUILD := build/dev

.PHONY: demo test check nightly setup lint format types native-test sanitize valgrind bench wheel clean

demo: setup
	$(BIN)/python examples/quickstart.py
	$(BIN)/ktc generate "def fibonacci(n):" --max-tokens 96

test: setup
	$(MAKE) -j2 -O lint types native-test
	$(PYTEST)

check: setup lint types
	$(PYTEST) -x -m "not slow"

# What takes too long for each submission: 1,000 kills while records are published, and their parser fuzzed, guided by
# coverage where atheris is installed (the extra `fuzz`).
nightly: setup
	KT_TEST_KILLS=1000 $(BIN)/pytest -q -n 0 tests/test_cache_kill.py
	PYTHONPATH=tests $(BIN)/python -P tests/fuzz/record.py -runs=300000

setup: .venv/installed

.venv/tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt pip scikit-build-core nanobind cmake ninja
	touch $@

.venv/installed: .venv/tools pyproject.toml $(NATIVE)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation --no-compile \
	  --config-settings=build-dir=$(BUILD) -e '.[dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find native -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.inc')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m nanobind.stubgen -q -m ktcompile._native -o ktcompile/_native.pyi
	$(BIN)/clang-format -i $$(find native -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.inc')

types: setup
	$(BIN)/mypy

native-test: setup
	$(BIN)/cmake --build $(BUILD) --target native_tests scaling
	$(BUILD)/native/native_tests

# The native tests under the address and undefined-behaviour sanitizers.
sanitize: setup
	$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DKT_PYTHON=OFF -DKT_SANITIZE=ON \
	  -S . -B build/sanitize
	$(BIN)/cmake --build build/sanitize --target native_tests
	build/sanitize/native/native_tests

# The same under valgrind, which knows no AVX-512. Needs valgrind.
valgrind: setup
	$(BIN)/cmake --build $(BUILD) --target native_tests
	valgrind --quiet --leak-check=full --error-exitcode=9 $(BUILD)/native/native_tests --quick --isa scalar --isa avx2

# Minutes, on a machine where nothing else runs.
bench: setup
	$(BIN)/ktc bench kernels --preset qwen3-30b-a3b

wheel: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

clean:
	rm -rf .venv build dist
