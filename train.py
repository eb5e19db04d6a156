"""train.py: train the detector, and lose no work when interrupted.  (FCOS, Sec. 4)

    python train.py demo --data runs/shapes                                a small detector
    python train.py fcos_R_50_FPN_1x_center_giou --data /data/coco         as published
    torchrun --standalone --nproc-per-node 8 train.py fcos_R_50_FPN_1x --data /data/coco
    python train.py --resume --run-dir runs/demo                           after an interruption
    python train.py demo --help                                            every option

A step is one global batch (16 images; the demo: 4), however it is split over processes and
microbatches:

 1. the sampler decides what the step sees, from the seed and the step alone (data.py);
 2. targets are assigned, and the denominators of the losses summed over the whole batch;
 3. each microbatch goes forward and backward; gradients add up; the optimizer steps.

So 1, 2 or 8 processes compute the same losses and weights, up to the order of floating-point sums.
All state after step s is in the checkpoint after step s: a run that is killed and resumed ends with
the same weights.
"""

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from assign import assign_targets, make_locations
from data import UserError
from evaluate import Detector, dtype_of, print0, rank_and_world
from loss import BOX_LOSSES, fcos_loss, normalizers
from model import (CHECKPOINT_FORMAT, FCOS, IMPROVED, ModelConfig, atomic_write, checkpoints_of,
                   config_from_dict, load_checkpoint, load_weights, validate)

# --- configuration ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """How a detector is trained. Defaults: FCOS 1x as first published."""
    model: ModelConfig = ModelConfig()
    data: str = ""                           # COCO-format folder
    train_split: str = ""                    # default: train2017, or the only train* split
    val_split: str = ""                      # default: val2017, or the only val* split
    backbone_weights: str = "imagenet"       # imagenet (downloaded), none, or a state dict file
    # targets and losses
    center_radius: float = 0.0               # of center sampling, in strides; 0: the whole box
    box_loss: Literal[BOX_LOSSES] = "iou"    # regression loss of positive locations
    # optimization
    batch_size: int = 16                     # images of a step, over all processes
    steps: int = 90_000                      # optimizer steps, at most
    epochs: float = 0.0                      # passes over the data, at most; 0: no limit
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has momentum 0.9
    lr: float = 0.01                         # learning rate; biases use twice as much
    weight_decay: float = 1e-4               # not applied to biases
    warmup_steps: int = 500                  # at a third of the lr; at most a tenth of the run
    schedule: Literal["step", "cosine"] = "step"  # step: x 0.1 after 2/3 and 8/9 of the steps
    grad_clip: float = 0.0                   # largest norm of the gradient; 0: no limit
    # augmentation
    train_short_sides: tuple[int, int] = (800, 800)  # pixels; range of an image's short side
    flip: float = 0.5                        # probability of a horizontal flip
    seed: int = 0                            # of initial weights and sampling
    canvas_sides: int = 4                    # how many padded heights and widths may occur; fewer:
    #                                          fewer recompilations, more padding; 0: any
    # execution
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it
    compile: Literal["auto", "on", "off"] = "auto"       # auto: torch.compile on a GPU
    # may change on resume
    microbatch: int = 0                      # images at once on a device; lower it when out of
    #                                          memory, results stay the same; 0: all
    num_workers: int = min(4, os.cpu_count() or 1)  # data loading workers per process; 0: none
    log_every: int = 20                      # steps between progress lines
    eval_every: int = 0                      # steps between evaluations; 0: a fifth of the run
    checkpoint_every: int = 1000             # steps between checkpoints
    checkpoint_minutes: float = 10.0         # minutes between checkpoints, at most

    def __post_init__(self):
        validate(self, at_least=dict(batch_size=1, steps=1, lr=1e-12, log_every=1,
                                     checkpoint_every=1, train_short_sides=1),
                 at_most=dict(flip=1, lr=1e40))
        if self.train_short_sides[0] > self.train_short_sides[1]:
            raise UserError(f"--train-short-sides {self.train_short_sides}: the smaller must come "
                            "first")


MAY_CHANGE = {"data", "microbatch", "num_workers", "log_every", "eval_every", "checkpoint_every",
              "checkpoint_minutes"}
# What --init-from takes over from the other checkpoint's configuration.
ARCHITECTURE = ("backbone", "backbone_norm", "stride_in_1x1", "channels", "tower_depth",
                "centerness_on_box_tower", "box_unit", "location_offset", "sqrt_score",
                "pixel_mean", "pixel_std")
TERMS = ("cls", "box", "centerness")  # of the loss, in the order of `fcos_loss`
# Keep channels_last through every GroupNorm, and fuse its backward pass.
COMPILE_OPTIONS = {"force_layout_optimization": True, "realize_opcount_threshold": 100}

base = TrainConfig()
center = replace(base, center_radius=1.5)
giou = replace(center, box_loss="giou")
resnet101 = ModelConfig(backbone="resnet101")
two_x = dict(steps=180_000, train_short_sides=(640, 800))
# Small enough for two CPU cores: GroupNorm and AdamW, to learn from random weights.
demo = replace(
    giou, backbone_weights="none", batch_size=4, steps=2100, epochs=16, optimizer="adamw", lr=7e-4,
    weight_decay=0.05, warmup_steps=50, schedule="cosine", grad_clip=2.0, compile="off",
    train_short_sides=(224, 288), canvas_sides=0, num_workers=0,
    model=ModelConfig(backbone="resnet10", backbone_norm="group", frozen_stages=0, channels=64,
                      tower_depth=2, short_side=280, long_side=440, enlarge=False,
                      box_unit="stride", centerness_on_box_tower=True))
PRESETS = {
    "demo": demo,
    "fcos_R_50_FPN_1x": base,
    "fcos_R_50_FPN_1x_center": center,
    "fcos_R_50_FPN_1x_center_liou": replace(center, box_loss="linear_iou"),
    "fcos_R_50_FPN_1x_center_giou": giou,
    "fcos_R_101_FPN_2x": replace(base, model=resnet101, **two_x),
    "fcos_R_101_FPN_2x_center_giou": replace(giou, model=resnet101, **two_x),
    "fcos_imprv_R_50_FPN_1x": replace(giou, model=ModelConfig(**IMPROVED)),
    "fcos_imprv_R_101_FPN_2x": replace(giou, model=replace(resnet101, **IMPROVED), **two_x),
}


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step; a pure function (Sec. 4)."""
    if step < min(config.warmup_steps, config.steps // 10):
        return config.lr / 3
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * 0.1 ** sum(step >= round(config.steps * part) for part in (2 / 3, 8 / 9))


# --- one step -----------------------------------------------------------------------------------

def build_optimizer(model: FCOS, config: TrainConfig) -> torch.optim.Optimizer:
    """Biases learn at twice the rate and do not decay."""
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [(name, p) for name, p in learned if not name.endswith("bias")]
    biases = [(name, p) for name, p in learned if name.endswith("bias")]
    groups = [{"params": weights, "lr_factor": 1.0, "weight_decay": config.weight_decay},
              {"params": biases, "lr_factor": 2.0, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


def training_step(network, optimizer, microbatches: list[data.Batch], lr: float,
                  config: TrainConfig) -> Tensor:
    """One step on this process's microbatches: its part of the losses, (3,), on the device.

    No host-device sync.
    """
    device, world = microbatches[0].images.device, rank_and_world()[1]
    dtype = dtype_of(config.precision, device)

    # Targets, and the denominators over the global batch.
    locations = make_locations(*microbatches[0].images.shape[2:], device=device,
                               offset=config.model.location_offset)
    targets = [assign_targets(locations, m.boxes.split(m.counts), m.labels.split(m.counts),
                              config.center_radius or None) for m in microbatches]
    norm = sum(normalizers(t) for t in targets)                                  # (3,)
    if world > 1:
        dist.all_reduce(norm)

    optimizer.zero_grad()
    total = 0
    for m, target in zip(microbatches, targets):
        last = m is microbatches[-1]
        with contextlib.nullcontext() if world == 1 or last else network.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = network(m.images, m.sizes)
            losses = fcos_loss(outputs, target, config.box_loss, norm,
                               locations.stride if config.model.box_unit == "stride" else None)
            loss = sum(losses.values())
            loss.backward(torch.full_like(loss, world))  # DDP averages; this makes it a sum
        total = total + torch.stack([*losses.values()]).detach()                 # (3,)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    optimizer.step()
    return total


# --- checkpoints --------------------------------------------------------------------------------

def save_checkpoint(run: Path, checkpoint: dict):
    """Write a checkpoint; delete all but the last two, and partial files of a killed run."""
    path = run / f"checkpoint-{checkpoint['step']:07d}.pt"
    atomic_write(path, lambda file: torch.save(checkpoint, file))
    files = checkpoints_of(run)
    newer = files.index(path)  # damaged, or this run would have gone on from there
    for old in [*files[:newer], *files[newer + 2:], *run.glob("checkpoint-*.pt.part")]:
        old.unlink()


def data_hash(dataset: data.CocoDataset) -> str:
    """A hash of what training reads: file names, image sizes, boxes, labels."""
    digest = hashlib.sha256("".join(dataset.annotations.file_names.tolist()).encode())
    for part in (dataset.annotations.sizes, dataset.first, dataset.boxes, dataset.labels):
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def restore(checkpoint: dict, run: Path, model: FCOS, optimizer, dataset: data.CocoDataset):
    """Load weights and optimizer state, if this is still the same data and the same model."""
    restart = f"start another run from its weights with --init-from {run}"
    a = dataset.annotations
    evaluate.check_categories(a, **checkpoint["categories"], owner=str(run))
    if checkpoint.get("data_hash") != data_hash(dataset):
        raise UserError(f"{a.path}: this data has changed since {run} started; restore the "
                        f"original, or {restart}")
    load_weights(model, checkpoint["model"], f"{run}: weights do not match this model; {restart}")
    try:  # an optimizer matches its state by position, so the names must be in the same order
        saved = checkpoint["optimizer"]
        groups = zip(saved["param_groups"], optimizer.param_groups)
        if any(theirs["param_names"] != ours["param_names"] for theirs, ours in groups):
            raise ValueError("other parameters")
        optimizer.load_state_dict(saved)
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if value.ndim:  # to the memory format of the weight, which depends on the device
                    state[key] = torch.empty_like(p).copy_(value.view_as(p))
    except Exception:  # whatever a state of another model, or none, makes torch raise
        raise UserError(
            f"{run}: its optimizer state does not match this model; {restart}") from None


def init_from(model: FCOS, path, names: list[str]):
    """Load another checkpoint's weights; class outputs are matched by the name of the class."""
    checkpoint, ours = load_checkpoint(path), model.state_dict()
    theirs, their_names = checkpoint["model"], checkpoint["categories"]["names"]
    outputs = "head.cls_logits.weight", "head.cls_logits.bias"
    fits = theirs[outputs[0]].shape[1:] == ours[outputs[0]].shape[1:]  # towers of the same width
    rows = {n: n if their_names[n:n + 1] == [name] else their_names.index(name)
            for n, name in enumerate(names) if fits and name in their_names}
    for key in outputs:  # a class takes the row of its name; of several, the one at its position
        saved, theirs[key] = theirs[key], ours[key].clone()
        for n, row in rows.items():
            theirs[key][n] = saved[row]
    taken = {key: value for key, value in theirs.items()
             if key in ours and value.shape == ours[key].shape}
    model.load_state_dict(taken, strict=False)
    fresh = sorted(ours.keys() - taken.keys())
    fresh += [name for n, name in enumerate(names) if n not in rows]
    print0(f"{path}: loaded {len(taken)} of {len(ours)} tensors, and the outputs of {len(rows)} of "
           f"{len(names)} classes by name; newly initialised: "
           f"{', '.join(fresh)[:200] or 'nothing'}")


# --- the run ------------------------------------------------------------------------------------

class Run(NamedTuple):
    """What a run sets up before its first step."""
    folder: Path
    config: TrainConfig
    device: torch.device
    dataset: data.CocoDataset
    validation: data.CocoDataset | None  # None: do not evaluate
    categories: dict                     # "ids" and "names", C each
    sampler: data.TrainSampler
    num_microbatches: int                # of each process in a step
    model: FCOS
    network: nn.Module                   # the model, compiled and distributed
    optimizer: torch.optim.Optimizer


def not_finite(run: Run, step: int, losses: dict) -> UserError:
    """The error that ends a run whose loss or weights are inf or NaN after a step."""
    indices = [request.index for request in run.sampler.global_batch(step)]
    ids = run.dataset.annotations.image_ids[indices].tolist()
    terms = "".join(f"{name} {value:g}, " for name, value in losses.items())
    return UserError(
        f"the loss or the weights are not finite at step {step} ({terms}lr "
        f"{lr_at(step, run.config):g}, images {ids}); look at their boxes, or start a run from "
        f"the last good weights with a lower --lr: --init-from {run.folder}")


class Progress:
    """Losses since the last line, the progress line, RUN/metrics.jsonl."""

    def __init__(self, run: Run, checkpoint: dict | None):
        self.run, self.path = run, run.folder / "metrics.jsonl"
        self.step = checkpoint["step"] if checkpoint else 0        # steps completed
        self.losses = checkpoint["losses"] if checkpoint else []   # (3,) each, since the last line
        self.unread = deque()  # (step, losses and stop flag, event): may still be on the device
        self.lag = 2 if run.device.type == "cuda" else 0  # reading losses late avoids a sync
        self.stop_at = math.inf
        self.savable = True  # False from an update of the weights until its step is counted, and
        #                      for good once a loss is not finite
        run.optimizer.register_step_pre_hook(lambda *_: setattr(self, "savable", False))
        self.start = self.saved_at = self.line_at = time.monotonic()
        self.line_step = self.step  # of the last line
        self.waited = 0.0           # seconds, for data, since the last line
        # Drop what a killed run wrote after its checkpoint.
        self.entries = [entry for entry in from_rank_0(read_metrics, run.folder)
                        if entry["step"] <= self.step]
        if rank_and_world()[0] == 0:
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            atomic_write(self.path, lambda file: file.write(text.encode()))

    def due(self, every: int) -> bool:
        """True every `every` steps and after the last step of the run."""
        return self.step == self.run.config.steps or self.step > 0 and self.step % every == 0

    def push(self, total: Tensor, stop: bool):
        """Take the losses (3,) of a completed step, and whether this process got a signal."""
        values, event = torch.cat([total, torch.full_like(total[:1], float(stop))]), None
        if rank_and_world()[1] > 1:
            dist.all_reduce(values)
        if values.is_cuda:
            values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.unread.append((self.step, values, event))
        self.step, self.savable = self.step + 1, True
        self.read(self.lag)

    def read(self, lag: int):
        """Read all losses but the last `lag`; they are the same in all processes."""
        while len(self.unread) > lag:
            step, values, event = self.unread.popleft()
            if event:
                event.synchronize()
            *losses, stop = values.tolist()
            if stop:
                self.stop_at = min(self.stop_at, step + 1 + self.lag)
            if not all(map(math.isfinite, losses)):
                self.savable = False
                raise not_finite(self.run, step, dict(zip(TERMS, losses)))
            self.losses.append(losses)

    def log(self):
        self.read(lag=0)
        now, run, config, step = time.monotonic(), self.run, self.run.config, self.step
        seconds, steps = now - self.line_at, step - self.line_step
        speed = steps * config.batch_size / seconds
        left = timedelta(seconds=round(seconds / steps * (config.steps - step)))
        if run.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(run.device)
        else:  # kilobytes on Linux, bytes on macOS
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory *= 1 if sys.platform == "darwin" else 1024
        lr = lr_at(step - 1, config)
        terms = {name: sum(x) / len(x)
                 for name, x in zip(TERMS, zip(*self.losses), strict=True)}
        loss = sum(terms.values())
        print0(f"step {step}/{config.steps} | loss {loss:.4f} | lr {lr:.1e} | {speed:.1f} images/s "
               f"| data wait {self.waited / seconds:.0%} | {memory / 2**30:.1f} GB | {left} left",
               transient=step < config.steps and sys.stdout.isatty())
        epoch = step * config.batch_size / len(run.sampler.images)
        self.write({"step": step, "epoch": round(epoch, 3),
                    "loss": loss, **terms, "lr": lr, "images_per_second": round(speed, 2),
                    "seconds": round(now - self.start, 1)})
        self.line_at, self.line_step, self.waited = now, step, 0.0
        self.losses.clear()

    def write(self, entry: dict):
        self.entries.append(entry)
        if rank_and_world()[0] == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:  # no reason to lose the run
                print0(f"warning: {self.path}: cannot be written ({error})")


def read_metrics(folder: Path) -> list[dict]:
    """RUN/metrics.jsonl without lines that are torn or not ours."""
    path, entries = folder / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, AttributeError):
            entry = json.loads(line)
            entries += [entry] if type(entry.get("step")) is int else []
    return entries


def prepare(config, folder, device, checkpoint, init_file, skip_eval) -> Run:
    """Build the data, the model and the optimizer."""
    dataset = data.open_split(config.data, "train", config.train_split)
    annotations, images = dataset.annotations, dataset.with_boxes()
    categories = {"ids": annotations.category_ids, "names": annotations.category_names}
    print0(dataset.summary())
    validation = None
    if not skip_eval:
        validation = data.open_split(config.data, "val", config.val_split)
        evaluate.check_categories(validation.annotations, **categories, owner=annotations.path)
        print0(validation.summary())
    if len(images) == 0:
        raise UserError(f"{annotations.path}: no image has a box that can be learned")
    limit = config.epochs * len(images) / config.batch_size or math.inf
    steps = math.ceil(min(config.steps, limit))
    config = replace(
        config, steps=steps, eval_every=config.eval_every or math.ceil(steps / 5),
        data=os.path.abspath(config.data),  # usable from another folder
        model=replace(config.model, num_classes=len(categories["ids"])))
    count = count_microbatches(config, rank_and_world()[1])
    sampler = data.TrainSampler(annotations.sizes, images, config)

    torch.manual_seed(config.seed)
    model = FCOS(config.model, config.backbone_weights if not checkpoint else "none")
    if init_file is not None and not checkpoint:
        init_from(model, init_file, categories["names"])
    # On a CPU, the backward pass of float32 convolutions is slower in channels_last.
    slow = device.type == "cpu" and dtype_of(config.precision, device) == torch.float32
    model.to(device, memory_format=torch.contiguous_format if slow else torch.channels_last)
    optimizer = build_optimizer(model, config)
    if checkpoint:
        restore(checkpoint, folder, model, optimizer, dataset)
    network = compile_and_distribute(model, config, sampler, device)
    run = Run(folder, config, device, dataset, validation, categories, sampler, count, model,
              network, optimizer)
    print_plan(run)
    return run


def compile_and_distribute(model: FCOS, config: TrainConfig, sampler, device) -> nn.Module:
    """The network that a training step calls: the model itself, compiled, in DDP, or both."""
    network = model
    auto = config.compile == "auto" and device.type == "cuda"
    if auto and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        print0("warning: torch.compile needs a C compiler; training is slower without, install gcc")
    elif auto or config.compile == "on":
        first = range(min(config.steps, 500))
        canvases = {sampler.global_batch(step)[0].canvas for step in first}
        print0(f"the network is compiled for each canvas, a minute or two each: {len(canvases)} in "
               f"the first {len(first)} steps")
        torch._dynamo.config.recompile_limit = 64
        network = torch.compile(network, dynamic=False, options=COMPILE_OPTIONS)
    if rank_and_world()[1] > 1:
        network = DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # frozen; torch 2.14 warns of it as an argument
    return network


def loop(run: Run, progress: Progress, stop_signals: list):
    """Steps until the end, or until a signal."""
    config, (rank, world) = run.config, rank_and_world()
    steps = range(progress.step, config.steps)
    requests = data.microbatches(run.sampler, steps, run.num_microbatches, rank, world)
    loader = data.batches(run.dataset, requests, config.num_workers, run.device.type == "cuda")
    stream = torch.cuda.Stream() if run.device.type == "cuda" else None  # of copies to the device
    evaluate_step(run, progress)  # if it was due and not done before an interruption
    for step in steps:
        waiting = time.monotonic()
        microbatches = [next(loader).to(run.device, stream) for _ in range(run.num_microbatches)]
        progress.waited += time.monotonic() - waiting
        torch.manual_seed(hash((config.seed, step, rank)) % 2**63)  # for a dropout, if you add one
        total = training_step(run.network, run.optimizer, microbatches, lr_at(step, config), config)
        progress.push(total, bool(stop_signals))

        stop = progress.step >= progress.stop_at
        minutes = (time.monotonic() - progress.saved_at) / 60
        if progress.due(config.log_every):
            progress.log()
        if (stop or progress.due(config.checkpoint_every) or progress.due(config.eval_every)
                or minutes > config.checkpoint_minutes):
            save(run, progress)
        if stop and progress.step < config.steps:
            print0(f"\nstopped by a signal after step {progress.step}; continue with: make resume "
                   f"RUN={run.folder}")
            if world > 1:
                dist.barrier()  # torchrun kills rank 0 as soon as another process has ended
            sys.exit(128 + (stop_signals or [signal.SIGTERM])[0])
        evaluate_step(run, progress)


def save(run: Run, progress: Progress):
    """Save a checkpoint of the steps completed, on rank 0."""
    progress.read(lag=0)
    progress.saved_at = time.monotonic()
    if rank_and_world()[0] > 0:
        return
    if not all(p.isfinite().all() for p in run.model.parameters()):
        if progress.step == 0:
            raise UserError("the initial weights are not finite; take others for --init-from or "
                            "--backbone-weights")
        raise not_finite(run, progress.step - 1, {})
    save_checkpoint(run.folder, {
        "format": CHECKPOINT_FORMAT, "step": progress.step, "losses": progress.losses,
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "config": asdict(run.config), "categories": run.categories,
        "data_hash": data_hash(run.dataset)})


def evaluate_step(run: Run, progress: Progress):
    """Evaluate the weights of this step, once; keep the best ones in RUN/best.pt."""
    step, config = progress.step, run.config
    done = any("AP" in e and e["step"] == step for e in progress.entries)
    if not run.validation or done or not progress.due(config.eval_every):
        return
    started = time.monotonic()
    detector = Detector(run.model, run.categories, run.device, config.precision)
    metrics = evaluate.evaluate(
        detector, run.validation,
        run.folder if step == config.steps else None,  # full report only at the end
        batch_size=min(8, config.batch_size // (rank_and_world()[1] * run.num_microbatches)),
        num_workers=config.num_workers)
    if metrics:  # on rank 0
        figures = metrics["figures"]
        print0(f"step {step}/{config.steps} | " + " | ".join(
            f"{name} {figures[name]:.3f}" for name in ("AP", "AP50", "AP75")))
        if figures["AP"] >= max((e["AP"] for e in progress.entries if "AP" in e), default=0):
            weights = (run.folder / f"checkpoint-{step:07d}.pt").read_bytes()
            atomic_write(run.folder / "best.pt", lambda file: file.write(weights))
        progress.write({"step": step, **figures})
    progress.line_at += time.monotonic() - started  # not spent in training


def catch_signals() -> list:
    """Signals to stop are appended to this list; one more, 2 s later, ends the process at once.

    Within 2 s it is the same one: schedulers signal every process, and torchrun forwards it.
    """
    caught, times = [], []

    def handler(number, frame):
        times.append(time.monotonic())
        if times[-1] > times[0] + 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)
    return caught


def count_microbatches(config: TrainConfig, world: int) -> int:
    """Microbatches of each process in a step: as few as --microbatch allows."""
    if config.batch_size % world:
        raise UserError(f"a batch of {config.batch_size} images cannot be shared evenly by {world} "
                        f"processes; start {math.gcd(config.batch_size, world)} (GPUS=... on each "
                        "machine), or change --batch-size")
    images = config.batch_size // world
    largest = config.microbatch or images
    return next(n for n in range(1, images + 1) if images % n == 0 and images // n <= largest)


def print_plan(run: Run):
    """Print what will be trained; refuse data whose boxes are assigned to no location."""
    config, world = run.config, rank_and_world()[1]
    device = (torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else
              f"CPU ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})")
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    images = config.batch_size // (world * run.num_microbatches)
    epochs = config.steps * config.batch_size / len(run.sampler.images)
    print0(f"{device}, {dtype_of(config.precision, run.device)}; {config.model.backbone}, "
           f"{parameters:.1f} M parameters; run folder {run.folder}\n"
           f"{config.steps} steps of {config.batch_size} images (processes {world}, microbatches "
           f"{run.num_microbatches} of {images}): {epochs:.1f} epochs"
           f"{'; --epochs N makes it fewer' if epochs > 100 else ''}; warm-up "
           f"{min(config.warmup_steps, config.steps // 10)} steps, evaluation every "
           f"{config.eval_every}")
    without, boxes = count_without_location(run.dataset, config)
    if without:
        print0(f"{without} of {boxes} boxes, in up to 200 images sampled, are not assigned to any "
               "location: too small for the image size, or covered by smaller boxes (make check "
               "says more)")
    if without == boxes:
        raise UserError("no box is assigned to any location, so there is nothing to train on; "
                        "raise --train-short-sides, or --center-radius if it is not 0")


def count_without_location(dataset: data.CocoDataset, config: TrainConfig):
    """How many boxes are assigned to no location, and how many there are, in up to 200 images."""
    without = total = 0
    images = dataset.with_boxes()
    for i in images[np.linspace(0, len(images) - 1, min(200, len(images)), dtype=int)]:
        h0, w0 = dataset.annotations.sizes[i].tolist()
        short_side = sum(config.train_short_sides) // 2
        h, w = data.resized(h0, w0, short_side, config.model.long_side, config.model.enlarge)
        locations = make_locations(*data.canvas_for([(h, w)]), offset=config.model.location_offset)
        boxes = torch.from_numpy(dataset.targets(i)[0]) * torch.tensor([w / w0, h / h0]).repeat(2)
        targets = assign_targets(locations, [boxes], [torch.arange(len(boxes))],
                                 config.center_radius or None)
        total += len(boxes)
        without += len(boxes) - len(targets.labels[targets.labels >= 0].unique())
    return without, total


# --- command line -------------------------------------------------------------------------------

def parse_arguments(argv):
    """A preset, and an option for every field of both configurations."""
    name = argv[0] if argv and argv[0] in PRESETS else "demo"
    config = PRESETS[name]
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__.partition("\n")[0],
        epilog=f"Defaults shown are those of {name}; name a preset before --help for its own.")
    parser.add_argument("preset", nargs="?", choices=PRESETS, metavar="PRESET",
                        help=f"one of {', '.join(PRESETS)} (default: demo)")
    parser.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/PRESET)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true",
                       help="go on from the newest checkpoint in DIR, with its configuration")
    begin.add_argument("--init-from", metavar="FILE",
                       help="start with the weights of a run or checkpoint; classes may differ")
    parser.add_argument("--skip-eval", action="store_true", help="train without evaluating")
    add_options(parser.add_argument_group("training"), config)
    add_options(parser.add_argument_group("model"), config.model)
    args = parser.parse_args(argv)
    if args.preset not in (None, name):
        parser.error(f"name the preset first: {args.preset}")
    options = {key: tuple(x) if type(x) is list else x for key, x in vars(args).items()}
    training = {f.name: options[f.name] for f in fields(TrainConfig) if f.name in options}
    model = {f.name: options[f.name] for f in fields(ModelConfig) if f.name in options}
    args.changed = training | model
    args.config = replace(config, **training, model=replace(config.model, **model))
    args.run_dir = Path(args.run_dir or f"runs/{name}")
    return args


def add_options(group, config):
    """An option for every field of a configuration; its help is the comment behind the field."""
    source = inspect.getsource(type(config))
    for f in fields(config):
        comment = re.search(rf"^    {f.name}: .*? # (.+(?:\n    #   .+)*)$", source, re.M)
        if comment and f.name != "num_classes":  # which is the data's
            kind, default = type(f.default), getattr(config, f.name)
            options = {"type": kind, "metavar": "TEXT" if kind is str else "N"}
            if get_origin(f.type) is Literal:
                options = {"choices": get_args(f.type)}
            elif kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind is tuple:
                options |= {"type": type(f.default[0]), "nargs": len(f.default)}
            text = re.sub(r"\n    # +", " ", comment[1]).replace("%", "%%")
            text += f" (default: {default})" if default != "" else ""
            group.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                               help=text, **options)


def load_run(args) -> tuple[TrainConfig, dict | None]:
    """The configuration, and the checkpoint to go on from, if any."""
    folder = args.run_dir
    owner = folder / ".lock"
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # none: torchrun without --rdzv-id
    restarted = (int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and launch != "none"
                 and owner.exists() and owner.read_text() == launch)
    if args.resume or restarted and checkpoints_of(folder):
        fixed = sorted(f"--{name.replace('_', '-')}" for name in args.changed.keys() - MAY_CHANGE)
        fixed += [args.preset] if args.preset else []
        if args.resume and fixed:
            raise UserError(f"--resume keeps the configuration of {folder}; leave out "
                            f"{', '.join(fixed)}, or start another run with --init-from {folder}")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such run; name one with RUN=... (--run-dir)")
        checkpoint = load_checkpoint(folder)
        values = checkpoint["config"] | {"model": ModelConfig(**checkpoint["config"]["model"])}
        config = config_from_dict(TrainConfig, values, folder)
        may_change = {name: x for name, x in args.changed.items() if name in MAY_CHANGE}
        print0(f"{folder}: " + (
            "finished, nothing left to train; --init-from starts a longer run"
            if checkpoint["step"] == config.steps else f"resuming from step {checkpoint['step']}"))
        return replace(config, **may_change), checkpoint
    refuse_to_overwrite(folder)
    config = args.config
    if not config.data:
        raise UserError("no data; name a COCO-format folder with DATA=... (--data)")
    if args.init_from is not None:  # its weights mean nothing in another architecture
        theirs = load_checkpoint(args.init_from)["config"]["model"]
        adopted = {name: theirs[name] for name in ARCHITECTURE if name not in args.changed}
        config = replace(config, backbone_weights="none", model=replace(config.model, **adopted))
    return config, None


def refuse_to_overwrite(folder: Path):
    if checkpoints_of(folder) or (folder / "best.pt").exists():
        raise UserError(f"{folder} already holds a run; resume it (make resume RUN={folder}), "
                        "choose another folder (RUN=...), or delete it")


def lock(folder: Path, fresh: bool):
    """Claim the folder for as long as this process lives; a fresh run overwrites no other."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)  # until the process ends
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is training here; choose another folder with "
                        "RUN=... (--run-dir)") from None
    except OSError as error:  # a network drive, for example
        print0(f"warning: {folder}: cannot be locked ({error}); start no other training here")
    if fresh:
        refuse_to_overwrite(folder)
    os.ftruncate(handle, 0)
    os.write(handle, os.environ.get("TORCHELASTIC_RUN_ID", "").encode())  # for its restarts


def from_rank_0(function, *args):
    """Call a function in rank 0 alone; its result, or its error, is that of every process.

    A network drive may show other machines an older state of the run folder.
    """
    result = [None]
    if rank_and_world()[0] == 0:
        try:
            result = [function(*args)]
        except Exception as error:  # or the others would wait for this process
            result = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def main():
    args = parse_arguments(sys.argv[1:])
    device = evaluate.init_distributed()
    torch.backends.cudnn.benchmark = True  # training has few canvases: autotuning pays off
    config, checkpoint = from_rank_0(load_run, args)
    run = prepare(config, args.run_dir, device, checkpoint, args.init_from, args.skip_eval)
    from_rank_0(lock, run.folder, not checkpoint)
    if not (run.folder / ".lock").exists():  # after a restart, another machine may have rank 0
        raise UserError(f"{run.folder}: not the folder of rank 0; machines must share it")
    progress, stop_signals = Progress(run, checkpoint), catch_signals()
    if not checkpoint:
        save(run, progress)  # from here on the folder is this run's
    try:
        loop(run, progress, stop_signals)
    except Exception:  # in loading or evaluation, for example: keep the completed steps
        if progress.savable:
            save(run, progress)
        raise


if __name__ == "__main__":
    evaluate.run_program(main)
