# How everything is run; `make help` lists it.

MODEL     ?= demo
DATA      ?=
RUN       ?=
WEIGHTS   ?=
IMAGES    ?=
ARGS      ?=
NNODES    ?= 1
NODE_RANK ?= 0
MASTER    ?= $(error name the first machine: MASTER=host:port)
VENV      := .venv
TORCHVISION := runs/torchvision/model.pt

ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/ready
endif

# Quoted for the shell: folders may have spaces.
quote = '$(subst ','\'',$(1))'
option = $(if $(2),$(1) $(call quote,$(2)))

# One process for a CPU or one GPU, torchrun for more; GPUS=0 hides the GPUs. Unless GPUS is given,
# all visible ones; in training, those that share the batch evenly (found out once for a target).
ifeq ($(origin GPUS), undefined)
COMMA   := ,
FOUND   := $(words $(filter GPU,$(shell nvidia-smi -L 2>/dev/null)))
LISTED  := $(words $(subst $(COMMA), ,$(CUDA_VISIBLE_DEVICES)))
VISIBLE := $(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),$(FOUND),$(LISTED))
BATCH    = import train; batch = train.PRESETS['$(MODEL)'].batch_size
SHARED   = $(shell $(PYTHON) -c "$(BATCH); import math; print(math.gcd($(VISIBLE), batch))" \
           $(OF) 2>/dev/null)
ONCE     = $(if $(filter 0 1,$(VISIBLE)),1,$(or $(lastword $(SHARED)),$(VISIBLE)))
GPUS     = $(if $(FOR_$@),,$(eval FOR_$@ := $$(ONCE)))$(FOR_$@)
endif
ifneq ($(origin GPUS), file)
$(if $(filter-out $(shell seq 0 64),$(GPUS)),$(error GPUS=$(GPUS): must be a number of processes))
endif
TORCHRUN = $(PYTHON) -m torch.distributed.run --nproc-per-node $(GPUS)
ALONE    = $(if $(filter 0,$(GPUS)),CUDA_VISIBLE_DEVICES= )$(PYTHON)
LAUNCH   = $(if $(filter 0 1,$(GPUS)),$(ALONE),$(TORCHRUN) --standalone)
ifneq ($(NNODES), 1)
LAUNCH   = $(TORCHRUN) --nnodes $(NNODES) --node-rank $(NODE_RANK) --rdzv-backend c10d \
           --rdzv-endpoint $(MASTER)
endif

# What eval, predict and export take: WEIGHTS, else RUN, else the last run trained.
LAST   = $(shell ls -t runs/*/checkpoint-*.pt 2>/dev/null | sed -n '1s|/[^/]*$$||p')
NO_RUN = $(error no run in runs/ yet: make train first, or name one with RUN=... or WEIGHTS=...)
LATEST = $(call quote,$(or $(RUN),$(LAST),$(NO_RUN)))
CHOSEN = $(if $(WEIGHTS),$(call quote,$(WEIGHTS)),$(LATEST))
FOLDER = $(call quote,$(or $(DATA),$(error name a COCO-format folder: DATA=...)))

# Passing tests leave no files: one run would leave 1 GB, and pytest keeps three.
PYTEST = $(PYTHON) -m pytest -q -o tmp_path_retention_policy=failed

.PHONY: help train resume eval predict check plots export test test-gpu bench clean distclean
help:
	@echo "make train    train MODEL on DATA into RUN, then evaluate (default: demo, generated data)"
	@echo "make resume   go on with RUN after an interruption"
	@echo "make eval     COCO figures of RUN (default: the last run trained) on its validation split"
	@echo "make predict  draw the objects found in IMAGES=\"a.jpg folder/\""
	@echo "make check    what is in DATA, and what training MODEL would do with it"
	@echo "make plots    curves of RUN, and its best, worst and wrong images"
	@echo "make export   RUN as a .pt2 file that runs without this code"
	@echo "make test     all tests that need no GPU; make test-gpu: those that do; make bench: speed"
	@echo "make clean    remove caches; make distclean: the virtual environment as well"
	@echo
	@echo "MODEL=$(MODEL)   preset; python train.py --help lists them all"
	@echo "DATA=    COCO-format folder (annotations/instances_<split>.json, <split>/*.jpg)"
	@echo "RUN=     run folder (default: runs/MODEL)"
	@echo "WEIGHTS= run folder or checkpoint to use (default: RUN); $(TORCHVISION) is"
	@echo "         torchvision's published FCOS, made when it is first asked for"
	@echo "GPUS=    processes, one a GPU (default: all visible that share the batch evenly; 0: CPU)"
	@echo "NNODES=1 NODE_RANK=0 MASTER=host:port   for several machines, which share the run folder"
	@echo "ARGS=    more options, such as ARGS=\"--batch-size 8 --lr 0.005\""
	@echo "PYTHON=  an interpreter that has the packages, instead of $(VENV)"

train: $(READY) $(if $(DATA),,runs/shapes/annotations/instances_val.json)
	$(LAUNCH) train.py $(MODEL) --data $(call quote,$(or $(DATA),runs/shapes)) \
		$(call option,--run-dir,$(RUN)) $(ARGS)

resume: BATCH = import sys, model; \
	batch = model.load_checkpoint(sys.argv[1])['config']['batch_size']
resume: OF = $(LATEST)
resume: $(READY)
	$(LAUNCH) train.py --resume --run-dir $(LATEST) $(call option,--data,$(DATA)) $(ARGS)

eval predict: SHARED = $(VISIBLE)
eval: $(READY) $(filter $(TORCHVISION),$(WEIGHTS))
	$(LAUNCH) evaluate.py $(CHOSEN) $(call option,--data,$(DATA)) $(ARGS)

predict: $(READY) $(filter $(TORCHVISION),$(WEIGHTS))
	$(if $(IMAGES),,$(error name pictures: make predict IMAGES="a.jpg folder/"))
	$(ALONE) evaluate.py $(CHOSEN) --images $(foreach name,$(IMAGES),$(call quote,$(name))) $(ARGS)

check: $(READY)
	$(PYTHON) tools/check_data.py $(FOLDER) $(MODEL) $(ARGS)

plots: $(READY)
	$(PYTHON) tools/plots.py curves $(LATEST)
	$(PYTHON) tools/plots.py evaluation $(LATEST) $(call option,--data,$(DATA)) $(ARGS)

export: $(READY)
	$(PYTHON) tools/export.py $(CHOSEN) $(ARGS)

test: $(READY)
	$(PYTEST) tests

test-gpu: $(READY)
	$(PYTEST) tests/test_csrc.py tests/test_model.py tests/test_evaluate.py -rs

bench: $(READY)
	$(PYTHON) tools/benchmark.py $(ARGS)

$(VENV)/ready: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	touch $@

runs/shapes/annotations/instances_val.json: | $(READY)
	$(PYTHON) tools/make_shapes.py runs/shapes

$(TORCHVISION): | $(READY)
	$(PYTHON) tools/import_weights.py torchvision --form torchvision --out $@

clean:
	rm -rf __pycache__ */__pycache__ .pytest_cache runs/check

distclean: clean
	rm -rf $(VENV)
