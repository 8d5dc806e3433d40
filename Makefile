# Each target sets up what it needs in .venv and is quick the second time.

VENV := .venv
BIN := $(VENV)/bin
# Ahead-of-time compilation is tested with the oldest and the newest supported triton, beside the one in .venv.
TRITONS := 3.6.0 3.9.0
# The DM control suite is tested with the oldest supported MuJoCo, as it does not work with the one in .venv.
MUJOCO := 3.17.0
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal -p no:benchmark

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The processes of a test run share the cores among themselves; those of a benchmark come one after the other.
test: export OMP_NUM_THREADS = 1

ifeq ($(shell uname -sm),Linux x86_64)
AOT := $(TRITONS:%=.triton/%/.complete)
DMC := .mujoco/$(MUJOCO)/.complete
endif

.PHONY: help demo test test-long bench bench-compare gpu lint clean types docs

help:
	@echo 'make demo    collect data, train floq and draw its figure, on the CPU or a GPU (within 10 minutes)'
	@echo 'make test    run the tests; those that need a GPU are skipped and counted where there is none'
	@echo 'make test-long   every published setting of floq for 100 updates (a quarter of an hour of one core)'
	@echo 'make bench   measure against JAX, torch.compile and eager PyTorch on this machine (within 15 minutes on two cores)'
	@echo 'make bench-compare BASE=<git ref>   is this tree slower than another commit? (minutes; exit code 1 if it is)'
	@echo 'make gpu     on a machine with CUDA and no network: test and measure the kernels with the torch that is there'
	@echo 'make lint    check style and types'
	@echo 'make types   check that a type checker knows the type of everything public'
	@echo 'make docs    build the documentation into site/'
	@echo 'make clean   remove what the other targets have made here, results in runs/ and demo/ excepted'
	@echo 'PYTHON=...   the Python to make .venv with, 3.10 to 3.13 (by default the first of python3, python3.13, ...)'

demo: $(VENV)/.installed-demo
	@$(BIN)/python -m fastflow.demo

test: $(VENV)/.installed-dev $(AOT) $(DMC)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: export OMP_NUM_THREADS = 1
test-long: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(PYTEST_ARGS) -m long

# On a CPU the table says more than pytest-benchmark's groups, and torch.compile's share of both would take too long.
bench: $(VENV)/.installed-rivals
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-group-by=group --benchmark-sort=mean \
			--benchmark-columns=min,median,iqr,rounds --benchmark-autosave; \
	else \
		$(BIN)/python -m benchmarks.cpu $(BENCH_ARGS); \
	fi

bench-compare: $(VENV)/.installed-dev
	@$(BIN)/python -m benchmarks.compare $(or $(BASE),$(error name the commit to compare with: make bench-compare BASE=main)) $(BENCH_ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

types: $(VENV)/.installed-types
	@$(BIN)/python -m pytest -q -p no:benchmark tests/test_public.py

docs: $(VENV)/.installed-dev
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo 'Documentation: site/index.html'

# Nothing is installed but the project itself: the machine has no network, and its torch is the one to be measured.
gpu:
	@python=; \
	for candidate in $(or $(PYTHON),python3 python $(BIN)/python); do \
		if "$$candidate" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
			python=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'make gpu: no CUDA GPU found: none of $(or $(PYTHON),python3 python $(BIN)/python) has a torch that sees one.' >&2; \
		echo 'make gpu: name a Python whose torch does with PYTHON=..., or run `make test`, which needs no GPU.' >&2; \
		exit 1; \
	fi; \
	managed=$$("$$python" -c 'import os, sys, sysconfig; \
		mark = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"); \
		print("--break-system-packages" if sys.prefix == sys.base_prefix and os.path.exists(mark) else "")'); \
	if ! "$$python" -m pip install --quiet --no-deps --no-build-isolation $$managed -e .; then \
		echo "make gpu: $$python needs pip and setuptools 70.1 or newer, or setuptools 64 with wheel." >&2; \
		exit 1; \
	fi; \
	"$$python" -m benchmarks.gpu $(GPU_ARGS)

clean:
	rm -rf $(VENV) .triton .mujoco build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation is taken up again by the next call.
$(VENV)/.created:
	@python=; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
		if "$$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
			python=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'make: no Python 3.10 to 3.13 among $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10).' >&2; \
		echo 'make: install one, or name one with PYTHON=...' >&2; \
		exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Making $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear $(VENV) || { \
			echo "make: $$python cannot make virtual environments; Debian and Ubuntu have that in the package python3-venv." >&2; \
			exit 1; \
		}; \
	fi; \
	$(BIN)/python -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 13); \
		sys.exit(None if ok else "make: the Python of $(VENV) is not one of 3.10 to 3.13; remove $(VENV) and call again.")'
	@# The pip that came with Python 3.10.0 cannot install a project in place without its own setuptools.
	@$(BIN)/python -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 22)' || \
		$(BIN)/python -m pip install --quiet --upgrade 'pip>=22'
	@touch $@

INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt

# setup.py tells why OGBench comes by itself on Python 3.13.
define install
@echo 'Installing fastflow[$(1)] and its dependencies into $(VENV); this takes minutes where PyTorch has to be downloaded'
@$(INSTALL) -e '.[$(1)]'
@$(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || $(INSTALL) --no-deps ogbench dm_control
@touch $@
endef

$(VENV)/.installed-demo: $(VENV)/.created setup.py pyproject.toml constraints.txt
	$(call install,rl$(comma)plot)

$(VENV)/.installed-dev: $(VENV)/.created setup.py pyproject.toml constraints.txt
	$(call install,dev)
	@# [dev] holds what the demo needs.
	@touch $(VENV)/.installed-demo

# What `make bench` compares with; nothing else needs it.
$(VENV)/.installed-rivals: $(VENV)/.installed-dev
	$(call install,dev$(comma)rivals)

$(VENV)/.installed-types: $(VENV)/.installed-dev
	$(call install,dev$(comma)types)

comma := ,

# Made again for another Python: triton is compiled for one.
.triton/%/.complete: $(VENV)/.created
	@tag=$$($(BIN)/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])'); \
	if ! grep -qs "^Tag: $$tag-" .triton/$*/triton-$*.dist-info/WHEEL; then \
		echo "Installing triton $* into .triton/$* for ahead-of-time compilation"; \
		rm -rf .triton/$* .triton/$*.partial && \
		$(BIN)/python -m pip install --quiet --no-deps --target .triton/$*.partial triton==$* && \
		mv .triton/$*.partial .triton/$*; \
	fi
	@touch $@

# As above; with MuJoCo 4 in .venv, the processes of some tests import this one in its place.
.mujoco/%/.complete: $(VENV)/.created
	@tag=$$($(BIN)/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])'); \
	if ! grep -qs "^Tag: $$tag-" .mujoco/$*/mujoco-$*.dist-info/WHEEL; then \
		echo "Installing mujoco $* into .mujoco/$* for the DM control suite"; \
		rm -rf .mujoco/$* .mujoco/$*.partial && \
		$(BIN)/python -m pip install --quiet --no-deps --target .mujoco/$*.partial mujoco==$* && \
		mv .mujoco/$*.partial .mujoco/$*; \
	fi
	@touch $@
