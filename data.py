"""data.py: what does the detector learn from?  COCO-format data, from the files to batches.

    DIR/annotations/instances_<split>.json    images, annotations, categories
    DIR/<split>/ or DIR/images/<split>/       the image files

 1. *Read* the JSON into flat arrays, which worker processes share. An entry that is not COCO
    format is a `UserError`; a box that cannot be learned is left out and counted.
 2. *Sample*: what a step sees is a pure function of (seed, step): which images, at which size,
    flipped or not. So a resumed run goes on exactly as it would have, and any number of
    processes sees the same global batches.
 3. *Load*: decode, resize as uint8 with antialiasing, flip, pad. The model converts to float.

`tools/check_data.py` says more about a data set than the reader, and can repair it.

Letters: I images and A annotations of a split, N images of a batch, G boxes of an image, B boxes of
a split or a batch, C classes.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import traceback
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

PADDED_TO = 32        # pixels; both sides of a batch are multiples of C5's stride
LOADER_TIMEOUT = 120  # seconds that a batch may take to load


class UserError(ValueError):
    """An error the user can fix, in one sentence: what is wrong, where, and what to do."""


# --- 1. reading ---------------------------------------------------------------------------------

class Annotations(NamedTuple):
    """A split as flat arrays; annotations are sorted by image."""
    path: str                   # of the JSON file
    image_ids: np.ndarray       # (I,) int64
    file_names: np.ndarray      # (I,) str
    sizes: np.ndarray           # (I, 2) int64: height, width
    image: np.ndarray           # (A,) int64: index of the annotation's image
    boxes: np.ndarray           # (A, 4) float64 xyxy pixels, as written
    labels: np.ndarray          # (A,) int64 in [0, C): index of the category
    areas: np.ndarray           # (A,) float64 pixels squared, of the mask where the file has one
    crowd: np.ndarray           # (A,) bool: a box around a crowd of objects
    category_ids: list[int]     # C, sorted
    category_names: list[str]   # C


def find_split(root, kind: str, split: str = "") -> tuple[Path, Path]:
    """The JSON file and the image folder of a split.

    `kind` is "train" or "val"; unless `split` names one, it is train2017 / val2017, or else the
    only split whose name begins with `kind`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; name the data with DATA=... (--data)")
    splits = sorted(path.stem.removeprefix("instances_")
                    for path in root.glob("annotations/instances_*.json"))
    if not splits:
        raise UserError(f"{root}: no annotations/instances_<split>.json, so not a COCO-format data "
                        "set; tools/to_coco.py converts YOLO and VOC folders")
    name = split or f"{kind}2017"
    found = [name] if name in splits else [s for s in splits if s.startswith(kind) and not split]
    if len(found) != 1:
        raise UserError(f"{root}/annotations: {len(found) or 'no'} splits match {split or kind!r} "
                        f"among {', '.join(splits)}; name one with --{kind}-split")
    for images in (root / found[0], root / "images" / found[0]):
        if images.is_dir():
            return root / "annotations" / f"instances_{found[0]}.json", images
    raise UserError(f"{root}: no image folder {found[0]}/ or images/{found[0]}/; put the image "
                    "files into one of them")


def _is_int(v):
    return type(v) in (int, float) and v % 1 == 0 and abs(v) < 2**53


def _is_name(v):
    return type(v) is str and 0 < len(v) < 500 and not re.search("[\0-\x1f\x7f\ud800-\udfff]", v)


INTEGER = (_is_int, "an integer")
PIXELS = (lambda v: _is_int(v) and 0 < v <= 10**6, "a number of pixels")
FIELDS = {  # what the reader needs of COCO format: table -> field -> (test, expected)
    "categories": {"id": INTEGER, "name": (_is_name, "a non-empty string")},
    "images": {
        "id": INTEGER,
        "file_name": (lambda v: _is_name(v) and not os.path.isabs(v) and ".." not in Path(v).parts,
                      "a path inside the image folder"),
        "height": PIXELS,
        "width": PIXELS},
    "annotations": {
        "image_id": INTEGER,
        "category_id": INTEGER,
        "bbox": (lambda v: type(v) is list and len(v) == 4
                 and all(type(x) is float or _is_int(x) for x in v),
                 "four numbers [x, y, width, height]"),
        "iscrowd": (lambda v: v in (0, 1, None), "0 or 1")},  # None: missing
}


def read_json(path) -> dict:
    """The three tables of a COCO-format file, without polygons, most of such a file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=lambda pairs: {
                key: value for key, value in pairs if key != "segmentation"})
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"{path}: cannot be read as JSON ({error}); is it complete?") from None
    for table in FIELDS:
        entries = content.get(table) if type(content) is dict else None
        if type(entries) is not list or not all(type(entry) is dict for entry in entries):
            raise UserError(f"{path}: has no list of {table}; export it as COCO object detection")
    return content


@np.errstate(over="ignore", invalid="ignore")  # of boxes that are not finite
def read_annotations(path, content: dict | None = None) -> Annotations:
    """Read a COCO-format file, or its content. The first entry that is not COCO is a UserError."""
    content = content or read_json(path)

    def refuse(table, i, what):
        raise UserError(f"{path}: {table}[{i}] (id {content[table][i].get('id')!r:.30}) {what}; "
                        "make check DATA=... lists everything that is wrong")

    columns = {}
    for table, tests in FIELDS.items():
        for key, (valid, expected) in tests.items():
            columns[table, key] = [entry.get(key) for entry in content[table]]
            for i, value in enumerate(columns[table, key]):
                if not valid(value):
                    refuse(table, i, f"has {key} {value!r:.80} instead of {expected}")
    index = {"categories": {}, "images": {}}  # id -> position in the table
    for table, positions in index.items():
        for i, id in enumerate(columns[table, "id"]):
            if positions.setdefault(id, i) != i:
                refuse(table, i, "has the id of another; ids must be unique")
        if not positions:
            raise UserError(f"{path}: its list of {table} is empty; export it again")
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        for i, id in enumerate(columns["annotations", key]):
            if id not in index[table]:
                refuse("annotations", i, f"has {key} {id}, which is not among the {table}")

    xywh = np.array(columns["annotations", "bbox"], np.float64).reshape(-1, 4)
    tiny = (np.abs(xywh) <= 1).all(axis=1) & xywh.any(axis=1)  # not plausible in pixels
    if tiny.sum() > len(xywh) / 2:
        i = tiny.argmax()
        refuse("annotations", i, f"has bbox {content['annotations'][i]['bbox']}, normalised like "
               "most here; multiply by the image's width and height")
    of_boxes = np.nan_to_num(xywh[:, 2:].clip(0).prod(axis=1)).clip(0, 1e10).tolist()
    given = [entry.get("area") for entry in content["annotations"]]
    areas = [area if type(area) in (int, float) and 0 <= area <= 1e10 else of_box
             for area, of_box in zip(given, of_boxes)]
    ids, names = zip(*sorted(zip(columns["categories", "id"], columns["categories", "name"])))
    image = np.array([index["images"][id] for id in columns["annotations", "image_id"]], np.int64)
    order = image.argsort(kind="stable")
    return Annotations(
        path=str(path), image_ids=np.array(columns["images", "id"], np.int64),
        file_names=np.array(columns["images", "file_name"]),
        sizes=np.array([columns["images", "height"], columns["images", "width"]], np.int64).T,
        image=image[order],
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)[order],
        labels=np.searchsorted(ids, columns["annotations", "category_id"])[order],
        areas=np.array(areas, np.float64)[order],
        crowd=np.array(columns["annotations", "iscrowd"], bool)[order],
        category_ids=[int(id) for id in ids], category_names=list(names))


def clip(annotations: Annotations) -> np.ndarray:
    """The boxes inside their images, (A, 4) float32."""
    edges = annotations.sizes[annotations.image][:, [1, 0, 1, 0]]
    return annotations.boxes.clip(0, edges).astype(np.float32)


@np.errstate(invalid="ignore")
def learnable(annotations: Annotations) -> np.ndarray:
    """Which boxes can be learned, (A,) bool: finite, with an area inside their image."""
    clipped = clip(annotations)
    has_area = (clipped[:, 2:] - clipped[:, :2] >= 1e-3).all(axis=1)
    return np.isfinite(annotations.boxes).all(axis=1) & has_area


# --- 2. sampling --------------------------------------------------------------------------------

class Request(NamedTuple):
    """What to load for one image of a batch."""
    index: int                # of the image in its split
    flip: bool
    size: tuple[int, int]     # height, width after resizing
    canvas: tuple[int, int]   # height, width of the batch
    seed: tuple | None = None  # of random augmentations; None: not in training


def resized(height, width, short_side, long_side, enlarge=True) -> tuple[int, int]:
    """The size with a short side of `short_side`; smaller where the long side would exceed
    `long_side`, or, without `enlarge`, where the image is smaller."""
    scale = min(short_side / min(height, width), long_side / max(height, width),
                math.inf if enlarge else 1.0)
    return max(1, round(height * scale)), max(1, round(width * scale))


def padded(pixels) -> int:
    """Round a length up to a multiple of PADDED_TO."""
    return math.ceil(pixels / PADDED_TO) * PADDED_TO


def canvas_for(sizes, sides=()) -> tuple[int, int]:
    """The canvas that holds images of these sizes. `sides`: lengths to prefer, ascending."""
    return tuple(next((side for side in sides if side >= pixels), padded(pixels))
                 for pixels in map(max, zip(*sizes)))


class TrainSampler:
    """What a training step sees: a pure function of (seed, step), the same in every process.

    An epoch is a random permutation of the images, sorted into tall and wide so that batches need
    little padding, and cut into batches, which are shuffled. Images drawn at random fill the last.

    Args:
        sizes: (I, 2) heights and widths of the split.
        images: indices of the images to train on.
        config: `train.TrainConfig`.
    """

    def __init__(self, sizes: np.ndarray, images: np.ndarray, config):
        self.sizes, self.images, self.config = sizes, images, config
        self.batch_size, self.seed = config.batch_size, config.seed
        self.batches_per_epoch = math.ceil(len(images) / self.batch_size)
        largest = [self.resized(size, config.train_short_sides[1])
                   for size in np.unique(sizes, axis=0)]
        ends = max(map(max, largest)), max(map(min, largest))
        self.sides = sorted({padded(p) for p in np.linspace(*ends, config.canvas_sides, dtype=int)})

    def resized(self, size: np.ndarray, short_side) -> tuple[int, int]:
        """An image's size (2,) in a step that draws this short side."""
        model = self.config.model
        return resized(*size.tolist(), int(short_side), model.long_side, model.enlarge)

    def global_batch(self, step: int) -> list[Request]:
        """The `batch_size` images of one step."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        indices = self.batches_of(epoch)[batch].tolist()
        random = np.random.default_rng((self.seed, 1, step))
        flips = random.random(self.batch_size) < self.config.flip
        short_sides = random.integers(*self.config.train_short_sides, self.batch_size,
                                      endpoint=True)
        sizes = [self.resized(self.sizes[i], short) for i, short in zip(indices, short_sides)]
        canvas = canvas_for(sizes, self.sides)
        return [Request(i, bool(flip), size, canvas, (self.seed, 2, step, n))
                for n, (i, flip, size) in enumerate(zip(indices, flips, sizes))]

    @lru_cache(maxsize=1)
    def batches_of(self, epoch) -> np.ndarray:
        """The images of an epoch, (batches_per_epoch, batch_size)."""
        random = np.random.default_rng((self.seed, 0, epoch))
        order = random.permutation(self.images)
        is_wide = self.sizes[order, 1] >= self.sizes[order, 0]
        order = order[np.argsort(is_wide, kind="stable")]
        shuffled = random.permutation(self.batches_per_epoch)
        missing = self.batches_per_epoch * self.batch_size - len(order)
        order = np.concatenate([order, np.resize(random.permutation(self.images), missing)])
        return order.reshape(-1, self.batch_size)[shuffled]


def microbatches(sampler: TrainSampler, steps: range, count: int, rank: int, world: int):
    """What one process loads: its part of every global batch, cut into `count` microbatches."""
    size = sampler.batch_size // (count * world)
    for step in steps:
        batch = sampler.global_batch(step)
        for m in range(count):
            first = (m * world + rank) * size
            yield batch[first:first + size]


def evaluation_batches(sizes, batch_size, short_side, long_side, enlarge) -> list[list[Request]]:
    """Every image once, in batches of images with equal canvases.

    GroupNorm averages over the padding, too: on a canvas of its own, what is found in an image
    depends neither on its neighbours nor on the batch size.
    """
    by_canvas = {}
    for i, (height, width) in enumerate(sizes.tolist()):
        size = resized(height, width, short_side, long_side, enlarge)
        canvas = canvas_for([size])
        by_canvas.setdefault(canvas, []).append(Request(i, False, size, canvas))
    return [requests[k:k + batch_size] for _, requests in sorted(by_canvas.items())
            for k in range(0, len(requests), batch_size)]


# --- 3. loading ---------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Images on one canvas and their boxes."""
    images: Tensor      # (N, 3, H, W) uint8 RGB, 0 in the padding
    sizes: Tensor       # (N, 2) int64: height, width without the padding
    boxes: Tensor       # (B, 4) float32 xyxy pixels of the canvas, image by image
    labels: Tensor      # (B,) int64
    counts: list[int]   # N: boxes of each image
    indices: list[int]  # N: of the images in their split

    def to(self, device, stream: torch.cuda.Stream | None = None) -> "Batch":
        """A copy on the device; on `stream`, if given, so that it overlaps computation."""
        with torch.cuda.stream(stream) if stream else nullcontext():
            batch = Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
                            for x in self))
        if stream:
            torch.cuda.current_stream().wait_stream(stream)
            for x in batch[:4]:  # their memory is not reused before the current stream is done
                x.record_stream(torch.cuda.current_stream())
        return batch


class CocoDataset(Dataset):
    """The images of a split and the boxes to learn from them; indexed by a list of Requests."""

    def __init__(self, annotations: Annotations, folder):
        self.annotations, self.folder = annotations, str(folder)
        learned = learnable(annotations) & ~annotations.crowd                        # (A,)
        counts = np.bincount(annotations.image[learned], minlength=len(annotations.image_ids))
        self.first = np.concatenate([[0], counts.cumsum()])  # boxes of image i: first[i]:first[i+1]
        self.boxes = clip(annotations)[learned]                                      # (B, 4)
        self.labels = annotations.labels[learned]                                    # (B,)

    def __len__(self):
        return len(self.annotations.image_ids)

    def with_boxes(self) -> np.ndarray:
        """Indices of the images that have a box to learn."""
        return np.flatnonzero(np.diff(self.first) > 0)

    def summary(self) -> str:
        """What training uses and what it leaves out, in a line."""
        a = self.annotations
        return (f"{a.path}: {len(self.with_boxes())} of {len(self)} images with "
                f"{len(self.labels)} boxes of {len(a.category_ids)} classes; left out: "
                f"{a.crowd.sum()} crowd and {(~learnable(a)).sum()} faulty boxes")

    def image_path(self, index) -> str:
        return os.path.join(self.folder, str(self.annotations.file_names[index]))

    def targets(self, index) -> tuple[np.ndarray, np.ndarray]:
        """The boxes (G, 4) and labels (G,) to learn from an image, at its own size."""
        here = slice(*self.first[index:index + 2])
        return self.boxes[here], self.labels[here]

    def __getitem__(self, requests: list[Request]) -> Batch | Exception:
        try:
            return self.load(requests)
        except Exception as error:  # `batches` raises it, in the training process
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())
            return error

    def load(self, requests: list[Request]) -> Batch:
        images = blank(len(requests), *requests[0].canvas)                           # (N, 3, H, W)
        boxes, labels = [], []
        for canvas, request in zip(images, requests):
            image = self.image(request.index)                                        # (3, h0, w0)
            box, label = (torch.from_numpy(x) for x in self.targets(request.index))
            h, w = request.size
            box = box * torch.tensor([w / image.shape[2], h / image.shape[1]]).repeat(2)
            image = transforms.resize(image, request.size)  # antialiased
            if request.seed is not None:
                image, box = augment(image, box, request)
            canvas[:, :h, :w] = image
            boxes.append(box)
            labels.append(label)
        sizes = torch.tensor([request.size for request in requests])
        return Batch(images, sizes, torch.cat(boxes), torch.cat(labels), [len(b) for b in boxes],
                     [request.index for request in requests])

    def image(self, index) -> Tensor:
        """An image, turned so that it has the size that the JSON says: (3, H, W) uint8 RGB."""
        path, (height, width) = self.image_path(index), self.annotations.sizes[index].tolist()
        for exif in (False, True):  # the boxes may be drawn on the image as its EXIF note turns it
            image = load_image(path, apply_exif=exif)
            if image.shape[1:] == (height, width):
                return image
        raise UserError(f"{path} (image {self.annotations.image_ids[index]}): is {image.shape[2]} "
                        f"x {image.shape[1]} pixels, but {self.annotations.path} says {width} x "
                        f"{height}; correct width and height there, or the file")


def augment(image: Tensor, boxes: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """Change a resized image (3, h, w) uint8 and its boxes (G, 4), as the request says.

    A random augmentation goes here; draw from np.random.default_rng(request.seed) alone.
    """
    if request.flip:
        image, boxes = image.flip(2), mirror(boxes, image.shape[2])
    return image, boxes


def mirror(boxes: Tensor, width) -> Tensor:
    """Boxes (..., 4) of an image that is flipped from left to right."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=-1)


def blank(N, height, width) -> Tensor:
    """N empty canvases, (N, 3, H, W) uint8 in channels_last."""
    return torch.from_numpy(np.zeros((N, height, width, 3), np.uint8)).permute(0, 3, 1, 2)


def load_image(path, apply_exif=False) -> Tensor:
    """An image file as (3, H, W) uint8 RGB. Transparency is dropped, 16 bits are cut to 8."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such image file")
    try:
        with Image.open(path) as image:
            return as_rgb(upright(image) if apply_exif else image)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be decoded as an image ({reason}); replace the file") \
            from None


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF note says; leave it as it is where the note cannot be read."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # whatever a damaged note makes Pillow raise
        pass
    return image


def as_rgb(image: Image.Image) -> Tensor:
    """A Pillow image as (3, H, W) uint8 RGB."""
    if image.mode in ("I", "F"):
        raise UserError(f"pixels of 32 bits (mode {image.mode}) have no defined range")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":  # a palette, perhaps with transparency
        image = image.convert("RGBA")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def own_process_group(worker):
    """Leave the terminal's process group, so that Ctrl-C reaches the training process alone."""
    os.setpgrp()


def batches(dataset: CocoDataset, requests, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Load lists of Requests in their order, in `num_workers` processes (0: in this one)."""
    workers = {}
    if num_workers:
        requests = fitting(requests, num_workers)
        workers = dict(num_workers=num_workers, timeout=LOADER_TIMEOUT,
                       worker_init_fn=own_process_group, multiprocessing_context="fork" if
                       sys.platform == "linux" else None)  # a forkserver's outlive a killed run
    loader = iter(DataLoader(dataset, batch_size=None, sampler=requests, pin_memory=pin_memory,
                             **workers))
    if num_workers:
        with suppress(ValueError):  # only the main thread may set a handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise amid a step
    while True:
        try:
            batch = next(loader, None)
        except RuntimeError as error:  # of the loader: an error of the dataset comes as a batch
            raise UserError(
                f"loading stopped ({str(error).splitlines()[0]}): a worker process was killed or "
                "hangs; check free memory and /dev/shm, or use --num-workers 0") from None
        if batch is None:
            return
        if isinstance(batch, Exception):
            raise batch
        yield batch


def fitting(requests, num_workers: int):
    """Yield the requests, but raise before their batches fill /dev/shm: workers would hang."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    processes = num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for request in requests:
        needed = processes * 2 * len(request) * 3 * math.prod(request[0].canvas)
        if needed > free:
            raise UserError(f"/dev/shm: {free >> 20} MB are free, but {processes} workers keep "
                            f"{needed >> 20} MB of batches there; enlarge it (docker run "
                            "--shm-size=8g), or load without workers: --num-workers 0")
        yield request


def open_split(root, kind: str, split: str = "") -> CocoDataset:
    """A split of a COCO-format folder, see `find_split`; every image file must exist."""
    json_file, folder = find_split(root, kind, split)
    dataset = CocoDataset(read_annotations(json_file), folder)
    with os.scandir(folder) as entries:  # one scan of the folder instead of a look at each file
        listed = {entry.name for entry in entries if entry.is_file()}
    for i, name in enumerate(dataset.annotations.file_names.tolist()):
        if name not in listed and not os.path.isfile(dataset.image_path(i)):
            raise UserError(f"{dataset.image_path(i)}: no such image file; complete the folder, or "
                            "leave out what is missing: make check DATA=... says how")
    return dataset
