"""evaluate.py: how good is a detector, and what does it see?

    python evaluate.py RUN                            COCO figures on the validation split that RUN trained with
    python evaluate.py CHECKPOINT.pt --data DIR       the same, of one file, on other data with the same categories
    python evaluate.py RUN --images a.jpg folder/     detections on pictures of one's own
    python evaluate.py RUN --tta                      with test-time augmentation: several sizes, mirrored or not, merged
    python evaluate.py torchvision --data DIR         torchvision's published FCOS, through this code
    torchrun --standalone --nproc-per-node 8 evaluate.py RUN    shared out: every image once, the same figures

A checkpoint carries its configuration and categories, so that nothing else is needed. Average precision is
pycocotools'. The average over IoU thresholds 0.50, 0.55, .. 0.95 is "AP"; AP50 demands an IoU of 0.5 alone.

Letters: K detections or boxes.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, make_grid

import data
from data import Annotations, CocoDataset, DataError
from model import ConfigError, Detections, Detector, ModelConfig, build_detector, cut, load_checkpoint, suppress

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FIGURES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
           "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")  # the order of COCOeval.stats
TTA_SCALES = tuple(n / 8 for n in range(4, 13))  # of the usual size: short sides of 400, 500, .. 1200 for one of 800


class Results(NamedTuple):
    """Detections of many images."""
    image_ids: np.ndarray  # (K,)
    boxes: np.ndarray      # (K, 4) float32 xyxy pixels of the original image
    scores: np.ndarray     # (K,) float32
    labels: np.ndarray     # (K,) index in the detector's categories


NOTHING = Results(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

# --- detection over a data set ----------------------------------------------------------------------------------------

def join_process_group() -> torch.device:
    """Find the other processes that torchrun started, if it did. Returns the device of this one."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # Under a key of its own: else a restarted process finds the addresses that its dead predecessors left.
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=1))  # the others wait while one process computes COCO figures
    return device


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def detect_all(detector: Detector, dataset: CocoDataset, batch_size=8, num_workers=0, tta=False) -> Results | None:
    """Detections in every image of a data set; in a process group shared out, and returned to rank 0 alone."""
    rank, world = rank_and_world()
    config, sizes, image_ids = detector.config, dataset.annotations.sizes, dataset.annotations.image_ids
    batch_size = 1 if tta else batch_size
    batches = data.evaluation_batches(sizes, batch_size, config.short_side, config.long_side, config.enlarge)[rank::world]

    def detections():
        """Of one image after another: its index, and the objects in its own pixels."""
        if tta:
            for request in itertools.chain(*batches):
                yield request.index, detect_in_image(detector, dataset.image(request.index), tta)
            return
        for batch in data.load(dataset, batches, num_workers, pin_memory=detector.device.type == "cuda"):
            for index, size, d in zip(batch.indices.tolist(), batch.sizes.tolist(), detector(batch.images, batch.sizes)):
                yield index, d._replace(boxes=d.boxes * ratio(sizes[index], size))

    found, share, start = [NOTHING], sum(map(len, batches)), time.time()
    for done, (index, d) in enumerate(detections(), start=1):
        found.append(Results(np.full(len(d.scores), image_ids[index]), *(x.numpy() for x in d)))
        if rank == 0:
            text = f"evaluating: {done} of {share} images{' of this process' * (world > 1)}, {time.time() - start:.0f} s"
            show_progress(text, last=done == share)
    results = Results(*(np.concatenate(part) for part in zip(*found)))
    if world == 1:
        return results
    gathered = [None] * world if rank == 0 else None
    dist.gather_object(results, gathered)
    return Results(*(np.concatenate(part) for part in zip(*gathered))) if rank == 0 else None


def detect_in_image(detector: Detector, image: Tensor, tta=False) -> Detections:
    """The objects in an image (3, h, w) uint8, in its pixels.

    With test-time augmentation, the candidates of all sizes, mirrored or not, go through one NMS together.
    """
    config, (h0, w0) = detector.config, image.shape[1:]
    sizes = [data.resized(h0, w0, config.short_side * scale, config.long_side * scale, config.enlarge)
             for scale in (TTA_SCALES if tta else (1,))]
    found = []
    for size in dict.fromkeys(sizes):
        for flip in (False, True) if tta else (False,):
            (request,) = data.requests([0], [flip], [size])
            canvas = data.blank(1, *request.canvas)
            data.place(image, request, canvas[0])
            boxes, scores, labels = detector.candidates(canvas, torch.tensor([size]))       # (1, K, 4), (1, K), (1, K)
            if flip:
                x0, y0, x1, y1 = boxes.unbind(-1)
                boxes = torch.stack([size[1] - x1, y0, size[1] - x0, y1], dim=-1)
            found.append((boxes * ratio((h0, w0), size).to(boxes.device), scores, labels))
    merged = suppress(*(torch.cat(part, dim=1) for part in zip(*found)), config)
    (detections,) = cut(*(x.cpu() for x in merged))
    return detections


def ratio(size, before) -> Tensor:
    """What takes boxes in an image resized to `before` to boxes in one of `size` (both height, width): (4,)."""
    return torch.tensor([size[1] / before[1], size[0] / before[0]]).repeat(2)


def show_progress(text, last):
    """In a terminal a line that rewrites itself; in a file only the last."""
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


# --- COCO figures -----------------------------------------------------------------------------------------------------

def coco_evaluation(annotations: Annotations, results: Results) -> COCOeval:
    """pycocotools' verdict on detections. Annotations are numbered from 1 here: an id of 0 would never match."""
    a, truth, found = annotations, COCO(), coco_results(results, annotations.category_ids)
    columns = (a.image_ids[a.image], np.array(a.category_ids)[a.labels], to_xywh(a.boxes), a.areas, a.crowd.astype(int))
    rows = zip(*(column.tolist() for column in columns))
    truth.dataset = {"info": {}, "images": [{"id": i} for i in a.image_ids.tolist()],
                     "categories": [{"id": i} for i in a.category_ids],
                     "annotations": [dict(id=n, image_id=image, category_id=category, bbox=box, area=area, iscrowd=crowd)
                                     for n, (image, category, box, area, crowd) in enumerate(rows, start=1)]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools narrates
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), "bbox")  # loadRes refuses an empty list
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_metrics(evaluation: COCOeval, annotations: Annotations, results: Results) -> dict:
    """The 12 COCO figures, and AP, AP50 and counts of each class. -1 stands where there is no ground truth."""
    a, classes = annotations, []
    precision = evaluation.eval["precision"][..., 0, -1]  # (10 thresholds, 101 recalls, C); all areas, 100 detections
    for label, name in enumerate(a.category_names):
        of_class = precision[:, :, label]
        classes.append({"name": name, "AP": float(of_class.mean()), "AP50": float(of_class[0].mean()),
                        "boxes": int((a.labels[~a.crowd] == label).sum()), "detections": int((results.labels == label).sum())})
    return {"figures": dict(zip(FIGURES, evaluation.stats.tolist())), "classes": classes}


def to_xywh(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def coco_results(results: Results, category_ids) -> list[dict]:
    """Detections in the COCO results format."""
    return [dict(image_id=i, category_id=category_ids[label], bbox=box, score=score)
            for i, label, box, score in zip(results.image_ids.tolist(), results.labels.tolist(), to_xywh(results.boxes).tolist(),
                                            results.scores.tolist())]


def explain(metrics: dict, annotations: Annotations, results: Results) -> list[str]:
    """Why a figure is -1 or 0: a sentence for each such figure."""
    boxes = (~annotations.crowd).sum()
    if boxes == 0:
        return []  # told before
    if len(results.scores) == 0:
        return [f"every figure is 0: not one detection scored above the threshold, against {boxes} true boxes; the detector has "
                "learned too little (train longer), or the score threshold in its configuration is too high"]
    sentences = []
    for size, bounds in (("small", "under 32 x 32"), ("medium", "of 32 x 32 to 96 x 96"), ("large", "over 96 x 96")):
        value = metrics["figures"][f"AP {size}"]
        if value == -1:
            sentences.append(f"AP {size} is -1: no true box is {bounds} pixels")
        elif value == 0:
            sentences.append(f"AP {size} is 0: no true box {bounds} pixels was found with its class and an IoU of 0.5")
    by_reason = {
        "-1 for classes without a true box": [c for c in metrics["classes"] if c["AP"] == -1],
        "0 for classes never detected": [c for c in metrics["classes"] if c["AP"] == 0 and not c["detections"]],
        "0 for classes whose detections all miss (IoU under 0.5, or another class's objects)":
            [c for c in metrics["classes"] if c["AP"] == 0 and c["detections"]],
    }
    return sentences + [f"AP is {reason}: {', '.join(c['name'] for c in classes)}"
                        for reason, classes in by_reason.items() if classes]


def print_metrics(metrics):
    for name, value in metrics["figures"].items():
        print(f"  {name:<10} {value:6.3f}")
    width = max(len(c["name"]) for c in metrics["classes"])
    print(f"\n  {'class':<{width}}     AP   AP50   boxes  detections")
    for c in metrics["classes"]:
        print(f"  {c['name']:<{width}} {c['AP']:6.3f} {c['AP50']:6.3f} {c['boxes']:7d} {c['detections']:11d}")
    print(flush=True)


# --- pictures ---------------------------------------------------------------------------------------------------------

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#800000", "#808000")


def draw(image, boxes, labels, scores, names, side, truth=()):
    """An image (3, h, w) uint8, its long side enlarged or reduced to `side`, with its detections and true boxes (white)."""
    scale = side / max(image.shape[1:])
    height, width = (max(1, round(s * scale)) for s in image.shape[1:])
    image = transforms.resize(image, [height, width], antialias=True)

    def on_image(boxes):
        boxes = torch.as_tensor(boxes, dtype=torch.float32) * scale
        return torch.minimum(boxes.clamp(min=0), torch.tensor([width - 1.0, height - 1.0]).repeat(2))

    if len(truth):
        image = draw_bounding_boxes(image, on_image(truth), colors="white", width=1)
    if len(boxes):
        boxes, labels, scores = boxes[::-1].copy(), labels[::-1], scores[::-1]  # the best on top
        texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores)]
        image = data.draw_boxes(image, on_image(boxes), labels, texts)
    return image


def confident(config: ModelConfig) -> float:
    """The score from which a detection is drawn: 0.3 for class * centerness."""
    return 0.3 ** 0.5 if config.sqrt_score else 0.3


def draw_grid(path, dataset: CocoDataset, results: Results, names, score, indices, captions=()):
    """Write a grid of images with their detections above `score`, their true boxes (white), and a caption each."""
    tiles, font, side = [], ImageFont.load_default(15), 320
    for n, i in enumerate(indices):
        mine = (results.image_ids == dataset.annotations.image_ids[i]) & (results.scores >= score)
        first, last = dataset.boxes.first[i:i + 2]
        picture = draw(dataset.image(i), results.boxes[mine], results.labels[mine].tolist(),
                       results.scores[mine].tolist(), names, side, truth=dataset.boxes.boxes[first:last])
        tile = Image.new("RGB", (side, side + 22 * bool(captions)), "white")
        tile.paste(transforms.to_pil_image(picture))
        if captions:
            ImageDraw.Draw(tile).text((2, picture.shape[1] + 2), captions[n], fill="black", font=font)
        tiles.append(transforms.pil_to_tensor(tile))
    transforms.to_pil_image(make_grid(tiles, nrow=4, padding=6, pad_value=255)).save(path)


def draw_verdicts(out: Path, evaluation: COCOeval, dataset: CocoDataset, results: Results, names, score, count=8):
    """Write best.png, worst.png and wrong.png: the images that went best, worst, and with the most confident error.

    A detection scored `score` or more is right if it overlaps an object of its class by an IoU of 0.5 (pycocotools'
    matching). Best and worst go by F1 = 2 right / (2 right + wrong + missed).
    """
    place = {image_id: i for i, image_id in enumerate(dataset.annotations.image_ids.tolist())}
    right, wrong, missed, top = np.zeros((4, len(place)))               # (I,); top: highest score of a wrong one
    for e in evaluation.evalImgs:                                       # of one class in one image
        if e is None or e["aRng"] != evaluation.params.areaRng[0]:      # the first is: all areas
            continue
        i, scores, matched = place[e["image_id"]], np.array(e["dtScores"]), e["dtMatches"][0] > 0       # at IoU 0.5
        judged = ~e["dtIgnore"][0].astype(bool) & (scores >= score)
        hits = (judged & matched).sum()
        right[i] += hits
        missed[i] += (np.array(e["gtIgnore"]) == 0).sum() - hits
        wrong[i] += (judged & ~matched).sum()
        top[i] = max([top[i], *scores[judged & ~matched]])
    f1 = 2 * right / np.maximum(1, 2 * right + wrong + missed)
    eventful = np.flatnonzero(right + wrong + missed)                   # an empty image without detections is neither
    orders = {"best": np.lexsort((-right, -f1)), "worst": np.lexsort((-wrong - missed, f1)), "wrong": np.argsort(-top)}
    for name, order in orders.items():
        chosen = [i for i in order[np.isin(order, eventful)] if name != "wrong" or top[i] > 0][:count]
        if chosen:
            captions = [f"{right[i]:.0f} right, {wrong[i]:.0f} wrong, {missed[i]:.0f} missed" +
                        f"; wrong at {top[i]:.2f}" * (name == "wrong") for i in chosen]
            draw_grid(out / f"{name}.png", dataset, results, names, score, chosen, captions)


def draw_precision_recall(path, evaluation: COCOeval, metrics: dict):
    """Write a picture of precision against recall: the mean over classes at several IoUs, and each class at 0.5."""
    precision = evaluation.eval["precision"][..., 0, -1]                # (10 thresholds, 101 recalls, C)
    recall, classes = evaluation.params.recThrs, metrics["classes"]
    known = sorted((k for k, c in enumerate(classes) if c["AP"] > -1), key=lambda k: -classes[k]["AP50"])
    if not known:
        return
    by_iou = {f"IoU {evaluation.params.iouThrs[t]:.2f}": (recall, precision[t][:, known].mean(axis=1)) for t in (0, 2, 4, 6, 8)}
    shown = known if len(known) <= 10 else known[:5] + known[-5:]
    by_class = {f"{classes[k]['name'][:14]} {classes[k]['AP50']:.2f}": (recall, precision[0, :, k]) for k in shown}
    draw_curves(path, [("precision against recall, mean over classes", "recall", by_iou),
                       ("IoU 0.5, by class" + ": best and worst 5" * (len(known) > 10), "recall", by_class)])


def draw_curves(path, panels):
    """Write line charts side by side. `panels`: (title, name of x, {name of a curve: (x values, y values)})."""
    width, height, big = 600, 340, 2  # drawn twice as large and reduced: smooth lines
    picture = Image.new("RGB", (big * width * len(panels), big * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13 * big)
    for n, (title, x_name, curves) in enumerate(panels):
        left, top, right, bottom = (big * v for v in (n * width + 50, 32, (n + 1) * width - 150, height - 45))
        x_ticks, y_ticks = (ticks(np.concatenate([curve[axis] for curve in curves.values()])) for axis in (0, 1))

        def on_picture(x, y):
            return (left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left),
                    bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top))

        for tick in x_ticks:
            x, _ = on_picture(tick, y_ticks[0])
            draw.line([(x, top), (x, bottom)], fill="#dddddd", width=big)
            draw.text((x, bottom + 6 * big), f"{tick:g}", fill="black", font=font, anchor="mt")
        for tick in y_ticks:
            _, y = on_picture(x_ticks[0], tick)
            draw.line([(left, y), (right, y)], fill="#dddddd", width=big)
            draw.text((left - 6 * big, y), f"{tick:g}", fill="black", font=font, anchor="rm")
        draw.text((left, 10 * big), title, fill="black", font=font)
        draw.text(((left + right) / 2, bottom + 24 * big), x_name, fill="black", font=font, anchor="mt")
        for k, (name, (x, y)) in enumerate(curves.items()):
            colour = COLOURS[k % len(COLOURS)]
            points = [on_picture(*point) for point in zip(x, y)]
            draw.line(points, fill=colour, width=2 * big, joint="curve")
            draw.circle(points[-1], 3 * big, fill=colour)
            draw.text((right + 10 * big, top + 18 * big * k), name, fill=colour, font=font)
    picture.reduce(big).save(path)


def ticks(values) -> np.ndarray:
    """Round numbers, 4 to 11 of them, that enclose the values."""
    low, high = np.min(values), np.max(values)
    high = high if high > low else low + 1
    step = 10 ** np.floor(np.log10(high - low))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2) if (high - low) / (step * part) <= 8)
    return np.arange(np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6) + 1) * step


# --- commands ---------------------------------------------------------------------------------------------------------

def check_categories(annotations: Annotations, ids: list[int], names: list[str]):
    """Refuse data whose categories are not the detector's."""
    theirs, ours = dict(zip(annotations.category_ids, annotations.category_names)), dict(zip(ids, names))
    if theirs != ours:
        raise DataError(f"{annotations.path}: its categories are not the detector's; there {theirs}, the detector knows {ours}; "
                        "name the data that it was trained for, or give both the same categories")


def evaluate(detector: Detector, dataset: CocoDataset, categories: dict, out=None, **options) -> dict | None:
    """Evaluate on a data set; on rank 0 returns the metrics.

    With a folder `out`, prints them and writes `out`/detections.png and, in `out`/eval, results.json (COCO's results
    format), metrics.json, precision_recall.png and the grids of `draw_verdicts`.
    """
    annotations, names = dataset.annotations, categories["names"]
    check_categories(annotations, **categories)
    if out and annotations.crowd.all() and rank_and_world()[0] == 0:
        print(f"every figure will be -1: {annotations.path} has no boxes (crowds aside) to find", flush=True)
    results = detect_all(detector, dataset, **options)
    if results is None:
        return None
    evaluation = coco_evaluation(annotations, results)
    metrics = coco_metrics(evaluation, annotations, results)
    if out is None:
        return metrics
    out, ids = Path(out), annotations.annotation_ids
    if len(np.unique(ids)) < len(ids) or (ids < 1).any():
        print(f"{annotations.path}: some annotation ids are missing, below 1, or there twice; numbered anew for this evaluation")
    print_metrics(metrics)
    for sentence in explain(metrics, annotations, results):
        print(sentence, flush=True)
    (out / "eval").mkdir(parents=True, exist_ok=True)
    for name in ("best", "worst", "wrong", "precision_recall"):  # an older one would stay where none is drawn
        (out / "eval" / f"{name}.png").unlink(missing_ok=True)
    (out / "eval" / "results.json").write_text(json.dumps(coco_results(results, categories["ids"])))
    (out / "eval" / "metrics.json").write_text(json.dumps(metrics, indent=1))
    draw_precision_recall(out / "eval" / "precision_recall.png", evaluation, metrics)
    score = confident(detector.config)
    draw_verdicts(out / "eval", evaluation, dataset, results, names, score)
    spread = np.linspace(0, len(dataset) - 1, min(12, len(dataset))).round().astype(int)
    draw_grid(out / "detections.png", dataset, results, names, score, spread)
    print(f"pictures in {out / 'detections.png'} and {out / 'eval'}, boxes and figures in {out / 'eval'}", flush=True)
    return metrics


def predict(detector: Detector, paths: list[Path], names: list[str], out, tta=False) -> list[Path]:
    """Detect objects in image files; writes a picture of each to `out`, and all boxes to `out`/detections.json.

    Files that cannot be read are reported and returned; the others are done all the same.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found, unreadable, used = [], [], set()
    for path in paths:
        try:
            image = data.load_image(path, apply_exif_orientation=True)                  # (3, h, w)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            unreadable.append(path)
            continue
        boxes, scores, labels = (x.numpy() for x in detect_in_image(detector, image, tta))
        keep = scores >= confident(detector.config)
        boxes, scores, labels = boxes[keep], scores[keep].tolist(), labels[keep].tolist()
        picture, n = f"{path.stem}.png", 1
        while picture in used:
            n += 1
            picture = f"{path.stem}-{n}.png"
        used.add(picture)
        found.append({"file": str(path), "picture": picture, "width": image.shape[2], "height": image.shape[1], "detections": [
            {"bbox": [round(x, 2) for x in box], "score": round(score, 5), "category": names[label]}
            for box, score, label in zip(to_xywh(boxes).tolist(), scores, labels)]})
        transforms.to_pil_image(draw(image, boxes, labels, scores, names, max(image.shape[1:]))).save(out / picture)
        print(f"{path}: {len(boxes)} objects", flush=True)
    (out / "detections.json").write_text(json.dumps(found, indent=1))
    print(f"pictures and detections.json in {out}", flush=True)
    return unreadable


def image_files(paths) -> list[Path]:
    """The files named, and the image files of the folders named."""
    files = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_FILES) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path}: no image file in this folder")
        files += inside
    return files


def main():
    parser = argparse.ArgumentParser(description="COCO figures of a trained detector, or detections on images.")
    parser.add_argument("weights", help="folder of a run (its newest checkpoint), a checkpoint file, or torchvision")
    parser.add_argument("--data", help="COCO-format folder (default: the one that it was trained with)")
    parser.add_argument("--val-split", default="", help="default: val2017, else the only val* split")
    parser.add_argument("--images", nargs="+", help="image files or folders: draw detections instead of evaluating")
    parser.add_argument("--out", help="folder to write to (default: the run's; RUN/predictions for images)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once on a device (default: 8)")
    parser.add_argument("--num-workers", type=int, default=2, help="data loading processes; 0: none (default: 2)")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation: sizes of 1/2 to 3/2, mirrored or not, merged")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="of the network; auto: bf16 where the hardware has it (default: auto)")
    args = parser.parse_args()
    if args.batch_size < 1 or args.num_workers < 0:
        parser.error("--batch-size must be >= 1, and --num-workers >= 0")
    device = join_process_group()
    checkpoint = load_checkpoint(args.weights)
    detector, categories = Detector(build_detector(checkpoint), device, args.precision), checkpoint["categories"]
    run = Path(args.weights)
    if not run.is_dir():
        run = Path("runs/torchvision") if args.weights == "torchvision" else run.parent
    out = data.make_folder(args.out or (run / "predictions" if args.images else run), "--out")
    if args.images:
        unreadable = predict(detector, image_files(args.images), categories["names"], out, args.tta)
        if unreadable:
            raise DataError(f"{len(unreadable)} of the files cannot be read, see above; the others are done")
    else:
        trained = checkpoint["config"]
        if not (args.data or trained["data"]):
            raise ConfigError(f"{args.weights} does not say which data to judge it on; name a COCO-format folder with DATA=... (--data)")
        dataset = data.open_split(args.data or trained["data"], run, "val", args.val_split or trained["val_split"])
        evaluate(detector, dataset, categories, out, batch_size=args.batch_size, num_workers=args.num_workers, tta=args.tta)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (DataError, ConfigError, OSError) as error:
        sys.exit(data.sentence(error))
