"""evaluate.py: how good is a detector, and what does it see?

    python evaluate.py RUN                          COCO figures on the run's validation split
    python evaluate.py CHECKPOINT.pt --data DIR     the same, of one file, on other data
    python evaluate.py RUN --images a.jpg folder/   detections in your own images
    python evaluate.py RUN --tta                    test-time augmentation: 9 sizes, flipped or not
    torchrun --standalone --nproc-per-node 8 evaluate.py RUN      every image once, same figures

and in Python:

    detector = load_detector("runs/demo")
    for box, score, name in detector("street.jpg", threshold=0.3):
        print(name, score, box)

Figures are pycocotools'. "AP" is the average over the IoU thresholds 0.50, 0.55, .. 0.95; "AP50"
is at 0.5 alone.

Letters: N images of a batch, D detections of an image, I images of a split.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes

import csrc
import data
from assign import make_locations
from data import Annotations, CocoDataset, UserError
from model import (FCOS, Detections, atomic_write, build_model, candidates, fold_frozen_norms,
                   load_checkpoint, suppress, unpad)

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FIGURES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR 1", "AR 10", "AR 100",
           "AR small", "AR medium", "AR large")     # the order of COCOeval.stats
TTA_SCALES = tuple(n / 8 for n in range(4, 13))     # of the usual size: 400, 500, .. 1200 for 800
MAX_GRAPHS = 16                                     # CUDA graphs that a detector keeps
GRAPH_LOCK = threading.Lock()                       # one thread at a time uses a graph's buffers

# --- processes ----------------------------------------------------------------------------------

_store = None  # shared by the processes


def init_distributed() -> torch.device:
    """Join the processes that torchrun started, if it did. Returns this process's device."""
    global _store
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"process {device.index} has no GPU: this machine has "
                            f"{torch.cuda.device_count()}; start fewer processes (GPUS=...)")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        # One prefix per attempt, so restarted processes do not read addresses of dead ones.
        store, rank, world = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        _store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world,
                                timeout=timedelta(hours=1))  # while rank 0 evaluates
    return device


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(text, transient=False):
    """Print in rank 0. A transient line rewrites itself in a terminal, and is dropped in a file."""
    if rank_and_world()[0] == 0:
        with contextlib.suppress(OSError):  # a closed terminal or a full disk must not end a run
            if sys.stdout.isatty():
                print(f"\r{text}\x1b[K", end="" if transient else "\n", flush=True)
            elif not transient:
                print(text, flush=True)


def run_program(main):
    """Run a command-line program; a UserError ends it with one sentence, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a class name may not fit the terminal
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()  # a collective: after a failure it may hang
        return
    except (UserError, OSError) as error:
        sentence = f"error: {error}"
    except (MemoryError, RuntimeError) as error:  # a CPU's out of memory is a plain RuntimeError
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and \
                "DefaultCPUAllocator" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        sentence = (f"error: out of memory ({reason}); lower --microbatch in training, "
                    "--batch-size in evaluation, or the images' size")
    except KeyboardInterrupt:
        sys.exit(130)
    try:  # all processes usually fail with the same error: print it once
        first = _store is None or _store.add("failed", 1) == 1
    except RuntimeError:  # rank 0, which holds the store, has ended
        first = False
    sys.exit(sentence if first else 1)


# --- the detector -------------------------------------------------------------------------------

def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """What the network computes in. "auto": bfloat16 where the hardware has instructions for it."""
    cpu = torch.cpu.get_capabilities()
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
            else cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    dtypes["auto"] = dtypes["bf16" if fast else "fp32"]
    if precision not in dtypes:
        raise UserError(f"precision {precision!r}: must be auto, bf16 or fp32")
    return dtypes[precision]


@dataclass
class NamedDetections:
    """The objects in one image, best first. Iterating gives (box, score, name)."""
    boxes: Tensor     # (D, 4) xyxy in the image's own pixels
    scores: Tensor    # (D,)
    labels: Tensor    # (D,) index of the category
    names: list[str]  # D

    def __iter__(self):
        return zip(self.boxes.tolist(), self.scores.tolist(), self.names)

    def __len__(self):
        return len(self.names)


class Detector:
    """A trained model prepared for inference: frozen BatchNorms folded, weights cast. On a GPU, a
    small batch runs as a CUDA graph from the third time that its shape is seen."""

    def __init__(self, model: FCOS, categories: dict, device, precision: str = "auto"):
        self.config, self.categories = model.config, categories  # "ids" and "names", C each
        self.device = torch.empty(0, device=device).device  # with its index: threads differ in it
        dtype = dtype_of(precision, self.device)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        fold_frozen_norms(self.model)
        for part in (self.model.backbone, self.model.fpn, self.model.head):
            part.to(dtype)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.seen, self.graphs, self.pool = Counter(), {}, None
        if self.device.type == "cuda":
            csrc.available()  # build the kernels now, not during the first call

    def __getstate__(self):  # graphs cannot be pickled
        return self.__dict__ | {"seen": Counter(), "graphs": {}, "pool": None}

    def __call__(self, image, threshold: float = 0.0, tta: bool = False):
        """The objects with a score of at least `threshold` in an image, in its own pixels.

        `image`: a path (turned as its EXIF note says), PIL image, numpy array (H, W, 3) or tensor
        (3, H, W), RGB uint8, of any size; or a list of them, for a list of NamedDetections.
        """
        if isinstance(image, (list, tuple)):
            return [self(one, threshold, tta) for one in image]
        image = as_tensor(image)                                                   # (3, H, W)
        config, size = self.config, tuple(image.shape[1:])
        sizes = dict.fromkeys(
            data.resized(*size, config.short_side * s, config.long_side * s, config.enlarge)
            for s in (TTA_SCALES if tta else (1,)))
        found = []
        for h, w in sizes:
            for flip in (False, True) if tta else (False,):
                canvas = data.blank(1, *data.canvas_for([(h, w)]))                 # (1, 3, H', W')
                resized = transforms.resize(image, (h, w))
                canvas[0, :, :h, :w] = resized.flip(2) if flip else resized
                boxes, scores, labels = self.candidates(canvas, torch.tensor([(h, w)]))
                boxes = self.to_image(boxes, (h, w), size)
                found.append((data.mirror(boxes, size[1]) if flip else boxes, scores, labels))
        merged = suppress(*(torch.cat(x, dim=1) for x in zip(*found)), config)
        (d,) = unpad(*(x.cpu() for x in merged))
        keep = d.scores >= threshold
        labels = d.labels[keep]
        return NamedDetections(d.boxes[keep], d.scores[keep], labels,
                               [self.categories["names"][label] for label in labels])

    def detect_batch(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """Detections in pixels of the canvas, on the CPU. images (N, 3, H, W), sizes (N, 2)."""
        found = suppress(*self.candidates(images, sizes), self.config)
        return unpad(*(x.cpu() for x in found))

    def to_image(self, boxes: Tensor, size, original) -> Tensor:
        """Boxes (..., 4) in an image resized to `size`, in pixels of the `original` size."""
        (h, w), (height, width) = size, original
        boxes = boxes * boxes.new_tensor([width / w, height / h]).repeat(2)
        if self.config.inclusive_boxes:  # the last pixel belongs to the box
            edge = boxes.new_tensor([width, height])
            boxes = torch.cat([boxes[..., :2], torch.minimum(boxes[..., 2:] + 1, edge)], dim=-1)
        return boxes

    def candidates(self, images, sizes):
        """`model.candidates` of a batch, on the device; replayed from a CUDA graph if there is one.

        A graph saves a thousand kernel launches, which pays off for small batches. Capturing one
        costs as much as several calls, so wait until a shape is seen a third time.
        """
        shape, config = tuple(images.shape), self.config
        locations = make_locations(*shape[2:], offset=config.location_offset, device=self.device)

        def run(images, sizes):
            return candidates(self.model(images, sizes), locations, sizes, config)

        self.seen[shape] += 1
        if self.device.type != "cuda" or len(images) > 4 or self.seen[shape] < 3:
            return run(*(x.to(self.device, non_blocking=True) for x in (images, sizes)))
        with GRAPH_LOCK:
            if shape not in self.graphs:
                with torch.inference_mode(False):  # the buffers outlive a caller's inference mode
                    inputs = [torch.empty_like(x, device=self.device) for x in (images, sizes)]
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                # thread_local: a loader's thread may pin memory meanwhile
                with torch.cuda.graph(graph, self.pool, torch.cuda.Stream(self.device),
                                      capture_error_mode="thread_local"):
                    found = run(*inputs)
                self.graphs[shape] = graph, inputs, found, locations  # all must stay alive
            graph, inputs, found, _ = self.graphs[shape] = self.graphs.pop(shape)  # now the last
            if len(self.graphs) > MAX_GRAPHS:
                del self.graphs[next(iter(self.graphs))]  # the least recently used
            for x, new in zip(inputs, (images, sizes)):
                x.copy_(new, non_blocking=True)
            graph.replay()
            return tuple(x.clone() for x in found)  # the next replay writes there


def load_detector(path, device=None, precision: str = "auto") -> Detector:
    """The trained detector of a run folder or a checkpoint file, on the GPU if there is one.

    `precision`: "auto", "bf16" or "fp32", which on a GPU is TF32 in convolutions unless
    torch.backends.cudnn.allow_tf32 is False.
    """
    checkpoint = load_checkpoint(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Detector(build_model(checkpoint, path), checkpoint["categories"], device, precision)


def as_tensor(image) -> Tensor:
    """A path, PIL image, array (H, W, 3) or tensor (3, H, W) as a uint8 RGB tensor (3, H, W)."""
    if isinstance(image, (str, os.PathLike)):
        return data.load_image(image, apply_exif=True)
    if isinstance(image, Image.Image):
        return data.as_rgb(image)
    tensor = image
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if not isinstance(tensor, Tensor) or tensor.ndim != 3 or tensor.shape[0] != 3 or \
            tensor.dtype != torch.uint8 or not tensor.numel():
        got = f"{type(image).__name__} of {getattr(image, 'dtype', '?')}"
        raise UserError(f"image is a {got}, {getattr(image, 'shape', '?')}: must be a path, a "
                        "PIL image, an array (H, W, 3) or a tensor (3, H, W) of uint8 RGB")
    return tensor


# --- detection over a data set ------------------------------------------------------------------

def detect_all(detector: Detector, dataset: CocoDataset, batch_size=8, num_workers=0,
               tta=False) -> list[dict] | None:
    """Detections in every image of a split, in COCO's results format.

    Processes share the images; rank 0 gets the results, all others None.
    """
    rank, world = rank_and_world()
    config, annotations = detector.config, dataset.annotations
    requests = data.evaluation_batches(annotations.sizes, 1 if tta else batch_size,
                                       config.short_side, config.long_side, config.enlarge)
    requests = requests[rank::world]

    def detections():
        if tta:
            for (request,) in requests:
                yield request.index, detector(dataset.image(request.index), tta=True)
            return
        pin_memory = detector.device.type == "cuda"
        for batch in data.batches(dataset, requests, num_workers, pin_memory):
            found = detector.detect_batch(batch.images, batch.sizes)
            for index, size, d in zip(batch.indices, batch.sizes.tolist(), found):
                boxes = detector.to_image(d.boxes, size, annotations.sizes[index].tolist())
                yield index, d._replace(boxes=boxes)

    results, total, start = [], sum(map(len, requests)), time.monotonic()
    images = "images" if world == 1 else "images in this process"
    for done, (index, d) in enumerate(detections(), start=1):
        boxes = box_convert(d.boxes, "xyxy", "xywh").tolist()
        results += [{"image_id": int(annotations.image_ids[index]), "bbox": box, "score": score,
                     "category_id": annotations.category_ids[label]}
                    for box, score, label in zip(boxes, d.scores.tolist(), d.labels.tolist())]
        seconds = time.monotonic() - start
        print0(f"evaluating: {done} of {total} {images}, {seconds:.0f} s", transient=done < total)
    if world > 1:
        gathered = [None] * world
        dist.gather_object(results, gathered if rank == 0 else None)
        results = sum(gathered, []) if rank == 0 else None
    return results


# --- COCO figures -------------------------------------------------------------------------------

def coco_evaluation(annotations: Annotations, results: list[dict]):
    """pycocotools' COCOeval, evaluated. Annotations are numbered from 1: id 0 never matches.

    A faulty box becomes one that no detection matches; a NaN box would match them all.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    a = annotations
    boxes = torch.from_numpy(np.where(data.learnable(a)[:, None], a.boxes, -1.0))
    columns = {"image_id": a.image_ids[a.image], "category_id": np.array(a.category_ids)[a.labels],
               "bbox": box_convert(boxes, "xyxy", "xywh"), "area": a.areas,
               "iscrowd": a.crowd.astype(int)}
    rows = zip(*(column.tolist() for column in columns.values()))
    truth = COCO()
    truth.dataset = {
        "info": {}, "images": [{"id": i} for i in a.image_ids.tolist()],
        "categories": [{"id": i} for i in a.category_ids],
        "annotations": [dict(zip(columns, row), id=n) for n, row in enumerate(rows, start=1)]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth.createIndex()
        # loadRes refuses an empty list, and adds fields to what it gets
        found = truth.loadRes([dict(row) for row in results]) if results else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_metrics(annotations: Annotations, results: list[dict]) -> dict:
    """The 12 COCO figures, and AP, AP50 and counts of each class; -1 without ground truth."""
    a, evaluation = annotations, coco_evaluation(annotations, results)
    precision = evaluation.eval["precision"][..., 0, -1]  # (10 IoUs, 101 recalls, C)
    boxes = np.bincount(a.labels[~a.crowd], minlength=len(a.category_ids)).tolist()
    detections = Counter(row["category_id"] for row in results)
    classes = [{"name": name, "AP": float(precision[:, :, label].mean()),
                "AP50": float(precision[0, :, label].mean()), "boxes": boxes[label],
                "detections": detections[a.category_ids[label]]}
               for label, name in enumerate(a.category_names)]
    return {"figures": dict(zip(FIGURES, evaluation.stats.tolist())), "classes": classes}


def explain(metrics: dict) -> list[str]:
    """Why figures are -1 or 0, a sentence each."""
    figures, classes = metrics["figures"], metrics["classes"]
    boxes, detections = (sum(c[key] for c in classes) for key in ("boxes", "detections"))
    if boxes == 0:
        return ["every figure is -1: the split has no boxes to find (crowds aside)"]
    if detections == 0:
        return [f"every figure is 0: no detection scored above the threshold, against {boxes} true "
                "boxes; train longer, or start from pretrained weights"]
    sentences, reasons = [], {}
    if figures["AP"] < 0.01:
        sentences.append("the detector has learned too little: train longer, or start from "
                         "pretrained weights (--init-from, --backbone-weights)")
    for size, bounds in (("small", "smaller than 32 x 32"), ("medium", "of 32 x 32 to 96 x 96"),
                         ("large", "larger than 96 x 96")):
        if (AP := figures[f"AP {size}"]) <= 0:
            sentences.append(f"AP {size} is " + (
                f"-1: no true box is {bounds} pixels" if AP < 0 else
                f"0: no true box {bounds} pixels was found"))
    for c in classes:
        if c["AP"] <= 0:
            reason = ("-1, as the class has no true box" if c["AP"] < 0 else
                      "0, as the class was never detected" if not c["detections"] else
                      "0, as none of its detections matches a true box at IoU 0.5")
            reasons.setdefault(reason, []).append(c["name"])
    return sentences + [f"AP is {why}: {', '.join(names)}" for why, names in reasons.items()]


def print_metrics(metrics: dict, all_classes=False, shown=8):
    """The classes (at most the best and worst `shown`), what explains a zero, the figures."""
    figures, classes = metrics["figures"], metrics["classes"]
    if len(classes) > 2 * shown and not all_classes:
        print(f"\nthe best and worst {shown} of {len(classes)} classes; --all-classes shows all")
        by_AP = sorted((c for c in classes if c["AP"] >= 0), key=lambda c: -c["AP"])
        classes = by_AP[:shown] + by_AP[shown:][-shown:]
    width = max(map(len, ["class", *(c["name"] for c in classes)]))
    print(f"\n{'class':<{width}}     AP   AP50   boxes  detections")
    for c in classes:
        print(f"{c['name']:<{width}} {c['AP']:6.3f} {c['AP50']:6.3f} {c['boxes']:7d} "
              f"{c['detections']:11d}")
    print("", *explain(metrics), sep="\n")
    for start in (9, 6, 3, 0):
        print("   ".join(f"{name:<9} {figures[name]:6.3f}" for name in FIGURES[start:start + 3]))
    print(flush=True)


def check_categories(annotations: Annotations, ids: list[int], names: list[str], owner: str):
    """Refuse data whose categories are not those of `owner`."""
    here = set(zip(annotations.category_ids, annotations.category_names))
    there = set(zip(ids, names))
    if here != there:
        differ = ", ".join(f"{id} {name!r} is only {'here' if (id, name) in here else 'there'}"
                           for id, name in sorted(here ^ there)[:20])
        raise UserError(f"{annotations.path}: its categories are not those of {owner}: {differ}; "
                        "give both the same list of categories")


def evaluate(detector: Detector, dataset: CocoDataset, out: Path | None = None, all_classes=False,
             **options) -> dict | None:
    """Evaluate on a split; returns the metrics on rank 0. `options`: of `detect_all`.

    With a folder `out`, prints them and writes out/detections.png, and in out/eval results.json
    (COCO's results format) and metrics.json.
    """
    annotations = dataset.annotations
    check_categories(annotations, **detector.categories, owner="the detector")
    results = detect_all(detector, dataset, **options)
    if results is None:
        return None
    metrics = coco_metrics(annotations, results)
    if out:
        print_metrics(metrics, all_classes)
        metrics["split"] = [os.path.abspath(path) for path in (annotations.path, dataset.folder)]
        (out / "eval").mkdir(parents=True, exist_ok=True)
        for name, content in (("results", results), ("metrics", metrics)):
            text = json.dumps(content).encode()
            atomic_write(out / "eval" / f"{name}.json", lambda file: file.write(text))
        draw_grid(out / "detections.png", dataset, results)
        print(f"{out / 'detections.png'} shows some images, {out / 'eval'} has all figures")
    return metrics


# --- pictures -----------------------------------------------------------------------------------

def draw(image: Tensor, boxes, labels, texts, side, truth=()) -> Tensor:
    """An image (3, h, w) uint8, its long side resized to `side`, with boxes; `truth` in white."""
    h, w = image.shape[1:]
    scale = side / max(h, w)
    image = transforms.resize(image, (max(1, round(h * scale)), max(1, round(w * scale))))
    limit = torch.tensor([image.shape[2] - 1.0, image.shape[1] - 1.0]).repeat(2)

    def scaled(boxes):
        return torch.minimum((torch.as_tensor(boxes).float() * scale).clamp(min=0), limit)

    if len(truth):
        image = draw_bounding_boxes(image, scaled(truth), colors="white", width=1)
    if len(boxes):
        colors = [f"hsv({int(label) * 222.5 % 360:.0f}, 100%, 75%)" for label in labels]
        texts = [ascii(text)[1:-1] for text in texts]  # the font has no other letters
        image = draw_bounding_boxes(  # the best last, on top
            image, scaled(boxes).flip(0), texts[::-1], colors=colors[::-1], width=2,
            fill_labels=True, label_colors="white")
    return image


def draw_grid(path, dataset: CocoDataset, results: list[dict], threshold=0.3, count=12):
    """Write rows of evenly chosen images, their detections above `threshold`, truth in white."""
    a, tiles, height = dataset.annotations, [], 240
    for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int):
        rows = [row for row in results
                if row["image_id"] == a.image_ids[i] and row["score"] >= threshold]
        boxes = torch.tensor([row["bbox"] for row in rows]).view(-1, 4)
        labels = [a.category_ids.index(row["category_id"]) for row in rows]
        texts = [f"{a.category_names[k]} {row['score']:.2f}" for k, row in zip(labels, rows)]
        side = height * min(2, max(1, a.sizes[i, 1] / a.sizes[i, 0]))
        tile = draw(dataset.image(i), box_convert(boxes, "xywh", "xyxy"), labels, texts, side,
                    truth=dataset.targets(i)[0])
        tiles.append(transforms.pad(tile, [0, 0, 6, height + 6 - tile.shape[1]], fill=255))
    rows = [torch.cat(tiles[k:k + 4], dim=2) for k in range(0, len(tiles), 4)]
    width = max(row.shape[2] for row in rows)
    rows = [transforms.pad(row, [0, 0, width - row.shape[2], 0], fill=255) for row in rows]
    transforms.to_pil_image(torch.cat(rows, dim=1)).save(path)


# --- prediction ---------------------------------------------------------------------------------

def predict(detector: Detector, paths: list[Path], out: Path, threshold=0.3, tta=False) -> int:
    """Write a picture of each image file and detections.json, of all scores, to `out`.

    Files that cannot be read are reported and counted; the remaining files are still processed.
    """
    found, originals = [], {path.resolve() for path in paths}
    for n, path in enumerate(paths, start=1):
        picture = out / f"{n:03d}-{path.stem[:60]}.png"
        if picture.resolve() in originals:
            raise UserError(f"{path}: would be overwritten; name another folder with --out")
        try:
            image = as_tensor(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        d = detector(image, tta=tta)
        shown = int((d.scores >= threshold).sum())  # they are the first
        texts = [f"{name} {score:.2f}" for _, score, name in d][:shown]
        drawn = draw(image, d.boxes[:shown], d.labels[:shown], texts, max(640, *image.shape[1:]))
        transforms.to_pil_image(drawn).save(picture)
        boxes = box_convert(d.boxes, "xyxy", "xywh").tolist()
        found.append({
            "file": os.fsencode(path).decode(errors="backslashreplace"), "picture": picture.name,
            "width": image.shape[2], "height": image.shape[1], "detections": [
                {"bbox": [round(x, 2) for x in box], "score": round(score, 5), "category": name}
                for box, (_, score, name) in zip(boxes, d)]})
        best = ""
        if len(d) and not shown:
            best = f"; best score {d.scores[0]:.3f} ({d.names[0]}), below {threshold:g}"
        print(f"{path}: {shown} objects{best}", flush=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    atomic_write(out / "detections.json", lambda file: file.write(text.encode(errors="replace")))
    print(f"pictures and detections.json in {out}", flush=True)
    return len(paths) - len(found)


def image_files(paths) -> list[Path]:
    """The files named, and the image files in the folders named."""
    files = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_FILES)
        if not inside:
            raise UserError(f"{path}: no image file in this folder")
        files += inside
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", help="run folder (its newest checkpoint) or checkpoint file")
    parser.add_argument("--data", metavar="DIR", help="COCO-format folder (default: the run's)")
    parser.add_argument("--val-split", default="", metavar="NAME",
                        help="default: val2017, or the only val* split")
    parser.add_argument("--images", nargs="+", metavar="FILE",
                        help="image files or folders: draw what is detected instead of evaluating")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="SCORE",
                        help="draw detections with at least this final score (default: 0.3)")
    parser.add_argument("--out", metavar="DIR",
                        help="folder to write to (default: the run's; RUN/predictions for images)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="images at once on a device (default: 8)")
    parser.add_argument("--num-workers", type=int, default=2, metavar="N",
                        help="data loading processes; 0: none (default: 2)")
    parser.add_argument("--tta", action="store_true",
                        help="test-time augmentation: 9 sizes, flipped or not, merged by NMS")
    parser.add_argument("--all-classes", action="store_true", help="print every class")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="of the network; auto: bf16 where the hardware has it")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.num_workers < 0:
        parser.error("--batch-size must be at least 1, --num-workers at least 0")
    device = init_distributed()
    checkpoint = load_checkpoint(args.weights)
    detector = Detector(build_model(checkpoint, args.weights), checkpoint["categories"], device,
                        args.precision)
    run = Path(args.weights) if Path(args.weights).is_dir() else Path(args.weights).parent
    out = Path(args.out or (run / "predictions" if args.images else run))
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):  # known now, not after the evaluation
        raise UserError(f"{out}: cannot be written to; name another folder with --out")
    if args.images:
        if rank_and_world()[0] > 0:
            return
        paths = image_files(args.images)
        if unreadable := predict(detector, paths, out, args.threshold, args.tta):
            raise UserError(f"{unreadable} files could not be read, see above; all others were "
                            "processed")
        return
    trained = checkpoint["config"]
    root = args.data or trained.get("data")
    if not root:
        raise UserError(f"{args.weights}: does not say which data to evaluate on; name a COCO-"
                        "format folder with DATA=... (--data)")
    dataset = data.open_split(root, "val", args.val_split or trained.get("val_split", ""))
    print0(dataset.summary())
    evaluate(detector, dataset, out, args.all_classes, batch_size=args.batch_size,
             num_workers=args.num_workers, tta=args.tta)


if __name__ == "__main__":
    run_program(main)
