"""benchmark.py: how fast is this code, beside what a user would otherwise run?

    python tools/benchmark.py                               all rows; without a GPU those of a CPU
    python tools/benchmark.py --only inference assignment   some of them
    python tools/benchmark.py --json OUT.json               every repetition as well

Machines differ and drift, so ours and its peers do the same work in one process and take turns;
a figure is the median of its turns. `ratio`: how many times as good as the peer ours is. Where the
peer is a limit (measured in the same run: a 3 x 3 convolution of 256 channels on a CPU, a bfloat16
matrix product or a copy on a GPU), it is the share of the limit that ours reaches. A bar with an x
is for the ratio, one without for ours; rows without a bar are information.

Networks are timed by the clock, with all that the host does. Kernels are timed by CUDA events,
behind a wait that lets the host enqueue every call first; each call has an input of its own, and
none is in the L2 cache. On a GPU machine, in this order, with what has to hold on an H100:

    python -m csrc --build
    make test-gpu
    python tools/benchmark.py --only nms focal
        # NMS: 3x batched_nms at 1 x 5,000 and 16 x 5,000; not slower in one group of 80,000
        # focal loss + gradient: at most 1.3 copies of the logits (0.77x); 10x sigmoid_focal_loss
    python tools/benchmark.py --only gpu_inference gpu_training
        # 5 ms an image, 3x torchvision; 200 images/s, 3x torchvision --amp, 15 GB
    python tools/benchmark.py --only gpu_profile
        # a step with cudnn.benchmark and layout optimisation off and on; what holds it back
    make train RUN=runs/gpu_demo                                    # AP at least 0.65
    timeout -s TERM 120 python train.py fcos_R_50_FPN_1x_center_giou --data SMALL_COCO \\
        --steps 500 --backbone-weights none --run-dir runs/gpu_coco
    python train.py --resume --run-dir runs/gpu_coco                # from where it was stopped
    python evaluate.py runs/gpu_coco
    make bench                                       # rows into the README, with the card's name

To try there: in `train.COMPILE_OPTIONS`, "combo_kernels": True, which makes 301 Triton kernels of
the 672 of a step; in `evaluate.Detector`, torch.cudnn_convolution_relu and
torch.cudnn_convolution_add_relu for the backbone, which would spare 114 of an image's 523; a fused
GroupNorm + ReLU, if the profile of a step gives GroupNorm more than 8 %.

Letters: N images, G boxes of an image, L locations, C classes, R rows, K boxes.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from operator import ge, le
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, batched_nms, box_convert, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import functional as pil_transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import csrc  # noqa: E402
import data  # noqa: E402
import export  # noqa: E402
from assign import assign_targets, make_locations  # noqa: E402
from evaluate import Detector, dtype_of, run_program  # noqa: E402
from import_weights import convert  # noqa: E402
from model import FCOS  # noqa: E402
from train import COMPILE_OPTIONS, PRESETS, prepare, training_step  # noqa: E402

C = 80
LR = 1e-6             # dozens of steps on one batch leave the network as it was
COMPILE_UNTIL = 180   # seconds after the start; later, torch.compile would not fit into 8 minutes
STARTED = time.monotonic()
FORMATS = torch.contiguous_format, torch.channels_last
LINE = "{:<50} {:<8}{:>9}{:>9}{:>8}{:>9}{:>5}"
ROWS = []

# --- measuring ----------------------------------------------------------------------------------


def report(name, unit="", ours=(), peer=(), bar="", note=""):
    """Print a row of the table and keep it. `ours` and `peer` are the values of the turns."""
    mine, other = (statistics.median(x) if x else None for x in (ours, peer))
    ratio = (other / mine if unit == "ms" else mine / other) if peer else None
    met = ""
    if bar:
        sign, number = bar.removesuffix("x").split()
        compare, value = {">=": ge, "<=": le}[sign], ratio if bar.endswith("x") else mine
        met = "yes" if compare(value, float(number)) else "NO"
    figures = ["" if x is None else f"{x:.4g}" for x in (mine, other, ratio)]
    print(LINE.format(name, unit, *figures, bar, met))
    print("   ", f"{len(ours)} turns" if ours else "", note, flush=True)
    ROWS.append(dict(name=name, unit=unit, ours=ours, peer=peer, ratio=ratio, bar=bar, met=met))


def take_turns(sides: dict, seconds=40, device="cpu") -> dict[str, list[float]]:
    """Milliseconds of every turn of every side, a function without arguments; 3 to 30 turns."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times, end = {name: [] for name in sides}, 0
    for turn in range(-3 if device == "cuda" else -1, 30):  # the first are not counted
        if turn == 0:
            end = time.perf_counter() + seconds
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, run in sides.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if turn >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def gflop(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def convolutions(x, layer, backward):
    for _ in range(5):
        y = layer(x)
        if backward:
            torch.autograd.grad(y, [x, *layer.parameters()], x.detach())


def limits(device, N, height, width, backward) -> tuple[dict, float]:
    """Sides that show the limit, and the GFLOP of one turn. On a CPU: the convolution on P3, in the
    precision that ours takes and in both memory formats."""
    if device == "cuda":
        x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        return {"limit, matrix product": lambda: [x @ x for _ in range(10)]}, 20 * 8192**3 / 1e9
    sides, dtype, h, w = {}, dtype_of("auto", torch.device(device)), height // 8, width // 8
    for memory_format in FORMATS:
        layer = nn.Conv2d(256, 256, 3, padding=1).to(dtype=dtype, memory_format=memory_format)
        x = torch.randn(N, 256, h, w).to(dtype=dtype, memory_format=memory_format)
        sides[f"limit, convolution, {str(memory_format)[6:]}"] = partial(
            convolutions, x.requires_grad_(), layer, backward)
    return sides, 5 * (3 if backward else 1) * 2 * N * h * w * 9 * 256**2 / 1e9


def compare_networks(name, ours, work, peers, limit, limit_work, device, bars, note) -> list[float]:
    """Time ours, its peers and the limit in turns, and report the share of the limit that ours
    reaches, then each peer. `bars`: of the limit, of torchvision at its best. Returns our times."""
    times = take_turns({"ours": ours} | peers | limit, device=device)
    fastest, best = (min((side for side in times if side.startswith(prefix)),
                         key=lambda side: statistics.median(times[side]))
                     for prefix in ("limit", "torchvision"))
    speed, limit_speed = ([1000 * gflops / ms for ms in times[side]]
                          for side, gflops in (("ours", work), (fastest, limit_work)))
    report(f"{name}: {fastest}", "GFLOP/s", speed, limit_speed, bars[0], f"{work:.0f} GFLOP{note}")
    for side in peers:
        report(f"{name}: {side}", "ms", times["ours"], times[side],
               *([bars[1], "torchvision at its best"] if side == best else []))
    return times["ours"]


# --- inputs and peers ---------------------------------------------------------------------------

def photograph(height, width, seed=0):
    """(3, H, W) uint8 with a photograph's spectrum: noise of every grain, coarse ones strong."""
    random = torch.Generator().manual_seed(seed)
    image = sum(grain ** 0.5 * nn.functional.interpolate(
        torch.randn(1, 3, -(-height // grain), -(-width // grain), generator=random),
        (height, width), mode="bilinear") for grain in (1, 2, 4, 8, 16, 32, 64, 128, 256))
    return (128 + 50 * image[0] / image.std()).clamp(0, 255).byte()


def boxes_in(N, G, height, width):
    """Boxes of all sizes alike on a logarithmic scale: (N, G, 4) xyxy, labels (N, G)."""
    random, limit = torch.Generator().manual_seed(0), torch.tensor([width, height])
    size = (8 * 64 ** torch.rand(N, G, 2, generator=random)).minimum(0.9 * limit)  # 8 .. 512 pixels
    corner = torch.rand(N, G, 2, generator=random) * (limit - size)
    return (torch.cat([corner, corner + size], dim=-1),
            torch.randint(C, (N, G), generator=random))


def coco_folder(folder, N, height, width):
    """Write a COCO-format folder of N photographs with 20 boxes each, all in the split train."""
    for name in ("annotations", "train"):
        Path(folder, name).mkdir()
    boxes, labels = boxes_in(N, 20, height, width)
    images, annotations = [], []
    for i, (box, label) in enumerate(zip(box_convert(boxes, "xyxy", "xywh").tolist(), labels)):
        images.append(dict(id=i, file_name=f"{i}.jpg", height=height, width=width))
        annotations += [dict(image_id=i, bbox=xywh, category_id=c)
                        for xywh, c in zip(box, label.tolist())]
        picture = pil_transforms.to_pil_image(photograph(height, width, i))
        picture.save(Path(folder, "train", f"{i}.jpg"), quality=90)
    categories = [dict(id=c, name=f"class {c}") for c in range(C)]
    Path(folder, "annotations", "instances_train.json").write_text(json.dumps(
        dict(images=images, annotations=annotations, categories=categories)))


def torchvision_fcos(height, width, device="cpu", memory_format=FORMATS[0], compiled=False):
    """torchvision's fcos_resnet50_fpn as it comes with published weights: the BatchNorms, stem and
    layer1 are frozen. The weights are random: those of bn3 keep the activations small, and the
    class bias lets hundreds of candidates pass the threshold."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3,
        returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    for name, module in backbone.named_modules():
        if name.endswith("bn3"):
            nn.init.constant_(module.weight, 0.2)
    model = torchvision.models.detection.FCOS(backbone, C, min_size=min(height, width),
                                              max_size=max(height, width))
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -3.3)
    if compiled:
        model.backbone.compile(dynamic=False)
        model.head.compile(dynamic=False)
    return model.to(device, memory_format=memory_format)


def torchvision_sides(build, height, width, device) -> dict:
    """torchvision's detector at its defaults, and at what may be its best here.

    `build(model, dtype)` makes a side. It computes in float32, or under autocast in bfloat16 where
    the hardware has it; compiled where there is a C++ compiler and time for it.
    """
    amp = dtype_of("auto", torch.device(device))
    settings = [(FORMATS[0], torch.float32, False), *((f, amp, False) for f in FORMATS)]
    if (device == "cpu" and shutil.which(os.environ.get("CXX", "g++"))
            and time.monotonic() - STARTED < COMPILE_UNTIL):
        settings.append((FORMATS[1], amp, True))  # Inductor chooses the formats itself
    return {f"torchvision, {str(dtype)[6:]}, {'compiled' if compiled else str(memory_format)[6:]}":
            build(torchvision_fcos(height, width, device, memory_format, compiled), dtype)
            for memory_format, dtype, compiled in dict.fromkeys(settings)}


def exported_sides(model, images, sizes, folder) -> dict:
    """onnxruntime and OpenVINO on the exported detector; reports those that are not installed."""
    sides, path = {}, Path(folder) / "detector.onnx"
    inputs = {"images": images.numpy(), "image_sizes": sizes.numpy()}
    for runtime in ("onnxruntime", "openvino"):
        needed = [p for p in ("onnx", "onnxscript", runtime) if not importlib.util.find_spec(p)]
        if needed:
            report(f"inference: {runtime}", note=f"not installed: pip install {' '.join(needed)}")
            continue
        if not path.exists():
            export.save(export.export(copy.deepcopy(model), torch.float32), path, {})
        package = importlib.import_module(runtime)
        if runtime == "openvino":
            sides[runtime] = partial(package.Core().compile_model(path, "CPU"), inputs)
        else:
            options = package.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = package.InferenceSession(path, options, ["CPUExecutionProvider"])
            sides[runtime] = partial(session.run, None, inputs)
    return sides


# --- rows of a CPU, and networks on both --------------------------------------------------------

def input_pipeline(N=8):
    """JPEG files in the page cache to a batch at 800/1333: one thread, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        times = process.submit(time_loading, N).result()
    rates = [[1000 * N / ms for ms in times[side]] for side in times]
    report("input: torchvision's references", "images/s", *rates, ">= 4x")


def time_loading(N) -> dict:
    """Ours is uint8 on a canvas, of which the device makes floats. torchvision's references take
    Pillow, flip, float; then their detector normalises and resizes."""
    torch.set_num_threads(1)
    resize = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with tempfile.TemporaryDirectory() as folder:
        coco_folder(folder, N, 480, 640)
        dataset = data.open_split(folder, "train")
        sampler = data.TrainSampler(dataset.annotations.sizes, dataset.with_boxes(),
                                    replace(PRESETS["fcos_R_50_FPN_1x"], batch_size=N))

        def theirs():
            images = [Image.open(dataset.image_path(i)).convert("RGB") for i in range(N)]
            images[::2] = map(pil_transforms.hflip, images[::2])
            resize([pil_transforms.to_tensor(image) for image in images])

        return take_turns({"ours": lambda: dataset.load(sampler.global_batch(0)),
                           "theirs": theirs}, seconds=15)


def dense_assignment(locations, boxes, labels, radius=1.5):
    """The original's work: image by image, every location against every box. Returns labels."""
    found, xy = [], locations.xy[:, None]                                            # (L, 1, 2)
    reach, (lowest, highest) = radius * locations.stride, locations.size_range[..., None].unbind(1)
    for box, label in zip(boxes, labels):
        start, end = box[:, :2], box[:, 2:]                                          # (G, 2)
        ltrb, off = torch.cat([xy - start, end - xy], dim=-1), xy - (start + end) / 2
        size = ltrb.amax(-1)                                                         # (L, G)
        positive = ((ltrb.amin(-1) > 0) & (off.abs().amax(-1) < reach[:, None])
                    & (size >= lowest) & (size <= highest))                          # (L, G)
        smallest, best = torch.where(positive, (end - start).prod(-1), torch.inf).min(dim=1)
        ltrb = ltrb[torch.arange(len(ltrb)), best]                                   # (L, 4)
        found.append(label[best].masked_fill(smallest == torch.inf, -1))             # (L,)
    return torch.stack(found)


def assignment(N=4, height=800, width=1344):
    """Targets from locations that are there already, with center sampling."""
    locations = make_locations(height, width)
    truth = {G: list(map(list, boxes_in(N, G, height, width))) for G in (30, 100, 300)}
    sides = {G: partial(assign_targets, locations, *truth[G]) for G in truth}
    sides["dense"] = partial(dense_assignment, locations, *truth[100])
    same = sides[100]().labels.equal(sides["dense"]())
    times = take_turns(sides, seconds=15)
    report("assignment, 100 boxes: dense, as the original", "ms", times[100], times["dense"],
           ">= 20x", f"equal labels: {same}")
    report("assignment, 300 boxes: ours with 30", "ms", times[300], times[30], ">= 0.5x")


def inference(device="cpu", height=800, width=1216):
    """A uint8 image on the host to its boxes on the host: ResNet-50, equal weights.

    torchvision's resize is asked for the size that the image has. It takes floats.
    """
    gpu, size = device == "cuda", torch.tensor([[height, width]])
    image = photograph(height, width)[None]                                          # (1, 3, H, W)
    image = image.pin_memory() if gpu else image

    def build(model, dtype):
        @torch.inference_mode()
        def run():
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                found = model.eval()([image[0].to(device).float() / 255])[0]
            return {name: value.cpu() for name, value in found.items()}["boxes"]
        return run

    config, weights = convert(torchvision_fcos(height, width).state_dict(), "torchvision", "")
    model = FCOS(config)
    model.load_state_dict(weights)
    categories = {"ids": list(range(C)), "names": [f"class {c}" for c in range(C)]}
    detector = Detector(model, categories, device)
    ours = lambda: detector.detect_batch(image, size)[0].boxes  # noqa: E731
    peers = torchvision_sides(build, height, width, device)
    found = [len(run()) for run in (ours, *peers.values())]
    with tempfile.TemporaryDirectory() as folder:
        exported = {} if gpu else exported_sides(model, image, size, folder)
        times = compare_networks(
            "inference", ours, gflop(ours), peers | exported,
            *limits(device, 1, height, width, backward=False), device,
            ("", ">= 3x") if gpu else (">= 0.85x", ">= 1x"), f"; each side finds {found} boxes")
    if gpu:
        report("inference on a GPU: an image", "ms", times, bar="<= 5")


def prepare_step(device, N, height, width):
    """What `training_step` takes: a run that is like torchvision's (GIoU, center sampling), and a
    batch on the host."""
    config = PRESETS["fcos_imprv_R_50_FPN_1x"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        coco_folder(folder, N, height, width)
        config = replace(config, data=folder, backbone_weights="none", batch_size=N,
                         train_short_sides=(min(height, width),) * 2,
                         model=replace(config.model, long_side=max(height, width)))
        run = prepare(config, Path(folder), torch.device(device), None, None, skip_eval=True)
        requests = data.microbatches(run.sampler, range(1), 1, 0, 1)
        (batch,) = data.batches(run.dataset, requests, 0, pin_memory=device == "cuda")
    return run, batch


def training(device="cpu", N=2, height=512, width=672, steps=1):
    """Whole steps of ResNet-50 on one batch from the host, with equal weights; `steps` a turn.

    Each side has its own assignment, losses and SGD. torchvision's floats are made beforehand.
    """
    gpu, weights = device == "cuda", torchvision_fcos(height, width).state_dict()
    run, batch = prepare_step(device, N, height, width)
    run.model.load_state_dict(convert(weights, "torchvision", "")[1])

    def ours(network=run.network):
        for _ in range(steps):
            training_step(network, run.optimizer, [batch.to(device)], LR, run.config)

    def build(model, dtype):
        learned = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=LR, momentum=0.9, weight_decay=1e-4)
        h, w = batch.sizes[0].tolist()  # as of all
        images = batch.images[:, :, :h, :w].float() / 255
        images = images.pin_memory() if gpu else images

        def step():
            boxes, labels = (x.to(device).split(batch.counts) for x in (batch.boxes, batch.labels))
            targets = [dict(boxes=b, labels=x) for b, x in zip(boxes, labels)]
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                total = sum(model(list(images.to(device, non_blocking=True)), targets).values())
            total.item()  # the references stop at a loss that is not finite
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return lambda: [step() for _ in range(steps)]

    if gpu:  # while there is nothing else on it
        ours()
        torch.cuda.reset_peak_memory_stats()
        ours()
        report("training on a GPU: memory", "GB", [torch.cuda.max_memory_allocated() / 1e9],
               bar="<= 15")
    times = compare_networks(
        "training", ours, gflop(lambda: ours(run.model)),
        torchvision_sides(build, height, width, device),
        *limits(device, N, height, width, backward=True), device,
        ("", ">= 3x") if gpu else (">= 0.8x", ">= 1x"), "")
    if gpu:
        rate = [1000 * N * steps / ms for ms in times]
        report("training on a GPU", "images/s", rate, bar=">= 200")


def profile(N=16, height=800, width=1333):
    """A training step on a GPU with two settings off and on, and the kernels that it launches."""
    run, batch = prepare_step("cuda", N, height, width)
    for autotuned, options in product((False, True), (None, COMPILE_OPTIONS)):
        torch.backends.cudnn.benchmark = autotuned
        torch.compiler.reset()
        network = torch.compile(run.model, dynamic=False, options=options)
        step = partial(training_step, network, run.optimizer, [batch.to("cuda")], LR, run.config)
        times = take_turns({"step": step}, seconds=5, device="cuda")["step"]
        report(f"a step, cudnn.benchmark {autotuned}, COMPILE_OPTIONS {bool(options)}", "ms", times)
    with torch.profiler.profile() as profiler:
        step()
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40,
                                        max_name_column_width=80))


# --- kernels on a GPU ---------------------------------------------------------------------------

def kernel_times(sides: dict, inputs: list, turns=9) -> dict[str, list[float]]:
    """Milliseconds of the device for one call, each on another of the inputs, none in the cache."""
    times = {name: [] for name in sides}
    flush = torch.ones(torch.cuda.get_device_properties(0).L2_cache_size, device="cuda")  # 4 L2
    for turn in range(-2, turns):
        for name, run in sides.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            torch.cuda.synchronize()
            torch.cuda._sleep(100_000_000)  # cycles, some 50 ms; the queue holds 1,000 launches
            begin.record()
            for x in inputs:
                run(*x)
            end.record()
            end.synchronize()
            if turn >= 0:
                times[name].append(begin.elapsed_time(end) / len(inputs))
    return times


def traffic(times, num_bytes) -> str:
    """The bytes that have to be moved, and at which share of a device copy's speed a side does."""
    source, target = (torch.ones(2**28, device="cuda") for _ in range(2))
    copies = kernel_times({"copy": target.copy_}, [(source,)] * 4)["copy"]
    rates = {side: num_bytes / 1e6 / statistics.median(t) for side, t in times.items()}
    copy_rate = 2 * 2**30 / 1e6 / statistics.median(copies)  # GB/s: each byte read and written
    shares = (f"{side} {rate / copy_rate:.1%}" for side, rate in rates.items())
    return f"{num_bytes / 1e6:.4g} MB; of a copy's {copy_rate:.0f} GB/s: {', '.join(shares)}"


def nms(cases=((1, 5000, C, 40), (16, 5000, C, 4), (1, 80_000, 1, 2))):
    """NMS of a whole batch; a group is a class of an image. `cases`: N, K, classes, inputs.

    K boxes of an image lie around 60 objects, as a detector's do.
    """
    sides = {"ours": lambda *x: csrc.nms_mask(*x, 0.6), "peer": lambda *x: batched_nms(*x, 0.6)}
    for N, K, classes, count in cases:
        inputs, objects = [], boxes_in(N, 60, 800, 1333)
        for _ in range(count):
            boxes, labels = (x[:, torch.randint(60, (K,))] for x in objects)         # (N, K, 4)
            size = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
            boxes = boxes + 0.05 * size * torch.randn(N, K, 4).clamp(-3, 3)
            groups = torch.arange(N)[:, None] * classes + labels % classes
            inputs.append([x.cuda() for x in (boxes.flatten(0, 1), torch.rand(N * K),
                                              groups.flatten())])
        kept = int(sides["ours"](*inputs[0]).sum()), len(sides["peer"](*inputs[0]))
        times = kernel_times(sides, inputs)
        report(f"NMS {N} x {K}, {classes} classes: batched_nms", "ms", times["ours"], times["peer"],
               ">= 3x" if classes > 1 else ">= 1x",
               f"kept {kept}; {traffic(times, 29 * N * K)}")  # box, score, group; the mask


def focal(R=16 * 22_400, count=4):
    """The focal loss of all logits, summed, and its gradient. torchvision's one-hot targets are
    made outside the clock."""
    def theirs(logits, labels, hot):
        return sigmoid_focal_loss(logits, hot, reduction="sum")

    losses = {"ours": lambda logits, labels, hot: csrc.focal_loss(logits, labels),
              "torchvision": theirs, "torchvision, compiled": torch.compile(theirs, dynamic=False)}
    for dtype in (torch.bfloat16, torch.float32):
        inputs, target = [], torch.empty(R, C, device="cuda", dtype=dtype)
        for _ in range(count):
            labels = torch.where(torch.rand(R) < 0.01, torch.randint(C, (R,)), -1).cuda()
            hot = (labels[:, None] == torch.arange(C, device="cuda")).to(dtype)
            logits = torch.randn(R, C, device="cuda", dtype=dtype).sub_(4).requires_grad_()
            inputs.append((logits, labels, hot))
        sides = {name: lambda *x, loss=loss: torch.autograd.grad(loss(*x), x[0])
                 for name, loss in losses.items()}
        sides["a copy of the logits"] = lambda logits, *x: target.copy_(logits.detach())
        times = kernel_times(sides, inputs)
        note = traffic(times, 2 * R * C * dtype.itemsize)  # logits read, gradient written
        bars = {"a copy of the logits": ">= 0.77x", "torchvision": ">= 10x"}
        for peer in list(sides)[:0:-1]:
            report(f"focal, {str(dtype)[6:]}: {peer}", "ms", times["ours"], times[peer],
                   bars.get(peer, ""), note if peer in bars else "")


MEASUREMENTS = {
    "input": input_pipeline, "assignment": assignment, "inference": inference,
    "training": training, "nms": nms, "focal": focal, "gpu_inference": partial(inference, "cuda"),
    "gpu_training": partial(training, "cuda", 16, 800, 1333, steps=5), "gpu_profile": profile}
NEEDS = dict.fromkeys(("nms", "focal"), csrc.available) | dict.fromkeys(  # the others need nothing
    ("gpu_inference", "gpu_training", "gpu_profile"), torch.cuda.is_available)


def surroundings() -> str:
    """What a figure depends on."""
    cpu = torch.cpu.get_capabilities()
    fast = [name for name in ("avx512_bf16", "amx_bf16") if cpu.get(name)] or ["no bfloat16"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"{cpu.get('cpu_name', 'CPU')} ({torch.backends.cpu.get_cpu_capability()}, "
            f"{', '.join(fast)}), {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f};"
            f" {gpu}; torch {torch.__version__}, torchvision {torchvision.__version__}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="ROW",
                        default=list(MEASUREMENTS), help=", ".join(MEASUREMENTS))
    parser.add_argument("--json", metavar="OUT", help="file for every repetition")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True  # as train.py sets it; for both sides
    print(where := surroundings())
    print(LINE.format("\nrow: peer or limit", "", "ours", "peer", "ratio", "bar", "met"))
    for name in args.only:
        if name in NEEDS and not NEEDS[name]():
            report(name, note="no GPU here, or no CUDA kernels: see python -m csrc")
        else:
            MEASUREMENTS[name]()
    print(f"{time.monotonic() - STARTED:.0f} s in all")
    if args.json:
        Path(args.json).write_text(json.dumps({"surroundings": where, "rows": ROWS}, indent=1))


if __name__ == "__main__":
    run_program(main)
