# `make demo` and `make test` on a machine without ROS: everything comes from PyPI, into this folder.

# Any Python that ROS 2's wheels exist for; a path works too: `make PYTHON=/usr/bin/python3.10 test`.
PYTHON ?= >=3.10,<3.13
PYTEST_ARGS ?=
# Of `make fuzz` (for each target; 1) and `make soak` (60); and the targets of `make fuzz`, all if none is named.
MINUTES ?=
TARGETS ?=

# Pages in one wrapping style.
MARKDOWN := $(wildcard *.md docs/*.md examples/*.md examples/*/*.md test/*/*.md)

UV := .bootstrap/bin/uv
KILTED := .venv/.installed
LOWEST := .venv-lowest/.installed
JAZZY := .venv-jazzy/.installed

# A sourced ROS 2, or a Python of ROS 2's wheels that started this make, must not reach into the environments here.
unexport LD_LIBRARY_PATH PYTHONPATH PYTHONHOME VIRTUAL_ENV _ROS_WHEELS_BOOTSTRAP_COMPLETE
unexport AMENT_PREFIX_PATH COLCON_PREFIX_PATH CMAKE_PREFIX_PATH ROS_DISTRO RMW_IMPLEMENTATION

# Packages with CUDA libraries are large; a slow line is no error.
export UV_HTTP_TIMEOUT ?= 600

.DEFAULT_GOAL := help
.PHONY: help demo check format test test-ros test-jazzy test-rest test-behind test-lowest audit fuzz soak environments clean

help:
	@echo "make demo    replay the sample bag through the node, print a table, write out/demo/"
	@echo "make demo VIEW=1   the same in a loop, seen in a browser, until Ctrl-C"
	@echo "make check   formatters, linter, types, spelling; seconds"
	@echo "make format  what of these can be mended by itself"
	@echo "make test    run the tests, and those that touch ROS again under Jazzy's rclpy"
	@echo "make test-lowest   some of them with the oldest versions that setup.py allows"
	@echo "make audit   known vulnerabilities of the installed packages"
	@echo "make fuzz    damaged input for everything that reads any; MINUTES=1 for each target"
	@echo "make soak    MINUTES=60: the node for an hour among policies that come, go, stop and die; a table of what grows"
	@echo "make clean   remove environments, build outputs and out/"

demo: $(KILTED)
	.venv/bin/python -m demo $(if $(VIEW),--view)

# Every run happens, also after one has failed. Tests that touch ROS wait about as much as they compute, so the two
# distributions' run side by side, and the rest computes while they wait: at the lowest priority, so that they need not wait
# for it. What Kilted's tests print is seen at once, what the others print in one piece when they have ended.
test: $(KILTED) $(JAZZY)
	@$(MAKE) --no-print-directory --keep-going --jobs=3 test-ros test-jazzy test-behind

# Each without the tests to which rclpy's version is all one and that the other runs.
test-ros: $(KILTED)
	.venv/bin/python -m pytest -m "ros and not jazzy_alone" $(PYTEST_ARGS)

test-jazzy: $(JAZZY)
	@mkdir -p out
	@.venv-jazzy/bin/python -m pytest -m "ros and not kilted_alone" $(PYTEST_ARGS) >out/test-jazzy.log 2>&1; \
	code=$$?; cat out/test-jazzy.log; exit $$code

# A process per core with one thread each.
test-rest: $(KILTED)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not ros" --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

test-behind: $(KILTED)
	@mkdir -p out
	@nice -n 19 $(MAKE) --no-print-directory test-rest >out/test-rest.log 2>&1; \
	code=$$?; cat out/test-rest.log; exit $$code

# With the oldest version of everything that setup.py allows, on the oldest Python: nobody would notice otherwise that a
# bound is wrong. The tests without ROS that need no further package, and one through the node.
LOWEST_PYTHON ?= 3.10
LOWEST_TESTS := test/images test/sources test/tokens test/offline test/visualization test/test_synchronizer.py \
  test/tokenizer/test_options.py test/tokenizer/test_preprocess.py test/tokenizer/checkpoints/test_open.py \
  test/tokenizer/checkpoints/test_checkpoint.py
test-lowest: $(LOWEST)
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m "not ros" --numprocesses=2 --dist=loadfile $(LOWEST_TESTS) \
	  $(PYTEST_ARGS)
	.venv-lowest/bin/python -m pytest test/test_sample_bag_tokens.py test/nodes/visual_tokenizer/test_node.py \
	  -k "sample_bag or test_two_cameras_approximate" $(PYTEST_ARGS)

$(LOWEST): setup.py | $(UV)
	@[ -x .venv-lowest/bin/python ] || $(UV) venv --quiet --python '$(LOWEST_PYTHON)' .venv-lowest
	$(UV) pip install --python .venv-lowest/bin/python --resolution lowest-direct \
	  --editable '.[tokenizer,ros,shm,offline,view,sim]'
	$(UV) pip install --python .venv-lowest/bin/python pytest pytest-xdist packaging scikit-image
	@touch $@

# atheris has wheels for some Pythons only; without it inputs are not led by coverage, and the program says so.
fuzz: $(KILTED)
	-@$(UV) pip install --quiet --python .venv/bin/python --only-binary atheris 'atheris>=3'
	nice .venv/bin/python test/fuzz --minutes $(or $(MINUTES),1) $(if $(TARGETS),--target $(TARGETS))

# Not part of `make test`: an error if memory, threads or files grow beyond what the file states.
soak: $(KILTED)
	@mkdir -p out
	.venv/bin/python benchmarks/soak.py --minutes $(or $(MINUTES),60) --json out/soak.json

# Every tool runs, also after one has failed.
check: $(KILTED)
	@code=0; for tool in "ruff check" "ruff format --check" "python docs/make_api.py --check" \
	  "mdformat --check $(MARKDOWN)" mypy codespell; do \
	  echo ".venv/bin/$$tool"; .venv/bin/$$tool || code=1; \
	done; .venv/bin/python .ci/audit --warn; exit $$code

# Known vulnerabilities of what is installed. The file says why `make check` only warns of them.
audit: $(KILTED)
	.venv/bin/python .ci/audit

format: $(KILTED)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	.venv/bin/python docs/make_api.py
	.venv/bin/mdformat $(MARKDOWN)

environments: $(KILTED) $(JAZZY)

$(UV):
	@python3 -m venv .bootstrap || { rm -rf .bootstrap; \
	  echo "make: needs python3 with its venv module (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	.bootstrap/bin/python -m pip install --quiet --disable-pip-version-check uv

# uv leaves pip's settings alone (an extra index or a folder of wheels there could mix torch builds), and shares
# files between the two environments.
$(KILTED): setup.py setup.cfg package.xml | $(UV)
	@[ -x .venv/bin/python ] || $(UV) venv --quiet --python '$(PYTHON)' .venv
	$(UV) pip install --python .venv/bin/python --editable '.[all]'
	@touch $@

$(JAZZY): setup.py setup.cfg package.xml requirements/jazzy.txt | $(UV)
	@[ -x .venv-jazzy/bin/python ] || $(UV) venv --quiet --python '$(PYTHON)' .venv-jazzy
	$(UV) pip install --python .venv-jazzy/bin/python --requirement requirements/jazzy.txt \
	  --editable '.[tokenizer,shm,offline,view,sim,test]'
	@touch $@

clean:
	rm -rf .bootstrap .venv .venv-jazzy .venv-lowest build install log out dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
