"""evaluate.py: how good is a detector, and what does it see?

    python evaluate.py RUN                            COCO figures on the validation split that RUN trained with
    python evaluate.py CHECKPOINT.pt --data DIR       the same, of one file, on other data with the same categories
    python evaluate.py RUN --images a.jpg folder/     detections on pictures of one's own
    python evaluate.py torchvision --data DIR         torchvision's published FCOS, through this code
    torchrun --nproc-per-node 8 evaluate.py RUN       shared out over GPUs: every image once, the same figures

A checkpoint carries its configuration and categories, so that nothing else is needed. Average precision is
pycocotools'. The average over IoU thresholds 0.50, 0.55, .. 0.95 is "AP"; AP50 demands an IoU of 0.5 alone.

Letters: K detections or boxes.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.io import write_png
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, make_grid

import data
from assign import make_locations
from data import Annotations, CocoDataset, DataError
from model import CHECKPOINT_FORMAT, FCOS, ConfigError, ModelConfig, detect, inference_copy, published_checkpoint

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
FIGURES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
           "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")  # the order of COCOeval.stats


class Results(NamedTuple):
    """Detections of many images."""
    image_ids: np.ndarray  # (K,)
    boxes: np.ndarray      # (K, 4) float32 xyxy pixels of the original image
    scores: np.ndarray     # (K,) float32
    labels: np.ndarray     # (K,) index in the detector's categories


# --- checkpoints ------------------------------------------------------------------------------------------------------

def checkpoints_of(run) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted(Path(run).glob("checkpoint-*.pt"), reverse=True)


def load_checkpoint(path) -> dict:
    """A checkpoint: from a file, the newest undamaged one of a run folder, or "torchvision", its published detector."""
    if str(path) == "torchvision":
        return published_checkpoint()
    candidates = checkpoints_of(path) if Path(path).is_dir() else [Path(path)]
    if not candidates:
        raise DataError(f"{path}: no checkpoint-*.pt here; train first, or name another run or file")
    for file in candidates:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise DataError(f"{file}: no such run folder or checkpoint") from None
        except Exception as error:  # whatever a damaged archive makes the unpickler raise
            print(f"{file}: damaged or not a checkpoint ({type(error).__name__}), passed over", file=sys.stderr, flush=True)
            continue
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
            raise DataError(f"{file}: not a checkpoint of this version of the code")
        return checkpoint
    raise DataError(f"{path}: no undamaged checkpoint")


def build_detector(checkpoint: dict) -> FCOS:
    """The model of a checkpoint, with its weights."""
    model = FCOS(ModelConfig(**checkpoint["config"]["model"]))
    model.load_state_dict(checkpoint["model"])
    return model


def join_process_group(device: torch.device):
    """Find the other processes that torchrun started, if it did."""
    if "RANK" in os.environ:
        # Under a key of its own: else a restarted process finds the addresses that its dead predecessors left.
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)


# --- detection over a data set ----------------------------------------------------------------------------------------

def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 (without instructions for it, a CPU is slower than in float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@torch.inference_mode()
def detect_all(model: FCOS, dataset: CocoDataset, device, batch_size=8, num_workers=0, precision="auto") -> Results | None:
    """Detections in every image of a data set; in a process group shared out, and returned to rank 0 alone."""
    config = model.config
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bf16 = precision == "bf16" or precision == "auto" and bf16_is_fast(device)
    model = inference_copy(model, torch.bfloat16 if bf16 else torch.float32).to(device)
    sizes = dataset.annotations.sizes
    batches = data.evaluation_batches(sizes, batch_size, config.short_side, config.long_side, config.enlarge)[rank::world]
    loader = data.make_loader(dataset, batches, num_workers, pin_memory=device.type == "cuda")
    found, start = [], time.time()
    for i, batch in enumerate(loader):
        on_device = batch.to(device)
        locations = make_locations(*batch.images.shape[2:], offset=config.location_offset, device=device)
        detections = detect(model(on_device.images, on_device.sizes), locations, on_device.sizes, config)
        for index, size, d in zip(batch.indices.tolist(), batch.sizes, detections):
            scale = torch.from_numpy(sizes[index]) / size                       # (2,): height, width
            boxes = d.boxes.cpu() * scale.flip(0).repeat(2).float()
            found.append(Results(np.full(len(boxes), dataset.annotations.image_ids[index]), boxes.numpy(),
                                 d.scores.cpu().numpy(), d.labels.cpu().numpy()))
        if rank == 0:
            show_progress(f"evaluating: {i + 1} of {len(batches)} batches", i + 1 == len(batches), start)
    results = Results(*(np.concatenate(part) for part in zip(*found))) if found else \
        Results(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    if world == 1:
        return results
    gathered = [None] * world if rank == 0 else None
    dist.gather_object(results, gathered)
    return Results(*(np.concatenate(part) for part in zip(*gathered))) if rank == 0 else None


def show_progress(text, last, start):
    """In a terminal a line that rewrites itself; in a file only the last."""
    text = f"{text}, {time.time() - start:.0f} s"
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


# --- COCO figures -----------------------------------------------------------------------------------------------------

def coco_metrics(annotations: Annotations, results: Results) -> dict:
    """The 12 COCO figures, and AP, AP50 and counts of each class. -1 stands where there is no ground truth."""
    a = annotations
    images = [{"id": i} for i in a.image_ids.tolist()]
    categories = [{"id": i} for i in a.category_ids]
    category_ids = np.array(a.category_ids)

    def index(image_ids, labels, boxes, areas, **more):
        """A pycocotools index. Annotations are numbered from 1 here: an id of 0 would never match."""
        rows = zip(image_ids.tolist(), category_ids[labels].tolist(), to_xywh(boxes).tolist(), areas.tolist(),
                   *(column.tolist() for column in more.values()))
        coco = COCO()
        coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": [
            dict(id=n, image_id=i, category_id=c, bbox=box, area=area, iscrowd=0) | dict(zip(more, extra))
            for n, (i, c, box, area, *extra) in enumerate(rows, start=1)]}
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval narrates
        truth = index(np.repeat(a.image_ids, np.diff(a.first)), a.labels, a.boxes, a.areas, iscrowd=a.crowd.astype(int))
        wh = results.boxes[:, 2:] - results.boxes[:, :2]
        found = index(results.image_ids, results.labels, results.boxes, wh.prod(axis=1), score=results.scores)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # (10 thresholds, 101 recalls, C); all areas, 100 detections
    classes = []
    for label, name in enumerate(a.category_names):
        of_class = precision[:, :, label]
        classes.append({"name": name, "AP": _mean(of_class), "AP50": _mean(of_class[0]),
                        "boxes": int((a.labels[~a.crowd] == label).sum()), "detections": int((results.labels == label).sum())})
    return {"figures": dict(zip(FIGURES, evaluation.stats.tolist())), "classes": classes}


def _mean(precision):
    return float(precision.mean()) if (precision > -1).all() else -1.0


def to_xywh(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def coco_results(results: Results, category_ids) -> list[dict]:
    """Detections in the COCO results format."""
    return [dict(image_id=int(i), category_id=category_ids[label], bbox=[round(x, 2) for x in box], score=round(score, 5))
            for i, label, box, score in zip(results.image_ids, results.labels, to_xywh(results.boxes).tolist(),
                                            results.scores.tolist())]


def explain(metrics: dict, annotations: Annotations, results: Results) -> list[str]:
    """Why a figure is -1 or 0: a sentence for each such figure."""
    a = annotations
    boxes = int((~a.crowd).sum())
    if boxes == 0:
        return [f"every figure is -1: {a.path} has no boxes (crowds aside) to find"]
    if len(results.scores) == 0:
        return [f"every figure is 0: not one detection scored above the threshold, against {boxes} true boxes; the detector has "
                "learned too little (train longer), or --score-threshold is too high"]
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
    return sentences + [f"AP is {reason}: {', '.join(c['name'] for c in classes)}" for reason, classes in by_reason.items() if classes]


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


def draw(image, boxes, labels, scores, names, truth=None, side=320):
    """An image (3, h, w) uint8, its long side enlarged or reduced to `side`, with its detections and true boxes (white)."""
    scale = side / max(image.shape[1:])
    height, width = (max(1, round(s * scale)) for s in image.shape[1:])
    image = transforms.resize(image, [height, width], antialias=True)

    def on_image(boxes):
        boxes = torch.as_tensor(boxes, dtype=torch.float32) * scale
        return torch.minimum(boxes.clamp(min=0), torch.tensor([width - 1.0, height - 1.0]).repeat(2))

    if truth is not None and len(truth):
        image = draw_bounding_boxes(image, on_image(truth), colors="white", width=1)
    if len(boxes):
        boxes, labels, scores = boxes[::-1].copy(), labels[::-1], scores[::-1]  # the best on top
        colours = [COLOURS[label % len(COLOURS)] for label in labels]
        text = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores)]
        image = draw_bounding_boxes(image, on_image(boxes), text, colors=colours, width=2, fill_labels=True,
                                    label_colors="white")
    return image


def confident(config: ModelConfig) -> float:
    """The score from which a detection is drawn: 0.3 for class * centerness."""
    return 0.3 ** 0.5 if config.sqrt_score else 0.3


def draw_grid(path, dataset: CocoDataset, results: Results, names, score, count=12, columns=4, side=320):
    """Write a grid of images, spread evenly over the data set, with detections above `score` and ground truth."""
    tiles = []
    for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int):
        mine = (results.image_ids == dataset.annotations.image_ids[i]) & (results.scores >= score)
        first, last = dataset.boxes.first[i:i + 2]
        picture = draw(dataset.image(i), results.boxes[mine], results.labels[mine].tolist(),
                       results.scores[mine].tolist(), names, truth=dataset.boxes.boxes[first:last], side=side)
        tile = torch.full((3, side, side), 255, dtype=torch.uint8)
        tile[:, :picture.shape[1], :picture.shape[2]] = picture
        tiles.append(tile)
    write_png(make_grid(tiles, nrow=columns, padding=6, pad_value=255), str(path))


# --- commands ---------------------------------------------------------------------------------------------------------

def evaluate(model: FCOS, dataset: CocoDataset, categories: dict, out, device, **options) -> dict | None:
    """Evaluate on a data set and write results.json, metrics.json and detections.png to `out`; on rank 0 returns the metrics."""
    annotations = dataset.annotations
    if (annotations.category_ids, annotations.category_names) != (categories["ids"], categories["names"]):
        raise DataError(f"{annotations.path}: its categories are not the detector's; there "
                        f"{dict(zip(annotations.category_ids, annotations.category_names))}, in the checkpoint "
                        f"{dict(zip(categories['ids'], categories['names']))}")
    results = detect_all(model, dataset, device, **options)
    if results is None:
        return None
    metrics = coco_metrics(annotations, results)
    print_metrics(metrics)
    for sentence in explain(metrics, annotations, results):
        print(sentence, flush=True)
    out = Path(out)
    (out / "eval").mkdir(parents=True, exist_ok=True)
    (out / "eval" / "results.json").write_text(json.dumps(coco_results(results, categories["ids"])))
    (out / "eval" / "metrics.json").write_text(json.dumps(metrics, indent=1))
    draw_grid(out / "detections.png", dataset, results, categories["names"], confident(model.config))
    print(f"pictures in {out / 'detections.png'}, figures and boxes in {out / 'eval'}", flush=True)
    return metrics


def predict(model: FCOS, paths: list[Path], names: list[str], out, device, precision="auto") -> list[dict]:
    """Detect objects in image files; writes a picture of each to `out`, and all boxes to `out`/detections.json."""
    config = model.config
    bf16 = precision == "bf16" or precision == "auto" and bf16_is_fast(device)
    model = inference_copy(model, torch.bfloat16 if bf16 else torch.float32).to(device)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for path in paths:
        image = data.load_image(path, apply_exif_orientation=True)                  # (3, h, w)
        size = data.resized(*image.shape[1:], config.short_side, config.long_side, config.enlarge)
        (request,) = data.requests([0], [False], [size], data.CANVAS_MULTIPLE)
        canvas = torch.zeros(1, 3, *request.canvas, dtype=torch.uint8)
        canvas[0, :, :size[0], :size[1]] = transforms.resize(image, list(size), antialias=True)
        sizes = torch.tensor([size], device=device)
        locations = make_locations(*request.canvas, offset=config.location_offset, device=device)
        with torch.inference_mode():
            (d,) = detect(model(canvas.to(device), sizes), locations, sizes, config)
        boxes = (d.boxes.cpu() * torch.tensor([image.shape[2] / size[1], image.shape[1] / size[0]]).repeat(2)).numpy()
        keep = d.scores.cpu().numpy() >= confident(config)
        boxes, scores, labels = boxes[keep], d.scores.cpu().numpy()[keep], d.labels.cpu().numpy()[keep]
        found.append({"file": str(path), "width": image.shape[2], "height": image.shape[1], "detections": [
            {"bbox": [round(x, 2) for x in box], "score": round(s, 5), "category": names[label]}
            for box, s, label in zip(to_xywh(boxes).tolist(), scores.tolist(), labels.tolist())]})
        picture = draw(image, boxes, labels.tolist(), scores.tolist(), names, side=max(image.shape[1:]))
        write_png(picture, str(out / f"{path.stem}.png"))
        print(f"{path}: {len(boxes)} objects", flush=True)
    (out / "detections.json").write_text(json.dumps(found, indent=1))
    print(f"pictures and detections.json in {out}", flush=True)
    return found


def image_files(paths) -> list[Path]:
    """The files named, and the image files of the folders named."""
    files = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_FILES) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise DataError(f"{path}: " + ("no image file in this folder" if path.is_dir() else "no such file or folder"))
        files += inside
    return files


def main():
    parser = argparse.ArgumentParser(description="COCO figures of a trained detector, or detections on images.")
    parser.add_argument("weights", help="folder of a run (its newest checkpoint), a checkpoint file, or torchvision")
    parser.add_argument("--data", help="COCO-format folder (default: the one that it was trained with)")
    parser.add_argument("--val-split", help="default: val2017, else the only val* split")
    parser.add_argument("--images", nargs="+", help="image files or folders: draw detections instead of evaluating")
    parser.add_argument("--out", help="folder to write to (default: the run's; RUN/predictions for images)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once on a device (default: 8)")
    parser.add_argument("--num-workers", type=int, default=2, help="data loading processes; 0: none (default: 2)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="of the network; auto: bf16 where the hardware has it (default: auto)")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    join_process_group(device)
    checkpoint = load_checkpoint(args.weights)
    model, categories = build_detector(checkpoint), checkpoint["categories"]
    run = Path(args.weights)
    if not run.is_dir():
        run = Path("runs/torchvision") if args.weights == "torchvision" else run.parent
    if args.images:
        predict(model, image_files(args.images), categories["names"], args.out or run / "predictions", device, args.precision)
    else:
        trained = checkpoint["config"]
        if not (args.data or trained["data"]):
            raise ConfigError(f"{args.weights} does not say which data to judge it on; name a COCO-format folder with DATA=... (--data)")
        dataset = data.open_split(args.data or trained["data"], run, "val", args.val_split or trained["val_split"])
        evaluate(model, dataset, categories, args.out or run, device, batch_size=args.batch_size,
                 num_workers=args.num_workers, precision=args.precision)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (DataError, ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
