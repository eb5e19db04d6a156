"""data.py: what does the detector learn from?  COCO-format data, from the files to a batch on its way to the device.

    DIR/annotations/instances_<split>.json    images, annotations (bbox = x, y, width, height in pixels), categories
    DIR/<split>/ or DIR/images/<split>/       the image files

 1. *Read* the JSON into flat arrays: worker processes share them, where lists of Python objects would be copied.
 2. *Decide* what each step sees. The sampler is a pure function of (seed, step): which images, which are flipped, at
    which scale, on which canvas. No other random number exists here, so that a resumed run goes on as it would have,
    and any number of processes sees the same global batches.
 3. *Load*: decode, resize as uint8 with antialiasing, flip, put on the canvas. The device makes floats of it.

`shapes` is a generated data set, written as JPEG files and JSON, that goes through the same reader.

    python data.py DIR                        describe a data set and its problems

Letters: I images and A annotations of a split, N images of a batch, G boxes of an image, C classes.
"""

import argparse
import colorsys
import json
import os
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import functional as transforms

CANVAS_MULTIPLE = 32  # pixels; the canvas of a batch is padded to it (stride of C5)


class DataError(ValueError):
    """Something in the user's data that cannot be used; the message is one sentence with the remedy."""


# --- 1. reading -------------------------------------------------------------------------------------------------------

class Annotations(NamedTuple):
    """A split as flat arrays. Annotations are sorted by image; those of image i are first[i] : first[i + 1]."""
    path: str
    image_ids: np.ndarray       # (I,) int64
    file_names: np.ndarray      # (I,) str
    sizes: np.ndarray           # (I, 2) int64: height, width, as the JSON says
    first: np.ndarray           # (I + 1,) int64
    boxes: np.ndarray           # (A, 4) float64 xyxy pixels, as written: not clipped, not checked
    labels: np.ndarray          # (A,) int64 in [0, C): index of the category in `category_ids`
    areas: np.ndarray           # (A,) float64 pixels squared (of the object's mask, where the JSON has one)
    crowd: np.ndarray           # (A,) bool: box around a crowd of objects
    annotation_ids: np.ndarray  # (A,) int64
    category_ids: list[int]     # C, sorted
    category_names: list[str]   # C


def find_split(root: str, kind: str, split: str | None = None) -> tuple[Path, Path]:
    """The JSON file and the image folder of a split of the data set in `root`.

    `kind` is "train" or "val": without `split`, train2017 / val2017 is taken, else the only split whose name begins so.
    """
    folder = Path(root) / "annotations"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a COCO-format data set has annotations/instances_<split>.json")
    splits = sorted(p.stem.removeprefix("instances_") for p in folder.glob("instances_*.json"))
    if split is None:
        found = [s for s in splits if s == f"{kind}2017"] or [s for s in splits if s.startswith(kind)]
        if len(found) != 1:
            raise DataError(f"{folder}: {'no' if not found else 'more than one'} {kind} split among "
                            f"{splits or 'no instances_*.json files'}; name one with --{kind}-split")
        split = found[0]
    elif split not in splits:
        raise DataError(f"{folder}: no instances_{split}.json; there is {', '.join(splits) or 'none at all'}")
    images = next((p for p in (Path(root) / split, Path(root) / "images" / split) if p.is_dir()), None)
    if images is None:
        raise DataError(f"{root}: no image folder {split}/ or images/{split}/ for instances_{split}.json")
    return folder / f"instances_{split}.json", images


def read_annotations(path) -> Annotations:
    """Read a COCO-format JSON file. Raises DataError where it is not one; doubtful boxes are kept as they are."""
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); is the file complete?") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__} where COCO format has an object with images, "
                        "annotations and categories")

    def column(table, key, dtype, default=None):
        """One field of every entry of a table, as an array."""
        try:
            values = [e[key] for e in content[table]] if default is None else [e.get(key, default) for e in content[table]]
            if dtype is not str:
                values = np.array(values, dtype=dtype)
            elif not all(isinstance(value, str) for value in values):
                raise TypeError("not all are text")
            return values
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}: {table} need {key!r} as {np.dtype(dtype).name} in every entry "
                            f"({type(error).__name__}: {error})") from None

    category_ids, category_names = column("categories", "id", np.int64), column("categories", "name", str)
    image_ids = column("images", "id", np.int64)
    boxes = column("annotations", "bbox", np.float64).reshape(-1, 4)
    for table, ids in (("categories", category_ids), ("images", image_ids)):
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise DataError(f"{path}: {table} id {values[counts > 1][0]} stands {counts.max()} times; ids must be unique")
        if len(ids) == 0:
            raise DataError(f"{path}: {table} is empty")

    def index_of(ids, wanted, table):
        """Where each of `wanted` stands in `ids`."""
        order = np.argsort(ids)
        found = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
        unknown = ids[found] != wanted
        if unknown.any():
            i = int(np.flatnonzero(unknown)[0])
            raise DataError(f"{path}: annotation {content['annotations'][i].get('id', i)} names {table} {wanted[i]}, which "
                            f"is not in the file ({unknown.sum()} such annotations)")
        return found

    by_id = np.argsort(category_ids)
    labels = index_of(category_ids[by_id], column("annotations", "category_id", np.int64), "category")
    image = index_of(image_ids, column("annotations", "image_id", np.int64), "image")
    by_image = np.argsort(image, kind="stable")
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in content["annotations"]], dtype=np.float64)
    sizes = np.stack([column("images", "height", np.int64), column("images", "width", np.int64)], axis=1)
    if (sizes <= 0).any():
        i = int(np.flatnonzero((sizes <= 0).any(axis=1))[0])
        raise DataError(f"{path}: image {image_ids[i]} has height {sizes[i, 0]} and width {sizes[i, 1]}; both must be > 0")
    return Annotations(
        path=str(path), image_ids=image_ids, file_names=np.array(column("images", "file_name", str)), sizes=sizes,
        first=np.concatenate([[0], np.bincount(image, minlength=len(image_ids)).cumsum()]),
        boxes=boxes[by_image], labels=labels[by_image], areas=areas[by_image],
        crowd=column("annotations", "iscrowd", np.int64, default=0)[by_image] == 1,
        annotation_ids=column("annotations", "id", np.int64, default=0)[by_image],
        category_ids=category_ids[by_id].tolist(), category_names=[category_names[i] for i in by_id])


class Boxes(NamedTuple):
    """The boxes that can be learned, in flat arrays; those of image i are first[i] : first[i + 1]."""
    first: np.ndarray   # (I + 1,)
    boxes: np.ndarray   # (A, 4) float32 xyxy pixels inside the image
    labels: np.ndarray  # (A,) int64


def usable_boxes(annotations: Annotations) -> tuple[Boxes, dict[str, int]]:
    """The boxes that training uses, clipped to their image, and why the others are not used: {reason: count}."""
    a = annotations
    image = np.repeat(np.arange(len(a.image_ids)), np.diff(a.first))                # (A,)
    height, width = a.sizes[image, 0], a.sizes[image, 1]
    clipped = a.boxes.clip(0, np.stack([width, height, width, height], axis=1))
    finite = np.isfinite(a.boxes).all(axis=1)
    with np.errstate(invalid="ignore"):
        has_area = (a.boxes[:, 2:] > a.boxes[:, :2]).all(axis=1)
        inside = (clipped[:, 2:] - clipped[:, :2] >= 1e-3).all(axis=1)
    reasons = {
        "crowd boxes": a.crowd,
        "boxes with a coordinate that is not finite": ~a.crowd & ~finite,
        "boxes of no width or height": ~a.crowd & finite & ~has_area,
        "boxes outside their image": ~a.crowd & finite & has_area & ~inside,
    }
    keep = ~a.crowd & finite & has_area & inside
    first = np.concatenate([[0], np.bincount(image[keep], minlength=len(a.image_ids)).cumsum()])
    boxes = Boxes(first, clipped[keep].astype(np.float32), a.labels[keep])
    return boxes, {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}


# --- 2. deciding ------------------------------------------------------------------------------------------------------

class Request(NamedTuple):
    """One image as a step wants it."""
    index: int                # of the image in its split
    flip: bool
    size: tuple[int, int]     # height, width after resizing
    canvas: tuple[int, int]   # height, width of the batch


def resized(height, width, short_side, long_side, enlarge=True) -> tuple[int, int]:
    """The size at which the short side is `short_side`, or less where the long side would exceed `long_side`."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    if not enlarge:
        scale = min(scale, 1.0)
    return max(1, round(height * scale)), max(1, round(width * scale))


def requests(indices, flips, sizes, multiple) -> list[Request]:
    """Requests of one batch, on a canvas that holds them all."""
    canvas = tuple(-(-max(side) // multiple) * multiple for side in zip(*sizes))
    return [Request(int(i), bool(flip), size, canvas) for i, flip, size in zip(indices, flips, sizes)]


class TrainSampler:
    """Which images a training step sees: a pure function of (seed, step), the same in every process.

    An epoch is a permutation of the images, tall ones and wide ones apart so that little is padded, cut into batches
    (the last one filled up from the front), whose order is shuffled.
    """

    def __init__(self, sizes, images, batch_size, seed, short_sides=(800, 800), long_side=1333, enlarge=True,
                 flip=0.5, multiple=CANVAS_MULTIPLE):
        """`sizes` (I, 2): heights and widths; `images`: the indices to train on; `short_sides`: range, both included."""
        self.sizes, self.images, self.batch_size, self.seed = sizes, np.asarray(images), batch_size, seed
        self.short_sides, self.long_side, self.enlarge, self.flip = short_sides, long_side, enlarge, flip
        self.multiple = multiple
        self.batches_per_epoch = -(-len(self.images) // batch_size)
        self._epoch = (-1, None)

    def global_batch(self, step: int) -> list[Request]:
        """The `batch_size` images of one step."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        indices = self._epoch[1][batch]
        random = np.random.default_rng((self.seed, 1, step))
        flips = random.random(self.batch_size) < self.flip
        short_sides = random.integers(self.short_sides[0], self.short_sides[1], self.batch_size, endpoint=True)
        sizes = [resized(*self.sizes[i].tolist(), int(short), self.long_side, self.enlarge)
                 for i, short in zip(indices, short_sides)]
        return requests(indices, flips, sizes, self.multiple)

    def _shuffled(self, epoch):
        random = np.random.default_rng((self.seed, 0, epoch))
        order = random.permutation(self.images)
        is_wide = self.sizes[order, 1] >= self.sizes[order, 0]
        order = order[np.argsort(is_wide, kind="stable")]
        batches = np.resize(order, (self.batches_per_epoch, self.batch_size))   # repeats the front to fill up
        return batches[random.permutation(len(batches))]


class Shard:
    """The part of every global batch that one process loads, an accumulation step at a time (a DataLoader batch sampler)."""

    def __init__(self, sampler: TrainSampler, steps: range, accumulate=1, rank=0, world=1):
        self.sampler, self.steps, self.accumulate, self.rank, self.world = sampler, steps, accumulate, rank, world

    def __iter__(self) -> Iterator[list[Request]]:
        share = self.sampler.batch_size // (self.accumulate * self.world)
        for step in self.steps:
            batch = self.sampler.global_batch(step)
            for part in range(self.accumulate):
                first = (part * self.world + self.rank) * share
                yield batch[first:first + share]

    def __len__(self):
        return len(self.steps) * self.accumulate


def evaluation_batches(sizes, batch_size, short_side, long_side, enlarge) -> list[list[Request]]:
    """Every image once, images of like shape together. Depends on nothing but the data set, so that processes can share it out."""
    after = [resized(*size, short_side, long_side, enlarge) for size in sizes.tolist()]
    order = sorted(range(len(after)), key=lambda i: (after[i], i))
    return [requests(chunk, [False] * len(chunk), [after[i] for i in chunk], CANVAS_MULTIPLE)
            for chunk in (order[i:i + batch_size] for i in range(0, len(order), batch_size))]


# --- 3. loading -------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Images on one canvas and their boxes."""
    images: Tensor         # (N, 3, H, W) uint8 RGB, 0 in the padding
    sizes: Tensor          # (N, 2) int64: height, width without the padding
    boxes: list[Tensor]    # N x (G, 4) float32 xyxy pixels of the canvas
    labels: list[Tensor]   # N x (G,) int64
    indices: Tensor        # (N,) of the images in their split

    def to(self, device) -> "Batch":
        def move(x):
            return x.to(device, non_blocking=True)
        return Batch(move(self.images), move(self.sizes), [move(b) for b in self.boxes],
                     [move(label) for label in self.labels], self.indices)


class CocoDataset(Dataset):
    """The images of a split and the boxes to learn from them; indexed by Requests, a batch at a time."""

    def __init__(self, annotations: Annotations, folder):
        self.annotations, self.folder = annotations, str(folder)
        self.boxes, self.dropped = usable_boxes(annotations)

    def __len__(self):
        return len(self.annotations.image_ids)

    def with_boxes(self) -> np.ndarray:
        """Indices of the images that have a box to learn."""
        return np.flatnonzero(np.diff(self.boxes.first) > 0)

    def image_path(self, index) -> str:
        return os.path.join(self.folder, str(self.annotations.file_names[index]))

    def __getitems__(self, batch: list[Request]) -> Batch:
        height, width = batch[0].canvas
        images = torch.zeros(len(batch), 3, height, width, dtype=torch.uint8)
        boxes, labels = [], []
        for n, request in enumerate(batch):
            h, w = request.size
            image = self._decode(request.index)                                     # (3, h0, w0)
            scale = torch.tensor([w / image.shape[2], h / image.shape[1]]).repeat(2)
            if image.shape[1:] != request.size:
                image = transforms.resize(image, [h, w], antialias=True)
            first, last = self.boxes.first[request.index:request.index + 2]
            box = torch.from_numpy(self.boxes.boxes[first:last]) * scale             # (G, 4)
            if request.flip:
                image = image.flip(2)
                box = torch.stack([w - box[:, 2], box[:, 1], w - box[:, 0], box[:, 3]], dim=1)
            images[n, :, :h, :w] = image
            boxes.append(box)
            labels.append(torch.from_numpy(self.boxes.labels[first:last]))
        return Batch(images, torch.tensor([r.size for r in batch]), boxes, labels, torch.tensor([r.index for r in batch]))

    def _decode(self, index) -> Tensor:
        path, size = self.image_path(index), tuple(self.annotations.sizes[index].tolist())
        image = load_image(path)
        if tuple(image.shape[1:]) != size:  # the boxes may be meant for the picture as a camera's EXIF note turns it
            image = load_image(path, apply_exif_orientation=True)
        if tuple(image.shape[1:]) != size:
            raise DataError(f"{path} (image {self.annotations.image_ids[index]}): is {image.shape[2]} x {image.shape[1]} pixels, "
                            f"but {self.annotations.path} says {size[1]} x {size[0]}; correct width and height there, or the file")
        return image


def load_image(path, apply_exif_orientation=False) -> Tensor:
    """An image file of any kind that torchvision decodes, as (3, H, W) uint8 RGB."""
    try:
        image = decode_image(read_file(str(path)), mode=ImageReadMode.RGB, apply_exif_orientation=apply_exif_orientation)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be decoded as an image ({reason}); replace the file, or take it out of the JSON") from None
    return image if image.dtype == torch.uint8 else (image >> 8).to(torch.uint8)  # 16-bit PNG


def make_loader(dataset: CocoDataset, batch_sampler, num_workers: int, pin_memory=False) -> DataLoader:
    """Batches in the sampler's order, loaded by worker processes."""
    return DataLoader(dataset, batch_sampler=batch_sampler, collate_fn=lambda batch: batch, num_workers=num_workers,
                      pin_memory=pin_memory, persistent_workers=num_workers > 0)


# --- the generated data set -------------------------------------------------------------------------------------------

SHAPES = ("rectangle", "ellipse", "triangle")


def make_shapes(root, num_train=1000, num_val=200, size=128, seed=0):
    """Write the `shapes` data set to `root` (once): JPEG files and COCO JSON, a pure function of the arguments."""
    root = Path(root)
    if (root / "annotations" / "instances_val.json").exists():
        return
    for split, count, stream in (("train", num_train, 0), ("val", num_val, 1)):
        (root / split).mkdir(parents=True, exist_ok=True)
        content = {"images": [], "annotations": [],
                   "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]}
        for i in range(count):
            picture, objects = _draw_shapes(np.random.default_rng((seed, stream, i)), size)
            name = f"{i:06d}.jpg"
            picture.save(root / split / name, quality=92)
            content["images"].append({"id": i + 1, "file_name": name, "height": picture.height, "width": picture.width})
            for label, (x0, y0, x1, y1) in objects:
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": i + 1, "category_id": label + 1, "iscrowd": 0,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
        (root / "annotations").mkdir(exist_ok=True)
        unfinished = root / "annotations" / f"{split}.part"
        unfinished.write_text(json.dumps(content))
        unfinished.replace(root / "annotations" / f"instances_{split}.json")


def open_split(name: str, run, kind: str, split: str | None = None) -> "CocoDataset":
    """A split of the data set `name`: a COCO-format folder, or "shapes", which is generated in RUN/data on first use."""
    if name == "shapes":
        name = Path(run) / "data"
        make_shapes(name)
    json_file, folder = find_split(name, kind, split)
    return CocoDataset(read_annotations(json_file), folder)


def _draw_shapes(random, size):
    """One picture: a textured background and 1 to 8 shapes, of which later ones cover earlier ones in part."""
    height, width = (int(random.integers(size * 3 // 4, size, endpoint=True)) for _ in range(2))

    def texture(grain, low, high):
        """Smooth noise of `grain` pixels around a colour of its own."""
        cells = (max(2, height // grain), max(2, width // grain), 3)
        noise = random.integers(low, high, 3) + random.integers(-40, 41, cells)
        return Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)

    picture = Image.blend(texture(int(random.integers(16, 64)), 60, 196), texture(int(random.integers(1, 6)), 60, 196), 0.4)
    objects, boxes = [], np.zeros((0, 4))
    for _ in range(int(random.integers(1, 8, endpoint=True))):
        for _ in range(20):  # find a place that leaves the shapes below recognisable
            w, h = np.exp(random.uniform(np.log(12), np.log(0.75 * size))) * np.exp(random.uniform(-0.5, 0.5, 2) * [1, -1])
            w, h = round(min(w, width - 2)), round(min(h, height - 2))
            x0, y0 = int(random.integers(0, width - w)), int(random.integers(0, height - h))
            x1, y1 = x0 + w, y0 + h
            overlap = (np.minimum(boxes[:, 2:], (x1, y1)) - np.maximum(boxes[:, :2], (x0, y0))).clip(0).prod(axis=1)
            smaller = np.minimum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), w * h)
            if (overlap <= 0.3 * smaller).all():
                break
        else:
            break
        label = int(random.integers(len(SHAPES)))
        scale = 4  # drawn larger and reduced: smooth edges
        mask = Image.new("L", (w * scale, h * scale))
        draw, right, bottom = ImageDraw.Draw(mask), w * scale - 1, h * scale - 1
        if SHAPES[label] == "rectangle":
            draw.rectangle((0, 0, right, bottom), fill=255)
        elif SHAPES[label] == "ellipse":
            draw.ellipse((0, 0, right, bottom), fill=255)
        else:
            tip, base = (0, bottom) if random.random() < 0.5 else (bottom, 0)
            draw.polygon([(random.uniform(0.2, 0.8) * right, tip), (0, base), (right, base)], fill=255)
        mask = mask.resize((w, h), Image.Resampling.LANCZOS)
        colour = colorsys.hsv_to_rgb(random.random(), random.uniform(0.6, 1), random.choice([0.35, 0.95]))
        grain = random.integers(-25, 26, (h, w, 1)) + 255 * np.array(colour)
        picture.paste(Image.fromarray(grain.clip(0, 255).astype(np.uint8)), (x0, y0), mask)
        objects.append((label, (x0, y0, x1, y1)))
        boxes = np.concatenate([boxes, [[x0, y0, x1, y1]]])
    return picture, objects


if __name__ == "__main__":
    sys.exit(0)
