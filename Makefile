# Everything a developer runs. `make help` lists it.

VENV   ?= .venv
PYTHON ?= python3
# Installed first and pinned, so that a CPU build already on disk is taken where there is one.
# For the CPU build elsewhere: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
ARGS   ?=
JSON   ?=
KILLS      ?= 100
RECORDS    ?= 200000
PARTITIONS ?= 1
STORE      ?= disk
RANKS      ?= 1
CLIENT     ?= python
SECONDS    ?= 3600
SEEDS      ?= 3
JOBS       ?= 1
RUNS       ?= quality-runs.jsonl
LOSSES     ?= logit_adjusted,cross_entropy,class_balanced,focal,influence_balanced
SERVICES   ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

bin := $(VENV)/bin
json := $(if $(JSON),--json $(JSON))

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench bench-bmc bench-classes bench-cold-start bench-quality bench-serve bench-stream bench-synthetic chaos faults fuzz fuzz-api screenshots soak test-browser test-compose up up-scaled down clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(VENV)/.installed ## Make the virtual environment

$(VENV)/.installed: pyproject.toml hatch_build.py $(wildcard trainer/*.[ch] trainer/losses/*.c)
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/pip install -q $(TORCH)
	$(bin)/pip install -q -e '.[dev]'
	touch $@

demo: install ## Learn flight delays from a Kafka stream and serve predictions (ARGS="--rows 50000 ...")
	@$(bin)/tailstream demo $(ARGS)

test: install ## Run the tests (ARGS="-k name")
	$(bin)/pytest -n 2 --dist worksteal $(ARGS)

check: install ## Lint, types, layers, formatting
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports

format: install ## Format the code
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

bench: bench-bmc bench-synthetic bench-serve ## Run the benchmarks

bench-bmc: install ## Time, memory and error of the BMC loss (JSON=FILE ARGS="--device cuda")
	$(bin)/python -m tests.benchmarks.bmc $(json) $(ARGS)

bench-serve: install ## POST /predict beside an echo, under overload, training and swaps (JSON=FILE PARTS=a,b); needs wrk
	$(bin)/python -m tests.benchmarks.serve $(if $(PARTS),--parts "$(PARTS)") $(json)

bench-stream: install ## From the topic to the model, stage by stage, one rank and two, on a real Kafka (JSON=FILE)
	$(bin)/python -m tests.benchmarks.stream $(json) $(ARGS)

bench-synthetic: install ## The synthetic benchmark of Balanced MSE (JSON=FILE)
	$(bin)/python -m tests.benchmarks.synthetic $(json)

bench-quality: install ## Errors on real streams beside plain losses and other libraries, an hour; goes on where it was stopped (JSON=FILE RUNS=FILE JOBS=1 ROWS=60000 SEEDS=3 STREAMS=a,b)
	$(bin)/pip install -q -e '.[rivals]'
	$(bin)/python -m tests.benchmarks.quality --runs $(RUNS) --jobs $(JOBS) $(if $(ROWS),--rows $(ROWS)) --seeds $(SEEDS) $(if $(STREAMS),--streams "$(STREAMS)") $(json)

bench-classes: install ## Accuracy and recall of every loss of classes on Portal (JSON=FILE ROWS=30738 SEEDS=3 LOSSES=a,b)
	folder=$$(mktemp -d) && trap 'rm -r "$$folder"' EXIT && \
	$(bin)/tailstream dataset portal "$$folder/portal.jsonl" && \
	$(bin)/tailstream init "$$folder/portal.jsonl" --label species_id --out "$$folder/portal.toml" && \
	$(bin)/tailstream evaluate "$$folder/portal.jsonl" --config "$$folder/portal.toml" \
		--compare $(LOSSES) --seeds $(SEEDS) $(if $(ROWS),--rows $(ROWS)) $(json)

bench-cold-start: install ## Errors on the first rows of streams with a hard start (JSON=FILE SEEDS=3)
	$(bin)/python -m tests.benchmarks.cold_start --seeds $(SEEDS) $(json)

chaos: install ## Kill trainers and compare with one undisturbed (KILLS=100 RECORDS=200000 PARTITIONS=1 STORE=disk|s3 RANKS=1 CLIENT=python|confluent JSON=FILE)
	$(bin)/python -m tests.faults.chaos --kills $(KILLS) --records $(RECORDS) --partitions $(PARTITIONS) --store $(STORE) --ranks $(RANKS) --client $(CLIENT) $(json)

faults: install ## Do to broker, topic, disk and snapshots what can be done to them (JSON=FILE); needs root
	TAILSTREAM_TEST_AWAY_S=60 $(bin)/python -m tests.faults $(json)

fuzz: install ## Send records no one would send (JSON=FILE)
	$(bin)/python -m tests.faults.fuzz $(json)

fuzz-api: install ## Ask the service whatever its own description allows, and does not (SECONDS=600 JSON=FILE)
	$(bin)/python -m tests.faults.api $(if $(filter command% environment%,$(origin SECONDS)),--seconds $(SECONDS)) $(json)

soak: install ## All of that at random (SECONDS=3600); needs root
	$(bin)/python -m tests.faults.soak --seconds $(SECONDS)

test-browser: install ## The page in Chromium, its metrics in Prometheus, and what a tab costs (JSON=FILE)
	$(bin)/pytest tests/browser $(if $(JSON),--browser-json $(JSON)) $(ARGS)

screenshots: install ## Pictures of the page for the README, from running demos; needs chromium
	$(bin)/python -m tests.browser.screenshots

test-compose: install ## Bring the whole stack up in Docker, use it, kill a part, bring it down (JSON=FILE)
	$(bin)/python -m tests.compose $(json)

up: ## docker compose up, with flights published (http://127.0.0.1:8000)
	docker compose --profile demo up -d --build

up-scaled: ## The same with several services behind a proxy, http://127.0.0.1:8080 (SERVICES=2)
	SERVICE_PORT=8000-8015 docker compose --profile demo --profile scale up -d --build --scale service=$(SERVICES)

down: ## Bring it down, volumes too
	docker compose --profile demo --profile scale down --volumes

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
