# Everything a developer types. ARGS goes to the program that is run: make test ARGS="-k merge"

BIN := .venv/bin
ASAN := LD_PRELOAD=$$(gcc -print-file-name=libasan.so) \
	ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc
TSAN := LD_PRELOAD=$$(gcc -print-file-name=libtsan.so) TSAN_OPTIONS=exitcode=66

# Those with threads in them; the sanitizer is slow, and the others have one thread.
THREADED := $(addprefix tests/test_,$(addsuffix .py,threads vectors lifecycle device_io model \
	rewrites suspended mirror nbd nbd_protocol fuse fuse_protocol daemon lvm_snapshots))
FUZZ := $(patsubst fuzz/fuzz_%.py,%,$(wildcard fuzz/fuzz_*.py))
FUZZ_SECONDS ?= 60
FUZZER = PYTHONPATH='$(CURDIR)/build/fuzz/lib' \
	LD_PRELOAD="$$PWD/build/fuzz/coverage.so $$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 $(BIN)/python
LIVE_SECONDS ?= 300
# Per cent of the lines, of the core and of all else: less is an error of make coverage.
COVERAGE ?= 97
LONG ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-kernel test-live crash power faults bench \
	bench-peers bench-report lint format sdist debug asan tsan fuzz corpus coverage clean

help: ## List these targets
	@sed -n 's/^\([a-z -]*\):[^#]*## /\1\t/p' Makefile | expand -t 20

setup build: ## Install what is missing, make .venv, build the extension (the others do this first)
	@tools/setup

demo: setup ## Run the main job on a real ext4 image
	@$(BIN)/python examples/demo.py $(ARGS)

test: ## Run the tests; ARGS="--seed N" repeats a run, ARGS="-k WORD" picks tests
	@tools/setup test
	@$(BIN)/pytest $(ARGS)

test-kernel: ## Compare with the real kernel, run as a process; ARGS="--programs N" for more or less
	@tools/setup test
	@$(BIN)/pytest tests/kernel $(ARGS)

test-live: ## Take, copy and merge snapshots while fio verifies the origin, twice LIVE_SECONDS (300)
	@tools/setup test
	@COW_LIVE_SECONDS=$(LIVE_SECONDS) $(BIN)/pytest -rP tests/test_live.py $(ARGS)

crash power faults: ## Kill processes, cut the power, damage stores: thousands of times, or LONG thousand
	@tools/setup test
	@COW_LONG=$(LONG) $(BIN)/pytest $(wildcard tests/test_$@.py tests/test_*_$@.py) $(ARGS)

bench: setup ## Run the benchmarks, each beside its limit; ARGS="--scale small" for a quick look
	@$(BIN)/pytest benchmarks --benchmark-only $(ARGS)

bench-peers: ## Run those beside other programs: NBD and FUSE servers, the kernel, reflinks (root)
	@tools/setup bench
	@$(BIN)/pytest benchmarks/peers $(ARGS)

bench-report: ## Run both as often as needed and write docs/benchmarks.md; ARGS="--as-is" runs none
	@tools/setup bench
	@$(BIN)/python benchmarks/report.py $(ARGS)

lint: ## Check style, types and the stub of the extension
	@tools/setup dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PATH='$(CURDIR)/$(BIN)':$$PATH cython-lint cow
	$(BIN)/mypy
	$(BIN)/stubtest cow._core

format: ## Lay out the Python files as lint wants them
	@tools/setup dev
	$(BIN)/ruff format

sdist: setup ## Make the source distribution in dist/
	@$(BIN)/python setup.py -q sdist

debug: ## Test a build with assertions, where every warning is an error
	@COW_BUILD=$@ tools/setup
	@COW_BUILD=$@ PYTHONPATH='$(CURDIR)/build/$@/lib' $(BIN)/pytest $(ARGS)

asan: ## Test a build with the address and undefined-behaviour sanitizers
	@COW_BUILD=$@ tools/setup
	@COW_BUILD=$@ PYTHONPATH='$(CURDIR)/build/$@/lib' $(ASAN) $(BIN)/pytest $(ARGS)

tsan: ## Test a build with the thread sanitizer (tests with threads, where ARGS names no others)
	@COW_BUILD=$@ tools/setup
	@COW_BUILD=$@ PYTHONPATH='$(CURDIR)/build/$@/lib' $(TSAN) \
		$(BIN)/pytest --capture=sys $(or $(ARGS),$(THREADED))

fuzz: ## Fuzz tables, stores and programs, FUZZ_SECONDS each; build/corpus has what is found
	@COW_BUILD=fuzz tools/setup fuzz
	@$(CC) -O2 -shared -fPIC -o build/fuzz/coverage.so fuzz/coverage.c
	@for name in $(FUZZ); do \
		mkdir -p build/corpus/$$name; \
		echo "fuzz: $$name, $(FUZZ_SECONDS) s"; \
		$(FUZZER) fuzz/main.py $$name -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 \
			-artifact_prefix=build/corpus/found-$$name- $(ARGS) build/corpus/$$name fuzz/corpus/$$name \
			|| exit; \
	done

corpus: ## Choose what fuzz/corpus keeps of what make fuzz has found
	@for name in $(FUZZ); do $(FUZZER) fuzz/pick.py $$name || exit; done

coverage: ## Report the lines that no test runs, the extension's too (any Python but 3.12)
	@COW_BUILD=$@ tools/setup dev
	@rm -f .coverage*
	@COW_BUILD=$@ COVERAGE_FILE='$(CURDIR)/.coverage' \
		COVERAGE_PROCESS_START='$(CURDIR)/tests/support/coverage.toml' \
		$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine -q --append
	@$(BIN)/coverage report
	@for part in 'cow/*.py' $(patsubst %,'%*',$(filter-out %__pycache__/,$(wildcard cow/*/))); do \
		printf 'coverage: %-14s %5s %%\n' "$$part" \
			"$$($(BIN)/coverage report --precision=1 --format=total --include="$$part")"; \
	done
	@for part in --include='cow/core/*' --omit='cow/core/*,cow/_core.pyx'; do \
		$(BIN)/coverage report "$$part" --fail-under=$(COVERAGE) >/dev/null || \
			{ echo "coverage: below $(COVERAGE) % ($$part)"; exit 1; }; \
	done

clean: ## Remove what was built, .venv too
	rm -rf .venv build dist *.egg-info cow/_core.c cow/core/_core.c cow/*.so .coverage
