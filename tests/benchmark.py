"""benchmark.py: how fast is this code, beside what a user would otherwise run?

    python tests/benchmark.py                                all rows (make bench); without a GPU those of the CPU
    python tests/benchmark.py --only inference assignment    some of them, as listed in MEASUREMENTS
    python tests/benchmark.py --json OUT.json                where every repetition goes (default: runs/benchmark.json)

How it measures. Machines are noisy and drift, so no figure means anything alone: ours and its peers do the same work in
the same process and take turns (ours, peer, ours, peer, ...), never two at once, after turns that are not counted. A
figure is the median of its turns. On a CPU the clock is `perf_counter`, on a GPU two CUDA events in the stream, which
include the time that the device waits for Python. Kernels get a new input every time, more of them than the L2 cache
holds. What makes the two sides equal work, and what is left outside the clock, stands in the function of each row.

How to read the table. `ratio` says how many times faster ours is than the peer; in a row that says "against", how many
times as much ours takes. A bar with an x is for the ratio, one without for our own figure; rows without a bar are
information. If the load at the beginning, printed above the table, is well above 0, another program took part.

Letters: N images, G boxes of an image, L locations over all levels, C classes, R rows, K boxes.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import functional as pil_transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import csrc  # noqa: E402
import data  # noqa: E402
from assign import Targets, assign_targets, make_locations  # noqa: E402
from model import FCOS, Detector, ModelConfig, bf16_is_fast, convert, dtype_of  # noqa: E402
from train import PRESETS, build_optimizer, training_step  # noqa: E402

CLASSES = 80
LR = 1e-6  # so low that dozens of steps on one batch leave the network as it was; no step costs less for it

# --- measuring --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table. `ours` and `peer` are the medians of the turns."""
    name: str
    unit: str = ""
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    bar: str = ""
    met: bool | None = None
    note: str = ""
    turns: dict = {}  # side -> every repetition


def row(name, unit, ours, peer=None, bar="", note="", limit=False) -> Row:
    """Judge the turns of ours against a bar: ">= 4x" or "<= 1.3x" the ratio, "<= 5" ours. `limit`: the peer is a lower one."""
    turns = {"ours": ours} | ({"peer": peer} if peer else {})
    ours, peer = statistics.median(ours), statistics.median(peer) if peer else None
    faster = peer and (ours / peer if unit == "images/s" else peer / ours)
    ratio = faster and (1 / faster if limit else faster)
    met = None
    if bar:
        sign, number = bar.removesuffix("x").split()
        value = ratio if bar.endswith("x") else ours
        met = value >= float(number) if sign == ">=" else value <= float(number)
    return Row(name, unit, ours, peer, ratio, bar, met, note, turns)


def take_turns(sides: dict, device="cpu", turns=9, uncounted=2, calls=1) -> dict[str, list[float]]:
    """Milliseconds of every turn of every side, a function without arguments that makes `calls` calls of what is timed."""
    times = {name: [] for name in sides}
    for turn in range(-uncounted, turns):
        for name, run in sides.items():
            if device == "cpu":
                start = time.perf_counter()
                run()
                elapsed = 1000 * (time.perf_counter() - start)
            else:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                run()
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end)
            if turn >= 0:
                times[name].append(elapsed / calls)
    return times


# --- the two detectors ------------------------------------------------------------------------------------------------

def torchvision_fcos(**options):
    """torchvision's fcos_resnet50_fpn as it comes with published weights, but with random ones: nothing is downloaded.

    Called with weights=None it would have trainable BatchNorm and a learning stem, which is more work than ours does.
    As published it has FrozenBatchNorm2d, and stem and layer1 do not learn: so do ours. The same seed, so the same
    weights each time; the last norm of a residual block is scaled down to keep activations in range, fp16 included.
    """
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3,
                                   returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    for name, module in backbone.named_modules():
        if name.endswith("bn3"):
            nn.init.constant_(module.weight, 0.2)
    return torchvision.models.detection.FCOS(backbone, CLASSES, **options)


def our_fcos(theirs, config: ModelConfig | None = None) -> FCOS:
    """Our detector with the weights of torchvision's, and its meaning of them or that of `config`."""
    theirs_config, weights = convert(theirs.state_dict(), "torchvision")
    model = FCOS(config or theirs_config)
    model.load_state_dict(weights)
    return model


def boxes_in(N, G, height, width):
    """Random boxes, of all sizes alike on a logarithmic scale: N x (G, 4) xyxy, N x (G,)."""
    random = torch.Generator().manual_seed(0)
    limit = torch.tensor([width, height])
    size = (8 * 64 ** torch.rand(N, G, 2, generator=random)).minimum(0.9 * limit)      # 8 .. 512 pixels
    corner = torch.rand(N, G, 2, generator=random) * (limit - size)
    labels = torch.randint(CLASSES, (N, G), generator=random)
    return list(torch.cat([corner, corner + size], dim=-1)), list(labels)


def convolution(device):
    """The limit: a 3 x 3 convolution of 256 channels, which is most of the head, in the precision that ours takes.

    Returns a function that runs it, and what it computes, in GFLOP (two for a multiply-add).
    """
    dtype = dtype_of("auto", torch.device(device))
    layer = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(1, 256, 100, 152).to(device, dtype, memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: layer(x)), gflop(lambda: layer(x))


def gflop(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def against_limit(times, work, limit_work) -> str:
    """How near `times["ours"]` is to the speed of `convolution`, `times["limit"]`; works in GFLOP, times in ms."""
    ours, limit = (1000 * w / statistics.median(times[side]) for side, w in (("ours", work), ("limit", limit_work)))
    return f"ours {ours:.0f} GFLOP/s, {ours / limit:.0%} of a 3 x 3 convolution's {limit:.0f}"


# --- inference --------------------------------------------------------------------------------------------------------

def inference(device="cpu", height=800, width=1216, bars=(">= 4x", ">= 1.2x"), absolute="", **turns):
    """One uint8 image on the host to its boxes on the host, ResNet-50. The weights are equal, the class bias such that
    hundreds of candidates pass the threshold. Ours is the path of evaluate.py. torchvision's resize is asked for the
    size that the image has; it makes floats of the image, as its users must."""
    def theirs(bf16):
        model = torchvision_fcos(min_size=min(height, width), max_size=max(height, width)).eval()
        nn.init.constant_(model.head.classification_head.cls_logits.bias, -3.3)
        return model.to(device, memory_format=torch.channels_last if bf16 else torch.contiguous_format)

    def runner(model, bf16):
        def run():
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                return {k: v.cpu() for k, v in model([image.to(device).float() / 255])[0].items()}["boxes"]
        return run

    image = photograph(height, width)                                                   # (3, H, W)
    image = image.pin_memory() if device == "cuda" else image
    detector, size = Detector(our_fcos(theirs(False)), torch.device(device)), torch.tensor([[height, width]])

    def ours():
        return detector(image[None], size)[0].boxes

    sides = {"ours": ours, "defaults": runner(theirs(False), False), "bf16": runner(theirs(True), True)}
    note = "boxes found: " + ", ".join(f"{name} {len(run())}" for name, run in sides.items())
    limit, limit_work = convolution(device)
    times = take_turns(sides | {"limit": limit}, device, **turns)
    note += "; " + against_limit(times, gflop(ours), limit_work)
    name = f"inference {height} x {width} {device}: "
    if absolute:
        yield row(name + "an image, end to end", "ms", times["ours"], bar=absolute)
    yield row(name + "torchvision, defaults", "ms", times["ours"], times["defaults"], bars[0], note)
    yield row(name + "torchvision, bf16, channels_last", "ms", times["ours"], times["bf16"], bars[1])


def gpu_inference():
    yield from inference("cuda", bars=(">= 3x", ""), absolute="<= 5", turns=30, uncounted=10)


# --- a training step --------------------------------------------------------------------------------------------------

def our_step(images, boxes, labels, canvas, device):
    """A step of train.py: images (N, 3, h, w) uint8 on their canvas, from the host's batch to the new weights."""
    config = PRESETS["fcos_imprv_R_50_FPN_1x"]  # what torchvision's detector learns: GIoU, center sampling
    config = replace(config, model=replace(config.model, num_classes=CLASSES))
    model = our_fcos(torchvision_fcos(), config.model).to(device, memory_format=torch.channels_last)
    network = torch.compile(model, dynamic=False) if device == "cuda" else model
    optimizer = build_optimizer(model, config)
    N, _, height, width = images.shape
    on_canvas = data.blank(N, *canvas)
    on_canvas[:, :, :height, :width] = images
    batch = data.Batch(on_canvas, torch.tensor([[height, width]] * N), boxes, labels, torch.arange(N))
    if device == "cuda":
        batch = torch.utils.data._utils.pin_memory.pin_memory(batch)  # as the DataLoader does

    def step():
        total = training_step(network, optimizer, [batch.to(device)], LR, config).sum()
        return total if device == "cuda" else total.item()  # train.py looks at a GPU's losses now and then
    return step


def torchvision_step(images, boxes, labels, device, dtype=None, channels_last=False):
    """A step of torchvision's detection references; fp16 is their --amp. Floats are made outside the clock."""
    size = sorted(images.shape[2:])
    model = torchvision_fcos(min_size=size[0], max_size=size[1]).train()
    model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device, init_scale=1024, enabled=dtype == torch.float16)
    images = [image.float() / 255 for image in images]                                  # N x (3, h, w)
    images = [image.pin_memory() for image in images] if device == "cuda" else images

    def step():
        inputs = [image.to(device, non_blocking=True) for image in images]
        targets = [{"boxes": b.to(device), "labels": label.to(device)} for b, label in zip(boxes, labels)]
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            total = sum(model(inputs, targets).values())
        value = total.item()  # the references stop at a loss that is not finite
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        return value
    return step


def training(N=2, height=512, width=672, G=20):
    """A whole step of ResNet-50 on equal images, boxes and weights, each side with its own assignment, losses and SGD."""
    images = torch.stack([photograph(height, width, seed) for seed in range(N)])
    boxes, labels = boxes_in(N, G, height, width)
    sides = {"ours": our_step(images, boxes, labels, (height, width), "cpu"),
             "defaults": torchvision_step(images, boxes, labels, "cpu"),
             "bf16": torchvision_step(images, boxes, labels, "cpu", torch.bfloat16, channels_last=True)}
    note = "losses: " + ", ".join(f"{name} {run():.3f}" for name, run in sides.items())
    limit, limit_work = convolution("cpu")
    times = take_turns(sides | {"limit": limit})
    note += "; " + against_limit(times, gflop(sides["ours"]), limit_work)
    name = f"training step {N} x {height} x {width}: "
    yield row(name + "torchvision, defaults", "ms", times["ours"], times["defaults"], ">= 4x", note)
    yield row(name + "torchvision, bf16, channels_last", "ms", times["ours"], times["bf16"], ">= 1.2x")


def gpu_training(N=16, height=800, width=1333, G=20):
    """The same on a GPU: ours compiled, on its canvas of 800 x 1344, torchvision with --amp. Both from pinned memory.
    Peak memory is what a side holds beyond what lay there before it, weights, gradients and momentum included."""
    images = torch.stack([photograph(height, width, seed) for seed in range(N)])
    boxes, labels = boxes_in(N, G, height, width)
    canvas = data.padded(height), data.padded(width)
    builders = {"ours": lambda: our_step(images, boxes, labels, canvas, "cuda"),
                "amp": lambda: torchvision_step(images, boxes, labels, "cuda", torch.float16)}
    sides, peak = {}, {}
    for name, build in builders.items():
        before = torch.cuda.memory_allocated()
        sides[name] = build()
        for _ in range(3):                     # compile, choose algorithms, make the momentum
            sides[name]()
        torch.cuda.reset_peak_memory_stats()
        sides[name]()
        peak[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
    times = take_turns(sides, "cuda", turns=15)
    rate = {side: [1000 * N / ms for ms in t] for side, t in times.items()}
    name = f"training {N} x {height} x {width} cuda: "
    yield row(name + "images", "images/s", rate["ours"], bar=">= 200")
    yield row(name + "torchvision --amp", "images/s", rate["ours"], rate["amp"], ">= 3x")
    yield row(name + "peak memory, against torchvision --amp", "GB", [peak["ours"]], [peak["amp"]], "<= 15", limit=True)


# --- assignment -------------------------------------------------------------------------------------------------------

def dense_assignment(locations, boxes, labels, radius) -> Targets:
    """What the original implementation does: per image, every location against every box. (tests/test_assign.py has the
    definition in fewer lines; this is the original's work.)"""
    all_labels, all_ltrb = [], []
    x, y = locations.xy[:, None].unbind(-1)                                              # (L, 1)
    lowest, highest = locations.size_range[:, None].unbind(-1)                           # (L, 1)
    for box, label in zip(boxes, labels):
        x0, y0, x1, y1 = box.unbind(-1)                                                  # (G,)
        ltrb = torch.stack([x - x0, y - y0, x1 - x, y1 - y], dim=-1)                     # (L, G, 4)
        inside = ltrb.amin(-1) > 0                                                       # (L, G)
        if radius is not None:
            reach = radius * locations.stride[:, None]                                   # (L, 1)
            cx, cy = (x0 + x1) / 2, (y0 + y1) / 2                                        # (G,)
            left, top = torch.maximum(x0, cx - reach), torch.maximum(y0, cy - reach)     # (L, G)
            right, bottom = torch.minimum(x1, cx + reach), torch.minimum(y1, cy + reach)
            inside = torch.stack([x - left, y - top, right - x, bottom - y], dim=-1).amin(-1) > 0
        size = ltrb.amax(-1)                                                             # (L, G)
        area = ((x1 - x0) * (y1 - y0)).expand_as(size).clone()
        area[~(inside & (size >= lowest) & (size <= highest))] = torch.inf
        smallest, box_of = area.min(dim=1)                                               # (L,)
        background = smallest == torch.inf
        all_labels.append(label[box_of].masked_fill(background, -1))
        all_ltrb.append(ltrb[torch.arange(len(ltrb)), box_of].masked_fill(background[:, None], 0))
    return Targets(torch.stack(all_labels), torch.stack(all_ltrb))


def assignment(N=4, height=800, width=1344):
    """Targets of N images from locations that are there already, with center sampling and without."""
    locations = make_locations(height, width)
    truth = {G: boxes_in(N, G, height, width) for G in (30, 100, 300)}
    for radius in (1.5, None):
        assert assign_targets(locations, *truth[100], radius).labels.equal(dense_assignment(locations, *truth[100], radius).labels)
        sides = {G: lambda G=G: assign_targets(locations, *truth[G], radius) for G in truth}
        times = take_turns(sides | {"dense": lambda: dense_assignment(locations, *truth[100], radius)})
        name = f"assignment {N} x {height} x {width}, radius {radius}: "
        yield row(name + "dense, 100 boxes", "ms", times[100], times["dense"], ">= 20x")
        yield row(name + "300 boxes, against 30", "ms", times[300], times[30], "<= 2x", limit=True)


# --- input pipeline ---------------------------------------------------------------------------------------------------

def photograph(height, width, seed=0):
    """(3, H, W) uint8, like a photograph in its spectrum: noise of every grain, the coarser the stronger."""
    random = torch.Generator().manual_seed(seed)
    image, grain = torch.zeros(1, 3, height, width), 1
    while grain <= max(height, width):
        noise = torch.randn(1, 3, -(-height // grain), -(-width // grain), generator=random)
        image += grain ** 0.5 * nn.functional.interpolate(noise, (height, width), mode="bilinear")
        grain *= 2
    return (128 + 50 * (image[0] - image.mean()) / image.std()).clamp(0, 255).byte()


def input_pipeline(images=16, height=480, width=640, short=800, long=1333):
    """JPEG files (in the page cache) to a batch at 800/1333 with half of it flipped, in one thread.

    Ours is what a loader process of train.py does, and ends with uint8 on the canvas; the device makes floats of it.
    The peer is torchvision's detection references: Pillow, flip, float, and the normalise, resize and batch of the
    detector's own GeneralizedRCNNTransform, which the references run with the model.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "annotations").mkdir()
        (root / "train").mkdir()
        for i in range(images):
            torchvision.io.write_jpeg(photograph(height, width, i), str(root / "train" / f"{i}.jpg"), quality=90)
        (root / "annotations" / "instances_train.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in range(images)],
            "annotations": [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [9, 9, 99, 99]} for i in range(images)],
            "categories": [{"id": 1, "name": "thing"}]}))
        dataset = data.open_split(folder, folder, "train")
        sampler = data.TrainSampler(dataset.annotations.sizes, dataset.with_boxes(), images, 0, (short, short), long)
        batch = sampler.global_batch(0)
        transform = GeneralizedRCNNTransform(short, long, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

        def peer():
            loaded = []
            for request in batch:
                picture = Image.open(dataset.image_path(request.index)).convert("RGB")
                loaded.append(pil_transforms.to_tensor(pil_transforms.hflip(picture) if request.flip else picture))
            return transform(loaded)[0].tensors                                          # (N, 3, H, W) float

        note = f"batches of {tuple(dataset[batch].images.shape)} and {tuple(peer().shape)}"
        times = take_turns({"ours": lambda: dataset[batch], "peer": peer})
    torch.set_num_threads(threads)
    rate = {side: [1000 * images / ms for ms in t] for side, t in times.items()}
    yield row(f"input pipeline {width} x {height} JPEG to {short}/{long}, one thread: Pillow, float", "images/s",
              rate["ours"], rate["peer"], ">= 5x", note)


# --- kernels ----------------------------------------------------------------------------------------------------------

def past_the_cache(bytes_of_one) -> int:
    """How many inputs are twice as large as the L2 cache together."""
    return max(2, -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_of_one))


def candidates(images, K):
    """K boxes of each image as a detector makes them: around 60 objects, each of one class. boxes, scores, groups (images*K,)."""
    objects, labels = (torch.stack(part) for part in boxes_in(images, 60, 800, 1333))    # (images, 60, 4), (images, 60)
    object_of = torch.randint(60, (images, K))
    boxes = objects.gather(1, object_of[..., None].expand(-1, -1, 4))
    boxes = boxes + torch.randn(images, K, 4) * 0.1 * (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    groups = torch.arange(images)[:, None] * CLASSES + labels.gather(1, object_of)
    boxes = torch.cat([boxes[..., :2].minimum(boxes[..., 2:]), boxes[..., :2].maximum(boxes[..., 2:])], dim=-1)
    return boxes.flatten(0, 1).cuda(), torch.rand(images * K).cuda(), groups.flatten().cuda()


def nms(K=5000):
    """Kept indices in order of score, of a whole batch in one call; a group is a class of an image."""
    for images in (1, 16):
        inputs = [candidates(images, K) for _ in range(past_the_cache(28 * images * K))]
        sides = {"ours": csrc.batched_nms, "peer": torchvision.ops.batched_nms}
        kept = ", ".join(f"{side} {len(run(*inputs[0], 0.6))}" for side, run in sides.items())
        sides = {side: lambda run=run: [run(*x, 0.6) for x in inputs] for side, run in sides.items()}
        times = take_turns(sides, "cuda", turns=5, uncounted=1, calls=len(inputs))
        yield row(f"NMS {images} x {K}: torchvision.ops.batched_nms", "ms", times["ours"], times["peer"], ">= 3x", f"kept: {kept}")


def focal(R=16 * 22_400, C=CLASSES):
    """Sum of the focal loss of all logits and its gradient; the copy moves the logits once. One-hot targets, which
    torchvision wants, are made outside the clock. GB/s count what has to be moved: logits read, gradient written."""
    def ours(logits, labels, hot):
        return torch.autograd.grad(csrc.focal_loss(logits, labels), logits)

    def torchvision_loss(logits, hot):
        return torchvision.ops.sigmoid_focal_loss(logits, hot, reduction="sum")

    compiled_loss = torch.compile(torchvision_loss, dynamic=False)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = []
        for _ in range(past_the_cache(R * C * dtype.itemsize)):
            labels = torch.where(torch.rand(R) < 0.01, torch.randint(C, (R,)), -1).cuda()
            hot = (labels[:, None] == torch.arange(C, device="cuda")).to(dtype)
            inputs.append((torch.randn(R, C, device="cuda", dtype=dtype).sub_(4).requires_grad_(), labels, hot))
        target = torch.empty(R, C, device="cuda", dtype=dtype)
        calls = {"ours": ours, "copy": lambda logits, labels, hot: target.copy_(logits.detach()),
                 "eager": lambda logits, labels, hot: torch.autograd.grad(torchvision_loss(logits, hot), logits),
                 "compiled": lambda logits, labels, hot: torch.autograd.grad(compiled_loss(logits, hot), logits)}
        sides = {side: lambda call=call: [call(*x) for x in inputs * 4] for side, call in calls.items()}
        times = take_turns(sides, "cuda", turns=9, uncounted=3, calls=4 * len(inputs))
        moved = 2 * R * C * dtype.itemsize
        note = ", ".join(f"{side} {moved / 1e6 / statistics.median(t):.0f} GB/s" for side, t in times.items())
        name = f"focal loss + gradient {R} x {C} {str(dtype).removeprefix('torch.')}: "
        yield row(name + "against one copy", "ms", times["ours"], times["copy"], "<= 1.3x", note, limit=True)
        yield row(name + "torchvision eager", "ms", times["ours"], times["eager"], ">= 10x")
        yield row(name + "torchvision compiled", "ms", times["ours"], times["compiled"])


# --- the table --------------------------------------------------------------------------------------------------------

MEASUREMENTS = {"inference": inference, "training": training, "assignment": assignment, "input": input_pipeline,
                "nms": nms, "focal": focal, "gpu_training": gpu_training, "gpu_inference": gpu_inference}
ON_GPU = ("nms", "focal", "gpu_training", "gpu_inference")


def surroundings() -> dict:
    """What a figure depends on: hardware, versions, and what else the machine was doing."""
    gpu = torch.cuda.is_available()
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": git.stdout.strip(),
            "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()), "threads": torch.get_num_threads(),
            "bf16 on this cpu": bf16_is_fast(torch.device("cpu")), "load at the beginning": round(os.getloadavg()[0], 2),
            "gpu": torch.cuda.get_device_name() if gpu else "no GPU here", "kernels": gpu and csrc.available(),
            "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda, "pillow": Image.__version__}


def table(rows: list[Row]) -> str:
    """The rows in columns, and below them what each of them notes."""
    def figure(value):
        return "" if value is None else f"{value:.4g}"

    lines = [("", "unit", "ours", "peer", "ratio", "bar", "met")]
    for r in rows:
        met = {True: "yes", False: "NO", None: "" if r.unit else r.note}[r.met]
        lines.append((r.name, r.unit, figure(r.ours), figure(r.peer), f"{r.ratio:.2f}x" if r.ratio else "", r.bar, met))
    wide = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    printed = ["  ".join([*map(str.ljust, line[:2], wide), *map(str.rjust, line[2:6], wide[2:]), line[6]]) for line in lines]
    return "\n".join(printed + [f"  {r.name}: {r.note}" for r in rows if r.note and r.unit])


def main():
    parser = argparse.ArgumentParser(description="Ours beside its peers, in one run.")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help="some of " + ", ".join(MEASUREMENTS))
    parser.add_argument("--json", metavar="OUT", default=ROOT / "runs" / "benchmark.json", help="file of all figures (default: %(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = Path(args.json)
    out.parent.mkdir(parents=True, exist_ok=True)  # before hours of work, not after
    where, rows, start = surroundings(), [], time.time()
    try:
        for name in args.only or MEASUREMENTS:
            print(f"{time.time() - start:5.0f} s  {name} ...", file=sys.stderr, flush=True)
            if name in ON_GPU and not torch.cuda.is_available():
                rows.append(Row(name, note="no GPU here"))
                continue
            rows.extend(MEASUREMENTS[name]())
    finally:  # an interruption keeps what is measured
        print("\n" + ", ".join(f"{key}: {value}" for key, value in where.items()) + "\n\n" + table(rows), flush=True)
        out.write_text(json.dumps({"surroundings": where, "rows": [r._asdict() for r in rows]}, indent=1))
        print(f"\nevery repetition in {out}")


if __name__ == "__main__":
    main()
