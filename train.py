"""train.py: train the detector, on one CPU or on many GPUs, and lose nothing.  (FCOS, arXiv:1904.01355, Sec. 4)

    python train.py                                                         demo on generated data, run in runs/demo
    python train.py demo --data DIR                                         demo's detector on a COCO-format data set
    torchrun --standalone --nproc-per-node 8 train.py fcos_R_50_FPN_1x_center_giou --data /data/coco
    python train.py --resume --run-dir runs/demo                            go on after an interruption
    python train.py --plot runs/demo runs/other                             loss and AP curves over one another
    python train.py --help                                                  every option, with unit and default

One global batch (16 images; the demo: 4) makes a step, however it is split over processes and accumulation steps:

 1. the sampler decides what step s sees, from the seed and s alone (data.py);
 2. targets are assigned, and the denominators of the losses added up over all parts of the batch and all processes;
 3. each part goes forward and backward with its share of the loss; gradients add up; SGD steps.

So 1, 2 or 8 processes compute the same losses and the same weights, up to the order of floating-point additions.
The state after step s is the checkpoint after step s: a run that is killed and resumed ends with the same weights.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from assign import assign_targets, make_locations
from data import DataError
from loss import BOX_LOSSES, Totals, fcos_loss, totals
from model import (CHECKPOINT_FORMAT, FCOS, IMPROVED, ConfigError, Detector, ModelConfig, add_options, check, checkpoints_of,
                   dtype_of, given, load_checkpoint, option, rebuilt, write_whole)

# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """How a detector is trained. Defaults: FCOS 1x as first published."""
    model: ModelConfig = ModelConfig()
    data: str = option("", "COCO-format folder, or shapes: generated in RUN/data")
    train_split: str = option("", "default: train2017, else the only train* split")
    val_split: str = option("", "default: val2017, else the only val* split")
    backbone_weights: str = option("imagenet", "imagenet (downloaded by torchvision), none, or a state dict file")
    # what is learned
    center_radius: float = option(0.0, "center sampling radius in strides; 0: the whole box is positive")
    box_loss: str = option("iou", "loss of a box", BOX_LOSSES)
    # how long, how fast
    batch_size: int = option(16, "images of one step, over all processes", ">= 1")
    steps: int = option(90_000, "optimizer steps, at most", ">= 1")
    epochs: float = option(0.0, "passes over the data, at most; 0: any number")
    optimizer: str = option("sgd", "sgd, with momentum 0.9, or adamw", ("sgd", "adamw"))
    lr: float = option(0.01, "learning rate of weights; biases learn at twice this rate", "> 0")
    weight_decay: float = option(1e-4, "of weights; biases have none")
    warmup_steps: int = option(500, "steps at a third of the learning rate")
    schedule: str = option("step", "step: x 0.1 at 2/3 and at 8/9 of the steps; cosine: to 0", ("step", "cosine"))
    grad_clip: float = option(0.0, "largest norm of the gradient; 0: any")
    # what is seen
    train_short_sides: tuple[int, int] = option((800, 800), "pixels; range of each image's short side", ">= 1, lower first")
    flip: float = option(0.5, "probability of a horizontal flip", "in [0, 1]")
    seed: int = option(0, "of the initial weights and of all that the sampler draws")
    canvas_sides: int = option(4, "lengths that a side of a batch is padded to; few, as each shape is compiled; 0: any multiple of 32")
    precision: str = option("auto", "of the network; auto: bf16 where the hardware has it", ("auto", "bf16", "fp32"))
    compile: str = option("auto", "torch.compile the network; auto: on a GPU", ("auto", "on", "off"))
    # in what portions, and what is told and kept: see RESUMABLE
    images_per_gpu: int = option(0, "most images at once on a device, the rest is accumulated; 0: any")
    accumulate: int = option(0, "portions of a process's share of the batch; 0: as few as --images-per-gpu allows")
    num_workers: int = option(2, "data loading processes per training process; 0: none")
    log_every: int = option(20, "steps between two progress lines and entries of metrics.jsonl", ">= 1")
    eval_every: int = option(0, "steps between two evaluations on the way; 0: none before the end")
    checkpoint_every: int = option(1000, "steps between two checkpoints", ">= 1")
    checkpoint_minutes: float = option(10.0, "minutes after which a checkpoint is due in any case")

    def __post_init__(self):
        check(self)


ARCHITECTURE = ("backbone", "backbone_norm", "stride_in_1x1", "channels", "tower_depth", "centerness_on_box_tower", "box_unit",
                "sqrt_score", "pixel_mean", "pixel_std")  # what --init-from takes over from the other checkpoint
TERMS = ("cls", "box", "centerness")  # of the loss
RESUMABLE = {"data", "images_per_gpu", "accumulate", "num_workers", "log_every", "eval_every",
             "checkpoint_every", "checkpoint_minutes"}  # what may be changed on the way

fcos_R_50_FPN_1x = TrainConfig()
center = dict(center_radius=1.5)
fcos_R_50_FPN_1x_center = replace(fcos_R_50_FPN_1x, **center)
fcos_R_101_FPN_2x = replace(fcos_R_50_FPN_1x, model=ModelConfig(backbone="resnet101"), steps=180_000, train_short_sides=(640, 800))
fcos_imprv_R_50_FPN_1x = replace(fcos_R_50_FPN_1x, **center, box_loss="giou", model=ModelConfig(**IMPROVED))
# Small enough for two CPU cores. It learns from random weights, hence GroupNorm, nothing frozen, and AdamW.
demo = TrainConfig(
    model=ModelConfig(backbone="resnet18", backbone_norm="group", frozen_stages=0, channels=64, tower_depth=2,
                      short_side=280, long_side=440, enlarge=False, **IMPROVED),
    data="shapes", backbone_weights="none", **center, box_loss="giou", batch_size=4, steps=1600, epochs=16, optimizer="adamw",
    lr=7e-4, weight_decay=0.05, warmup_steps=50, schedule="cosine", grad_clip=10.0, train_short_sides=(224, 288), canvas_sides=0,
    num_workers=0, eval_every=200)
PRESETS = {
    "demo": demo,
    "fcos_R_50_FPN_1x": fcos_R_50_FPN_1x,
    "fcos_R_50_FPN_1x_center": fcos_R_50_FPN_1x_center,
    "fcos_R_50_FPN_1x_center_liou": replace(fcos_R_50_FPN_1x_center, box_loss="linear_iou"),
    "fcos_R_50_FPN_1x_center_giou": replace(fcos_R_50_FPN_1x_center, box_loss="giou"),
    "fcos_R_101_FPN_2x": fcos_R_101_FPN_2x,
    "fcos_R_101_FPN_2x_center_giou": replace(fcos_R_101_FPN_2x, **center, box_loss="giou"),
    "fcos_imprv_R_50_FPN_1x": fcos_imprv_R_50_FPN_1x,
    "fcos_imprv_R_101_FPN_2x": replace(fcos_imprv_R_50_FPN_1x, model=ModelConfig(backbone="resnet101", **IMPROVED),
                                       steps=180_000, train_short_sides=(640, 800)),
}


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step; a pure function."""
    if step < config.warmup_steps:
        return config.lr / 3
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * 0.1 ** sum(step >= round(config.steps * part) for part in (2 / 3, 8 / 9))


# --- checkpoints ------------------------------------------------------------------------------------------------------

def save_checkpoint(run: Path, checkpoint: dict):
    """Write a checkpoint, and delete all but the last two, and what a kill left unfinished."""
    path = run / f"checkpoint-{checkpoint['step']:07d}.pt"
    go_on = f"go on from the one before it with --resume --run-dir {run}" if checkpoints_of(run) else "start again"
    write_whole(path, lambda file: torch.save(checkpoint, file), f"free some space and {go_on}")
    for old in [*checkpoints_of(run)[2:], *run.glob("checkpoint-*.part")]:
        old.unlink()


def config_from(checkpoint: dict, source) -> TrainConfig:
    values = checkpoint["config"] | {"model": ModelConfig(**checkpoint["config"]["model"])}
    return rebuilt(TrainConfig, values, source,
                   "go on with the version of the code that wrote it, or start another run from its weights with --init-from")


def data_hash(dataset: data.CocoDataset) -> str:
    """What a data set has to teach, in 16 digits."""
    digest = hashlib.sha256("".join(dataset.annotations.file_names.tolist()).encode())
    for part in (dataset.annotations.sizes, *dataset.boxes):
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def init_from(model, path, categories: dict):
    """Take the weights of another checkpoint; those of other classes' outputs, or of another shape, start fresh."""
    checkpoint = load_checkpoint(path)
    theirs, ours = checkpoint["model"], model.state_dict()
    taken = {key: value for key, value in theirs.items() if key in ours and value.shape == ours[key].shape}
    if checkpoint["categories"]["names"] != categories["names"]:
        taken = {key: value for key, value in taken.items() if not key.startswith("head.cls_logits")}
    fresh = sorted(ours.keys() - taken.keys())
    model.load_state_dict(taken, strict=False)
    say(f"{path}: took {len(taken)} of {len(ours)} tensors; fresh: {', '.join(fresh) or 'none'}")


def go_on(run: Path, model, optimizer, digest: str) -> int:
    """Take up the newest checkpoint of a run, of data with this hash; returns its step."""
    checkpoint = load_checkpoint(run)
    if checkpoint.get("data_hash") != digest:
        raise ConfigError(f"the data set is not what {run} was trained on so far; restore it, or start another run from these weights "
                          "with --init-from")
    model.load_state_dict(checkpoint["model"])
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random_state"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # whatever another optimizer's state raises
        raise ConfigError(f"{run}: its checkpoint holds weights but not what is needed to go on ({error!r:.80}); start another run "
                          "from them with --init-from") from None
    return checkpoint["step"]


# --- progress ---------------------------------------------------------------------------------------------------------

def say(text):
    """Print, in one process of many."""
    if evaluate.rank_and_world()[0] == 0:
        print(text, flush=True)


class Progress:
    """The line that tells how training goes, and RUN/metrics.jsonl."""

    def __init__(self, run: Path, config: TrainConfig, first_step: int):
        self.path, self.config = run / "metrics.jsonl", config
        kept = [entry for entry in read_metrics(run) if entry["step"] <= first_step]  # not what a killed run did after its checkpoint
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_whole(self.path, lambda file: file.write(text.encode()), "free some space and go on with --resume")
        self.start = self.last = time.time()
        self.first_step = self.last_step = first_step
        self.data_wait = 0.0

    def report(self, step: int, losses: dict[str, float], lr: float, device):
        now = time.time()
        steps, seconds = step - self.last_step, now - self.last
        images_per_second = steps * self.config.batch_size / seconds
        left = (now - self.start) / (step - self.first_step) * (self.config.steps - step)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes, on Linux
        terms = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        text = (f"step {step}/{self.config.steps} | loss {sum(losses.values()):.4f} {terms} | lr {lr:.5f} | "
                f"{images_per_second:.1f} images/s, waiting for data {self.data_wait / seconds:.0%} | {peak / 2**30:.1f} GB | "
                f"{left // 60:.0f} min {left % 60:02.0f} s left")
        evaluate.show_progress(text, last=step == self.config.steps or not sys.stdout.isatty())
        self.write({"step": step, **losses, "lr": lr, "images_per_second": round(images_per_second, 2)})
        self.last, self.last_step, self.data_wait = now, step, 0.0

    def write(self, entry: dict):
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def read_metrics(run: Path) -> list[dict]:
    """What RUN/metrics.jsonl holds so far, without a line that a kill left unfinished."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


# --- the run ----------------------------------------------------------------------------------------------------------

REMEDY = "start another run with a lower --lr, from the last good weights with --init-from {run}"  # of numbers that are not finite


def build_optimizer(model: FCOS, config: TrainConfig) -> torch.optim.Optimizer:
    """Biases learn at twice the rate and do not decay."""
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for name, p in learned if not name.endswith("bias")]
    biases = [p for name, p in learned if name.endswith("bias")]
    groups = [{"params": weights, "lr_factor": 1.0, "weight_decay": config.weight_decay},
              {"params": biases, "lr_factor": 2.0, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


def add_up(state, bucket):
    """What DDP does with gradients: each process has its share of the global loss, so they are added, not averaged."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def training_step(network, optimizer, parts: list[data.Batch], lr: float, config: TrainConfig) -> Tensor:
    """One step on this process's portions of the global batch: its share of the losses, (3,), on the device.

    Nothing here waits for the device.
    """
    device, (_, world) = parts[0].images.device, evaluate.rank_and_world()
    dtype = dtype_of(config.precision, device)

    # what every location should predict, and the denominators over the global batch
    locations = make_locations(*parts[0].images.shape[2:], offset=config.model.location_offset, device=device)
    targets = [assign_targets(locations, part.boxes, part.labels, config.center_radius or None) for part in parts]
    over = torch.stack([torch.stack(totals(t)) for t in targets]).sum(0)                        # (3,)
    if world > 1:
        dist.all_reduce(over)

    optimizer.zero_grad()
    shares = torch.zeros(len(TERMS), device=device)
    for part, target in zip(parts, targets):
        with nullcontext() if world == 1 or part is parts[-1] else network.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = network(part.images, part.sizes)
            losses = fcos_loss(outputs, target, config.box_loss, Totals(*over),
                               stride=locations.stride if config.model.box_unit == "stride" else None)
            sum(losses.values()).backward()
        shares += torch.stack([losses[name].detach() for name in TERMS])

    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    optimizer.step()
    return shares


def train(config: TrainConfig, run: Path, device: torch.device, resume=False, init_file=None, skip_eval=False):
    """Train from step 0, or from the newest checkpoint of the run, to the end, and evaluate."""
    rank, world = evaluate.rank_and_world()

    # data
    dataset = data.open_split(config.data, run, "train", config.train_split)
    images, annotations, digest = dataset.with_boxes(), dataset.annotations, data_hash(dataset)
    categories = {"ids": annotations.category_ids, "names": annotations.category_names}
    if len(images) == 0:
        raise DataError(f"{annotations.path}: no image has a box that can be learned")
    if not skip_eval:
        validation = data.open_split(config.data, run, "val", config.val_split)
        evaluate.check_categories(validation.annotations, **categories)  # now rather than after training
    say(data.describe_dropped(dataset))
    config = replace(config, model=replace(config.model, num_classes=len(categories["ids"])))
    if config.epochs > 0:
        config = replace(config, steps=max(1, min(config.steps, round(config.epochs * len(images) / config.batch_size))))
    share = config.batch_size // world
    most = config.images_per_gpu or share
    accumulate = config.accumulate or next((a for a in range(1, share + 1) if share % a == 0 and share // a <= most), 1)
    if config.batch_size % (world * accumulate):
        raise ConfigError(f"a batch of {config.batch_size} images cannot be shared evenly by {world} processes x {accumulate} "
                          "accumulation steps; change --batch-size, --accumulate or --images-per-gpu")
    say(f"{config.batch_size} images a step: {world} process{'es' * (world > 1)} x {accumulate} portion{'s' * (accumulate > 1)} x "
        f"{share // accumulate} images, in {dtype_of(config.precision, device)} on {device.type}".replace("torch.", ""))
    sampler = data.TrainSampler(annotations.sizes, images, config.batch_size, config.seed, config.train_short_sides,
                                config.model.long_side, config.model.enlarge, config.flip, config.canvas_sides)

    # model and optimizer
    torch.manual_seed(config.seed)
    model = FCOS(config.model, config.backbone_weights if not resume else "none")
    if init_file and not resume:
        init_from(model, init_file, categories)
    model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    first_step = 0
    if resume:
        first_step = go_on(run, model, optimizer, digest)
        say(f"{run}: finished at step {first_step}, nothing left to train" if first_step == config.steps else
            f"{run}: going on from step {first_step}")
    network = model
    if config.compile == "on" or config.compile == "auto" and device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64
        network = torch.compile(network, dynamic=False)  # once for every shape of canvas
    if world > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)
        network.register_comm_hook(None, add_up)

    def checkpoint_of(step):
        return {"format": CHECKPOINT_FORMAT, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "random_state": torch.get_rng_state(), "config": dataclasses.asdict(config), "categories": categories,
                "data_hash": digest}

    if rank == 0 and not resume:
        save_checkpoint(run, checkpoint_of(0))  # from here on, the folder is this run's and --resume goes on with it
    progress = Progress(run, config, first_step) if rank == 0 else None

    def evaluation_due(step):
        return not skip_eval and config.eval_every and step % config.eval_every == 0 and step < config.steps

    def evaluate_step(step):
        started, out = time.time(), run if step == config.steps else None  # the report is of the end
        detector = Detector(model, device, config.precision)
        metrics = evaluate.evaluate(detector, validation, categories, out, num_workers=config.num_workers)
        if rank == 0:
            figures = metrics["figures"]
            if not any("AP" in entry and entry["step"] == step for entry in read_metrics(run)):  # else a finished run, resumed
                progress.write({"step": step, **figures})
            if not out:
                say(f"step {step}/{config.steps} | " + " ".join(f"{name} {figures[name]:.3f}" for name in ("AP", "AP50", "AP75")))
            progress.last += time.time() - started  # its images/s are those of training

    # the loop
    stop_signal = []
    default_handlers = {number: signal.signal(number, lambda number, frame: stop_signal.append(number))
                        for number in (signal.SIGTERM, signal.SIGINT)}
    batches = data.load(dataset, data.shares(sampler, range(first_step, config.steps), accumulate, rank, world),
                        config.num_workers, pin_memory=device.type == "cuda")
    unread = []               # losses on the device, not looked at yet: reading them waits for it
    recent = []               # losses since the last report
    saved_at = time.time()
    for step in range(first_step, config.steps):
        waiting = time.time()
        parts = [next(batches).to(device) for _ in range(accumulate)]
        if rank == 0:
            progress.data_wait += time.time() - waiting

        try:
            unread.append(training_step(network, optimizer, parts, lr := lr_at(step, config), config))
        except torch.OutOfMemoryError:
            raise too_large(step, parts) from None

        # now and then: look at the losses, tell, save, stop, evaluate
        done = step + 1
        last = done == config.steps
        tell = last or done % config.log_every == 0
        save = last or done % config.checkpoint_every == 0 or evaluation_due(done)
        if device.type == "cuda" and not tell and not save:
            continue
        read = torch.stack([*unread, torch.full_like(unread[0], bool(stop_signal))])            # (steps + 1, 3)
        if world > 1:
            dist.all_reduce(read)
        *read, (stop, *_) = read.tolist()
        for earlier, values in enumerate(read, start=done - len(unread)):
            if not all(map(math.isfinite, values)):
                image_ids = annotations.image_ids[[request.index for request in sampler.global_batch(earlier)]].tolist()
                stop_at_non_finite(run, rank, earlier, dict(zip(TERMS, values)), lr_at(earlier, config), image_ids)
            recent.append(values)
        unread.clear()
        if rank == 0:
            if tell:
                progress.report(done, {name: sum(v) / len(v) for name, v in zip(TERMS, zip(*recent))}, lr, device)
                recent.clear()
            if save or stop or time.time() - saved_at > 60 * config.checkpoint_minutes:
                if not all(p.isfinite().all() for p in model.parameters()):  # the loss was, but not its last update
                    raise DataError(f"the weights are not finite after step {done} (lr {lr:g}); {REMEDY.format(run=run)}")
                save_checkpoint(run, checkpoint_of(done))
                saved_at = time.time()
        if stop and not last:
            say(f"\nstopped by a signal after step {done}; go on with: make resume RUN={run}")
            sys.exit(128 + (stop_signal or [signal.SIGTERM])[0])
        if evaluation_due(done):
            evaluate_step(done)
    for number, default in default_handlers.items():
        signal.signal(number, default)
    if not skip_eval:
        evaluate_step(config.steps)


def too_large(step, parts: list[data.Batch]) -> DataError:
    n, _, height, width = parts[0].images.shape
    most = max(len(boxes) for part in parts for boxes in part.boxes)
    less = f"set --images-per-gpu {n // 2}, or" if n > 1 else "lower --channels, or"
    return DataError(f"step {step} does not fit into the memory of {parts[0].images.device}: {n} image{'s' * (n > 1)} on "
                     f"{width} x {height} pixels, with up to {most} boxes; {less} lower --train-short-sides")


def stop_at_non_finite(run, rank, step, losses, lr, image_ids):
    """End all processes at the first loss that is not finite; the checkpoint before it stays."""
    if rank == 0:
        (run / "non_finite.json").write_text(json.dumps({"step": step, "lr": lr, "losses": {k: str(v) for k, v in losses.items()},
                                                         "image_ids": image_ids}))
    raise DataError(f"the loss is not finite at step {step} (lr {lr:g}, {', '.join(f'{k} {v}' for k, v in losses.items())}; images "
                    f"{image_ids}, also in {run / 'non_finite.json'}); look at these images' boxes, or {REMEDY.format(run=run)}")


def plot(runs: list[str]):
    """Draw the loss and the AP of one or more runs over one another, to runs/curves.png."""
    panels = {"loss": {}, "AP": {}}  # title -> run -> steps and values
    for run in runs:
        if not (Path(run) / "metrics.jsonl").exists():
            raise DataError(f"{run}/metrics.jsonl: no such file; name folders of runs, such as runs/demo")
        entries = read_metrics(Path(run))
        points = {"loss": [(entry["step"], sum(entry[name] for name in TERMS)) for entry in entries if "cls" in entry],
                  "AP": [(entry["step"], entry["AP"]) for entry in entries if "AP" in entry]}
        for title, curve in points.items():
            if curve:
                panels[title][str(run)] = list(zip(*curve))
    panels = [(title, "step", curves) for title, curves in panels.items() if curves]
    if not panels:
        raise DataError(f"{', '.join(map(str, runs))}: nothing was reported yet; --log-every says when it is")
    Path("runs").mkdir(exist_ok=True)
    evaluate.draw_curves("runs/curves.png", panels)
    print("runs/curves.png")


# --- command line -----------------------------------------------------------------------------------------------------

def parse_arguments(argv):
    """The preset named first (or demo), with every field of its two configurations as an option."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "demo"
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PRESETS)}"
        raise ConfigError(f"preset {name!r} is unknown; {remedy}")
    config = PRESETS[name]
    parser = argparse.ArgumentParser(prog=f"train.py {name}", description=f"Presets: {', '.join(PRESETS)}.")
    parser.add_argument("--run-dir", dest="run", help=f"folder of the run (default: runs/{name})", default=f"runs/{name}")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN, with its configuration")
    begin.add_argument("--init-from", metavar="FILE", help="start from the weights of this checkpoint; classes may differ")
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="train nothing; draw the loss and AP curves of these runs")
    parser.add_argument("--skip-eval", action="store_true", help="do not evaluate, neither on the way nor after training")
    add_options(parser.add_argument_group("training"), config)
    add_options(parser.add_argument_group("model"), config.model, without="num_classes")  # the data's
    args = parser.parse_args(argv)
    of_training, of_model = given(args, config), given(args, config.model)
    if of_training.get("data", "shapes") != "shapes":
        of_training["data"] = os.path.abspath(of_training["data"])  # a checkpoint may be used from another folder
    args.changed = of_training | of_model
    args.config = replace(config, **of_training, model=replace(config.model, **of_model))
    return args


def set_up(args) -> tuple[TrainConfig, bool]:
    """What is to be trained, and whether it was begun before. Sees to it that no run is overwritten."""
    checkpoints = checkpoints_of(args.run)
    restarted = checkpoints and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun
    if args.resume or restarted:
        fixed = sorted(f"--{name.replace('_', '-')}" for name in args.changed.keys() - RESUMABLE)
        if args.resume and fixed:
            raise ConfigError(f"--resume goes on with the configuration of {args.run}; leave out {', '.join(fixed)}")
        config = config_from(load_checkpoint(args.run), args.run)
        return replace(config, **{k: v for k, v in args.changed.items() if k in RESUMABLE}), True
    if checkpoints:
        raise ConfigError(f"{args.run} holds a run already; go on with it (make resume RUN={args.run}), choose another folder "
                          "(RUN=...), or delete it")
    config = args.config
    if not config.data:
        raise ConfigError("no data set; name a COCO-format folder with DATA=... (--data)")
    if args.init_from:  # its weights mean nothing in another architecture
        theirs = load_checkpoint(args.init_from)["config"]["model"]
        adopted = {name: theirs[name] for name in ARCHITECTURE if name not in args.changed}
        config = replace(config, backbone_weights="none", model=replace(config.model, **adopted))
    return config, False


def main():
    args = parse_arguments(sys.argv[1:])
    if args.plot:
        return plot(args.plot)
    device = evaluate.join_process_group()
    config, resume = set_up(args)
    run = Path(args.run)
    if evaluate.rank_and_world()[0] == 0:
        data.make_folder(run, "RUN=... (--run-dir)")
        if config.data == "shapes":
            data.make_shapes(run / "data")
    if dist.is_initialized():
        dist.barrier()
    train(config, run, device, resume, args.init_from, args.skip_eval)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (DataError, ConfigError, OSError) as error:
        sys.exit(data.sentence(error))
