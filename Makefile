# How everything is run; `make help` lists it.

MODEL     ?= demo
DATA      ?=
RUN       ?=
WEIGHTS   ?=
IMAGES    ?=
ARGS      ?=
COMMA     := ,
GPUS      ?= $(if $(CUDA_VISIBLE_DEVICES),$(words $(subst $(COMMA), ,$(CUDA_VISIBLE_DEVICES))),$(words $(filter GPU,$(shell nvidia-smi -L 2>/dev/null))))
NNODES    ?= 1
NODE_RANK ?= 0
MASTER    ?=
VENV      := .venv

ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/ready
endif

# One process for a CPU or one GPU, torchrun for more; GPUS=0 hides the GPUs.
LAUNCH = $(if $(filter 0,$(GPUS)),CUDA_VISIBLE_DEVICES= )$(PYTHON)
ifneq ($(NNODES), 1)
LAUNCH = $(PYTHON) -m torch.distributed.run --nnodes $(NNODES) --node-rank $(NODE_RANK) --nproc-per-node $(GPUS) --rdzv-backend c10d --rdzv-endpoint $(MASTER)
else ifneq ($(filter-out 0 1,$(GPUS)),)
LAUNCH = $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(GPUS)
endif

# What eval and predict take up: WEIGHTS, else RUN, else the last run trained.
LAST   = $(patsubst %/,%,$(dir $(firstword $(shell ls -t runs/*/checkpoint-*.pt 2>/dev/null))))
CHOSEN = $(or $(WEIGHTS),$(RUN),$(LAST),$(error no run in runs/ yet: make train first, or name one with RUN=... or WEIGHTS=...))

.PHONY: help train resume eval predict check test test-gpu bench clean
help:
	@echo "make train    train MODEL on DATA into RUN, then evaluate (no variable: a demo on generated data, 5 minutes on a CPU)"
	@echo "make resume   go on with RUN after an interruption"
	@echo "make eval     COCO figures of RUN (default: the last run trained) on its validation split"
	@echo "make predict  draw the objects found in IMAGES=\"a.jpg folder/\""
	@echo "make check    what is in DATA, and what training would stumble over"
	@echo "make test     all tests that need no GPU; make test-gpu: those that do; make bench: speed against the peers"
	@echo
	@echo "MODEL=$(MODEL)   preset; python train.py --help lists them all"
	@echo "DATA=    COCO-format folder (annotations/instances_<split>.json, <split>/*.jpg)"
	@echo "RUN=     folder of the run (default: runs/MODEL)"
	@echo "WEIGHTS= run folder, checkpoint or torchvision (its published FCOS) to evaluate or predict with (default: RUN)"
	@echo "GPUS=$(GPUS)   processes, one a GPU (default: all visible; 0: CPU)"
	@echo "NNODES=1 NODE_RANK=0 MASTER=host:port   for several machines"
	@echo "ARGS=    more options, such as ARGS=\"--batch-size 8 --lr 0.005\""
	@echo "PYTHON=  an interpreter that has the packages, instead of $(VENV)"

train: $(READY)
	$(LAUNCH) train.py $(MODEL) $(if $(DATA),--data $(DATA)) $(if $(RUN),--run-dir $(RUN)) $(ARGS)

resume: $(READY)
	$(LAUNCH) train.py --resume --run-dir $(or $(RUN),$(LAST)) $(ARGS)

eval: $(READY)
	$(LAUNCH) evaluate.py $(CHOSEN) $(if $(DATA),--data $(DATA)) $(ARGS)

predict: $(READY)
	$(if $(IMAGES),,$(error name pictures: make predict IMAGES="a.jpg folder/"))
	$(PYTHON) evaluate.py $(CHOSEN) --images $(IMAGES) $(ARGS)

check: $(READY)
	$(PYTHON) data.py $(or $(DATA),$(error name a COCO-format folder: make check DATA=...)) $(ARGS)

test: $(READY)
	$(PYTHON) -m pytest -q tests

test-gpu: $(READY)
	$(PYTHON) -m pytest -q tests/test_csrc.py tests/test_model.py -rs

bench: $(READY)
	$(PYTHON) tests/benchmark.py $(ARGS)

$(VENV)/ready: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf $(VENV) __pycache__ */__pycache__ .pytest_cache
