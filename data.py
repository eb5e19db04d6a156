"""data.py: what does the detector learn from?  COCO-format data, from the files to a batch on its way to the device.

    DIR/annotations/instances_<split>.json    images, annotations (bbox = x, y, width, height in pixels), categories
    DIR/<split>/ or DIR/images/<split>/       the image files

 1. *Read* the JSON into flat arrays: worker processes share them, where lists of Python objects would be copied.
 2. *Decide* what each step sees. The sampler is a pure function of (seed, step): which images, which are flipped, at
    which scale, on which canvas. No other random number exists here, so that a resumed run goes on as it would have,
    and any number of processes sees the same global batches.
 3. *Load*: decode, resize as uint8 with antialiasing, flip, put on the canvas. The device makes floats of it.
 4. *Check*: say in words what training would do with a data set, before it does.

What is wrong with an entry as such (a bbox of three numbers, an image that is not there) is an error: `DataError`, one
sentence with the remedy. What is doubtful (a box without area) is left out of training, counted and told.

`shapes` is a generated data set, written as JPEG files and JSON, that goes through the same reader.

    python data.py                            describe and draw the generated data set
    python data.py DIR                        describe a data set and its problems: its train and its val split
    python data.py DIR --images               decode every image as well, and compare the files of the two splits
    python data.py DIR --split train --fix OUT.json     write a copy without what cannot be learned

It exits with 0 where there is nothing to tell, with 1 where training leaves something out or something looks wrong, and
with 2 where training cannot start.

Letters: I images, A annotations and B boxes to learn of a split, N images of a batch, G boxes of an image, C classes.
"""

import argparse
import colorsys
import errno
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, make_grid

CANVAS_MULTIPLE = 32  # pixels; the canvas of a batch is padded to it (stride of C5)


class DataError(ValueError):
    """Something in the user's data that cannot be used; the message is one sentence with the remedy."""


class Problem(NamedTuple):
    """Something that the checker tells."""
    what: str              # completes "12 ..."
    count: int
    examples: list[str]    # the first ones: file, ids, value
    then: str              # what training does with it
    remedy: str

    @property
    def stops(self) -> bool:
        return self.then.startswith("stops")


STOPS = "stops, with this as the error"


# --- 1. reading -------------------------------------------------------------------------------------------------------

class Annotations(NamedTuple):
    """A split as flat arrays; annotations are sorted by image."""
    path: str
    image_ids: np.ndarray       # (I,) int64
    file_names: np.ndarray      # (I,) str
    sizes: np.ndarray           # (I, 2) int64: height, width, as the JSON says
    image: np.ndarray           # (A,) int64: index of the annotation's image
    boxes: np.ndarray           # (A, 4) float64 xyxy pixels, as written: not clipped, not checked
    labels: np.ndarray          # (A,) int64 in [0, C): index of the category in `category_ids`
    areas: np.ndarray           # (A,) float64 pixels squared (of the object's mask, where the JSON has one)
    crowd: np.ndarray           # (A,) bool: box around a crowd of objects
    annotation_ids: np.ndarray  # (A,) int64, -1 where the JSON has none
    category_ids: list[int]     # C, sorted
    category_names: list[str]   # C
    rows: dict[str, np.ndarray]  # places of images (I,), annotations (A,) and categories (C,) in the JSON's lists


def find_split(root: str, kind: str, split: str = "") -> tuple[Path, Path]:
    """The JSON file and the image folder of a split of the data set in `root`.

    `kind` is "train" or "val": without `split`, train2017 / val2017 is taken, else the only split whose name begins so.
    """
    folder = Path(root) / "annotations"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a COCO-format data set has annotations/instances_<split>.json")
    splits = sorted(p.stem.removeprefix("instances_") for p in folder.glob("instances_*.json"))
    if not split:
        found = [s for s in splits if s == f"{kind}2017"] or [s for s in splits if s.startswith(kind)]
        if len(found) != 1:
            raise DataError(f"{folder}: {'no' if not found else 'more than one'} {kind} split among "
                            f"{splits or 'no instances_*.json files'}; name one with --{kind}-split (python data.py: --split)")
        split = found[0]
    elif split not in splits:
        raise DataError(f"{folder}: no instances_{split}.json; there is {', '.join(splits) or 'none at all'}")
    images = next((p for p in (Path(root) / split, Path(root) / "images" / split) if p.is_dir()), None)
    if images is None:
        raise DataError(f"{root}: no image folder {split}/ or images/{split}/ for instances_{split}.json; put the image files "
                        "into one of them")
    return folder / f"instances_{split}.json", images


def split_of(json_file) -> str:
    return Path(json_file).stem.removeprefix("instances_")


def is_whole(value):
    return type(value) is int and abs(value) < 2**63 or type(value) is float and value.is_integer() and abs(value) < 2**53


def is_number(value):  # NaN and Infinity are: boxes that have them are counted, not refused
    return type(value) is float or type(value) is int and abs(value) < 2**63


def is_text(value):
    return type(value) is str and 0 < len(value) < 500 and "\0" not in value and not re.search("[\ud800-\udfff]", value)


FIELDS = {  # what training needs: table -> field -> (test, in words, what stands for a missing one)
    "categories": {"id": (is_whole, "a whole number", None),
                   "name": (is_text, "a text", None)},
    "images": {"id": (is_whole, "a whole number", None),
               "file_name": (lambda v: is_text(v) and not os.path.isabs(v) and ".." not in v.split("/"),
                             "a path inside the image folder", None),
               "height": (lambda v: is_whole(v) and 0 < v <= 10**6, "a number of pixels > 0", None),
               "width": (lambda v: is_whole(v) and 0 < v <= 10**6, "a number of pixels > 0", None)},
    "annotations": {"image_id": (is_whole, "a whole number", None),
                    "category_id": (is_whole, "a whole number", None),
                    "bbox": (lambda v: type(v) is list and len(v) == 4 and all(map(is_number, v)),
                             "four numbers [x, y, width, height]", None),
                    "iscrowd": (lambda v: type(v) in (int, bool, float) and v in (0, 1), "0 or 1", 0),
                    "id": (is_whole, "a whole number", -1)},
}


def read_json(path) -> dict:
    """The three tables of a COCO-format file. Polygons, most of such a file, are dropped while it is read."""
    def slim(pairs):
        entry = dict(pairs)
        if len(entry) < len(pairs):
            raise ValueError(f"an object has a key twice, among {', '.join(sorted(key for key, _ in pairs)[:20])!a}")
        entry.pop("segmentation", None)
        return entry

    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=slim)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, absurd numbers
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        reason = "it is empty" if empty else getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read as JSON ({reason}); is the file complete? Copy or export it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__} where COCO format has an object with images, annotations "
                        "and categories; export it as COCO object detection")
    for table in FIELDS:
        if type(content.get(table)) is not list:
            raise DataError(f"{path}: has no list of {table}; export it as COCO object detection")
        wrong = [entry for entry in content[table] if type(entry) is not dict]
        if wrong:
            raise DataError(f"{path}: among its {table} is {brief(wrong[0])}, not an object; export it as COCO object detection")
    return content


def read_annotations(path, problems: list[Problem] | None = None) -> Annotations:
    """Read a COCO-format JSON file; boxes are kept as written, however doubtful.

    An entry that cannot be used is a DataError. Given a list of `problems`, it is told there and left out instead.
    """
    content = read_json(path)
    rows = usable_rows(path, content, problems)
    index = {id: i for i, id in enumerate(column(content, rows, "images", "id"))}
    image = np.array([index[id] for id in column(content, rows, "annotations", "image_id")], dtype=np.int64)
    order = image.argsort(kind="stable")
    rows["annotations"], image = rows["annotations"][order], image[order]
    rows["categories"] = rows["categories"][column(content, rows, "categories", "id", np.int64).argsort()]

    category_ids = column(content, rows, "categories", "id", np.int64)
    xywh = column(content, rows, "annotations", "bbox", np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        of_boxes = np.nan_to_num(xywh[:, 2:].clip(0).prod(axis=1), posinf=0).tolist()
    areas = [content["annotations"][i].get("area") for i in rows["annotations"].tolist()]
    areas = [area if is_number(area) and 0 <= area < math.inf else of_box for area, of_box in zip(areas, of_boxes)]
    return Annotations(
        path=str(path),
        image_ids=column(content, rows, "images", "id", np.int64),
        file_names=np.array(column(content, rows, "images", "file_name")),
        sizes=np.stack([column(content, rows, "images", side, np.int64) for side in ("height", "width")], axis=1),
        image=image,
        boxes=boxes,
        labels=np.searchsorted(category_ids, column(content, rows, "annotations", "category_id", np.int64)),
        areas=np.array(areas, dtype=np.float64),
        crowd=column(content, rows, "annotations", "iscrowd", bool),
        annotation_ids=column(content, rows, "annotations", "id", np.int64),
        category_ids=category_ids.tolist(),
        category_names=column(content, rows, "categories", "name"),
        rows=rows)


def column(content, rows, table, key, dtype=None):
    """The values of a field in the entries of a table that are in `rows`: an array of `dtype`, else a list."""
    values = [content[table][i].get(key, FIELDS[table][key][2]) for i in rows[table].tolist()]
    return values if dtype is None else np.array(values, dtype=dtype)


def usable_rows(path, content, problems) -> dict[str, np.ndarray]:
    """For each table, the places of the entries that can be used; what becomes of others: see `read_annotations`."""
    rows = {table: np.arange(len(content[table])) for table in FIELDS}

    def keep(table, good, what, wrong, remedy="correct it, or let --fix leave it out"):
        """Go on with the entries `good` (a mask) of a table, and tell of the others: `wrong`(entry) says what it has."""
        bad = rows[table][~good]
        rows[table] = rows[table][good]
        examples = []
        for i in bad[:3].tolist():
            entry = content[table][i]
            named = "".join(f"({key} {brief(entry[key])}) " for key in ("id", "file_name") if key in entry)
            examples.append(f"{table}[{i}] {named}{wrong(entry)}")
        if examples and problems is None:
            raise DataError(f"{path}: {len(bad)} {table} {what}: {examples[0]}; {remedy}")
        if examples:
            problems.append(Problem(f"{table} {what}", len(bad), examples, STOPS, remedy))

    for table, fields in FIELDS.items():
        for key, (test, words, _) in fields.items():
            good = np.fromiter(map(test, column(content, rows, table, key)), bool, len(rows[table]))
            keep(table, good, f"whose {key} is not {words}",
                 lambda entry: f"has {key} {brief(entry[key])}" if key in entry else f"has no {key}")
    for table in ("categories", "images"):
        same = {}  # id -> places of the entries that have it
        for i in rows[table].tolist():
            same.setdefault(content[table][i]["id"], []).append(i)
        # of equal entries the first is kept, of contradicting ones none
        kept = [places[0] for places in same.values() if all(content[table][i] == content[table][places[0]] for i in places)]
        keep(table, np.isin(rows[table], kept), "whose id stands several times",
             lambda entry: f"has id {entry['id']} like another; ids must be unique",
             "give every entry an id of its own, and correct the annotations that name it")
        if len(rows[table]) == 0:
            raise DataError(f"{path}: has no {table}{' that can be used' * bool(content[table])}; export the file again")
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        known = np.isin(column(content, rows, "annotations", key, np.int64), column(content, rows, table, "id", np.int64))
        keep("annotations", known, f"whose {key} is unknown",
             lambda entry: f"has {key} {entry[key]}, which is not among the {table}",
             f"add it to {table}, or let --fix leave it out")
    tiny = (np.abs(column(content, rows, "annotations", "bbox", np.float64).reshape(-1, 4)) <= 1).all(axis=1)
    if len(tiny) and tiny.mean() > 0.9:  # no box of a pixel can be learned
        keep("annotations", ~tiny, "whose bbox is normalised, it seems",
             lambda entry: f"has bbox {brief(entry['bbox'])}, not in pixels",
             "multiply x and width by the image's width, y and height by its height")
    return rows


def brief(value) -> str:
    """A value from the user's file as an error shows it, in a few printable characters."""
    if type(value) is int and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Boxes(NamedTuple):
    """The boxes that can be learned, in flat arrays; those of image i are first[i] : first[i + 1]."""
    first: np.ndarray   # (I + 1,)
    boxes: np.ndarray   # (B, 4) float32 xyxy pixels inside the image
    labels: np.ndarray  # (B,) int64


def clip(annotations: Annotations) -> np.ndarray:
    """(A, 4) float64: the boxes, cut at the edges of their images."""
    height, width = annotations.sizes[annotations.image].T
    return annotations.boxes.clip(0, np.stack([width, height, width, height], axis=1))


def faults(annotations: Annotations) -> dict[str, np.ndarray]:
    """Why boxes cannot be learned: {reason: (A,) bool}; a box has one reason at most."""
    reasons, good = {}, np.ones(len(annotations.boxes), bool)
    with np.errstate(invalid="ignore"):
        wh = annotations.boxes[:, 2:] - annotations.boxes[:, :2]
        clipped = clip(annotations).astype(np.float32)                                  # as they will be learned
        clipped_wh = clipped[:, 2:] - clipped[:, :2]
    for reason, bad in (("boxes with a coordinate that is not finite", ~np.isfinite(annotations.boxes).all(axis=1)),
                        ("boxes of negative width or height", (wh < 0).any(axis=1)),
                        ("boxes of no width or height", (wh == 0).any(axis=1)),
                        ("boxes outside their image", ~(clipped_wh >= 1e-3).all(axis=1))):
        reasons[reason] = good & bad
        good &= ~bad
    return reasons


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


def padded(pixels) -> int:
    """The side of a canvas for so many pixels."""
    return math.ceil(pixels / CANVAS_MULTIPLE) * CANVAS_MULTIPLE


def requests(indices, flips, sizes, sides=()) -> list[Request]:
    """Requests of one batch, on a canvas that holds them all: its sides are of `sides`, else multiples of 32."""
    longest = [max(side) for side in zip(*sizes)]                                    # height, width
    canvas = tuple(next((side for side in sides if side >= pixels), padded(pixels)) for pixels in longest)
    return [Request(int(i), bool(flip), size, canvas) for i, flip, size in zip(indices, flips, sizes)]


class TrainSampler:
    """Which images a training step sees: a pure function of (seed, step), the same in every process.

    An epoch is a permutation of the images, tall ones and wide ones apart so that little is padded, cut into batches
    (the last one filled up from the front), whose order is shuffled.
    """

    def __init__(self, sizes, images, batch_size, seed, short_sides=(800, 800), long_side=1333, enlarge=True,
                 flip=0.5, canvas_sides=0):
        """`sizes` (I, 2): heights and widths; `images`: the indices to train on; `short_sides`: range, both included;
        `canvas_sides`: how many lengths a side of the canvas may have, 0: any multiple of 32."""
        self.sizes, self.images, self.batch_size, self.seed = sizes, np.asarray(images), batch_size, seed
        self.short_sides, self.long_side, self.enlarge, self.flip = short_sides, long_side, enlarge, flip
        largest = [resized(*size, short_sides[1], long_side, enlarge) for size in np.unique(sizes, axis=0).tolist()]
        short, long = max(map(min, largest)), max(map(max, largest))  # what the short and the long sides need
        self.sides = sorted(set(map(padded, np.linspace(short, long, canvas_sides, dtype=int))))
        self.batches_per_epoch = math.ceil(len(self.images) / batch_size)
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
        return requests(indices, flips, sizes, self.sides)

    def _shuffled(self, epoch):
        random = np.random.default_rng((self.seed, 0, epoch))
        order = random.permutation(self.images)
        is_wide = self.sizes[order, 1] >= self.sizes[order, 0]
        order = order[np.argsort(is_wide, kind="stable")]
        batches = np.resize(order, (self.batches_per_epoch, self.batch_size))   # repeats the front to fill up
        return batches[random.permutation(len(batches))]


def shares(sampler: TrainSampler, steps: range, accumulate: int, rank: int, world: int) -> Iterator[list[Request]]:
    """The part of every global batch that one process loads, an accumulation step at a time."""
    share = sampler.batch_size // (accumulate * world)
    for step in steps:
        batch = sampler.global_batch(step)
        for part in range(accumulate):
            first = (part * world + rank) * share
            yield batch[first:first + share]


def evaluation_batches(sizes, batch_size, short_side, long_side, enlarge) -> list[list[Request]]:
    """Every image once, images of like shape together. Depends on nothing but the data set, so that processes can share it out."""
    after = [resized(*size, short_side, long_side, enlarge) for size in sizes.tolist()]
    order = sorted(range(len(after)), key=after.__getitem__)
    chunks = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [requests(chunk, [False] * len(chunk), [after[i] for i in chunk]) for chunk in chunks]


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
        a = annotations
        self.annotations, self.folder, self.faults = a, str(folder), faults(a)
        learned = ~np.logical_or.reduce([a.crowd, *self.faults.values()])            # (A,) bool
        counts = np.bincount(a.image[learned], minlength=len(a.image_ids))           # (I,)
        self.boxes = Boxes(np.concatenate([[0], counts.cumsum()]), clip(a)[learned].astype(np.float32), a.labels[learned])

    def __len__(self):
        return len(self.annotations.image_ids)

    def with_boxes(self) -> np.ndarray:
        """Indices of the images that have a box to learn."""
        return np.flatnonzero(np.diff(self.boxes.first) > 0)

    def image_path(self, index) -> str:
        return os.path.join(self.folder, str(self.annotations.file_names[index]))

    def missing(self) -> np.ndarray:
        """Indices of the images whose file is not there; one look at the folder, not one at each file."""
        there = set(os.listdir(self.folder))
        return np.array([i for i, name in enumerate(self.annotations.file_names.tolist())
                         if name not in there and not os.path.isfile(os.path.join(self.folder, name))], dtype=np.int64)

    def __getitem__(self, batch: list[Request]) -> Batch:
        images = blank(len(batch), *batch[0].canvas)                                # (N, 3, H, W)
        boxes, labels = [], []
        for n, request in enumerate(batch):
            h, w = request.size
            image = self.image(request.index)                                       # (3, h0, w0)
            place(image, request, images[n])
            scale = torch.tensor([w / image.shape[2], h / image.shape[1]]).repeat(2)
            first, last = self.boxes.first[request.index:request.index + 2]
            box = torch.from_numpy(self.boxes.boxes[first:last]) * scale             # (G, 4)
            if request.flip:
                box = torch.stack([w - box[:, 2], box[:, 1], w - box[:, 0], box[:, 3]], dim=1)
            boxes.append(box)
            labels.append(torch.from_numpy(self.boxes.labels[first:last]))
        return Batch(images, torch.tensor([r.size for r in batch]), boxes, labels, torch.tensor([r.index for r in batch]))

    def image(self, index) -> Tensor:
        """An image as its boxes are meant, (3, H, W) uint8 RGB: of the size that the JSON says."""
        path, size = self.image_path(index), tuple(self.annotations.sizes[index].tolist())
        image = load_image(path)
        if tuple(image.shape[1:]) != size:  # the boxes may be meant for the picture as a camera's EXIF note turns it
            image = load_image(path, apply_exif_orientation=True)
        if tuple(image.shape[1:]) != size:
            raise DataError(f"{path} (image {self.annotations.image_ids[index]}): is {image.shape[2]} x {image.shape[1]} pixels, "
                            f"but {self.annotations.path} says {size[1]} x {size[0]}; correct width and height there, or the file")
        return image


def blank(N, height, width) -> Tensor:
    """N empty canvases, (N, 3, H, W) uint8. Pixel by pixel in memory (channels_last), as JPEG files are decoded and as
    convolutions want it; of numpy, whose zeros cost nothing before they are written over."""
    return torch.from_numpy(np.zeros((N, height, width, 3), np.uint8)).permute(0, 3, 1, 2)


def place(image: Tensor, request: Request, canvas: Tensor):
    """Resize an image (3, h0, w0), flip it if so requested, and put it on the canvas (3, H, W); all uint8."""
    h, w = request.size
    if image.shape[1:] != request.size:
        image = transforms.resize(image, [h, w], antialias=True)
    canvas[:, :h, :w] = image.flip(2) if request.flip else image


def load_image(path, apply_exif_orientation=False) -> Tensor:
    """An image file as (3, H, W) uint8 RGB. Transparency is dropped; of an animation the first picture is taken.

    torchvision decodes JPEG fast, and refuses one that is cut off; its PNG decoder ends the process on a damaged file,
    so that everything else is Pillow's.
    """
    try:
        content = np.fromfile(path, np.uint8)
        if content[:2].tobytes() == b"\xff\xd8":
            return decode_jpeg(torch.from_numpy(content), mode=ImageReadMode.RGB, apply_exif_orientation=apply_exif_orientation)
        with Image.open(io.BytesIO(content)) as picture:
            if apply_exif_orientation:
                picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "F"):
                raise ValueError(f"pixels of 32 bits (mode {picture.mode}) have no set range")
            if picture.mode.startswith("I;16"):
                pixels = (np.asarray(picture) >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
            else:
                pixels = np.array(picture.convert("RGBA" if picture.mode == "P" else "RGB"))[..., :3]  # (H, W, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except UnidentifiedImageError:
        reason = "it is empty" if len(content) == 0 else f"not an image; it begins with {content[:12].tobytes()!r}"
    except Exception as error:  # whatever a damaged file makes a decoder raise
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise DataError(f"{path}: cannot be decoded as an image ({reason}); replace the file")


def in_a_group_of_its_own(worker):
    """A SIGTERM or SIGINT to the whole process group is for training to answer; without its workers it could not."""
    os.setpgrp()


def load(dataset: CocoDataset, batches, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Load `batches`, lists of Requests, in their order, by so many worker processes (0: by this one)."""
    try:
        yield from DataLoader(dataset, batch_size=None, sampler=batches, num_workers=num_workers, pin_memory=pin_memory,
                              worker_init_fn=in_a_group_of_its_own)
    except DataError as error:  # a worker's comes with its traceback in the message
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


def open_split(name: str, run, kind: str, split: str = "") -> CocoDataset:
    """A split of the data set `name`: a COCO-format folder, or "shapes", which is generated in RUN/data on first use."""
    if name == "shapes":
        name = Path(run) / "data"
        make_shapes(name)
    json_file, folder = find_split(name, kind, split)
    dataset = CocoDataset(read_annotations(json_file), folder)
    missing = dataset.missing()
    if len(missing):
        raise DataError(f"{dataset.image_path(missing[0])}: no such image file, and {len(missing)} of {len(dataset)} in all; complete "
                        f"the folder, or leave them out: python data.py {name} --split {split_of(json_file)} --fix OUT.json")
    return dataset


# --- 4. checking ------------------------------------------------------------------------------------------------------

def find_problems(dataset: CocoDataset) -> list[Problem]:
    """All that is doubtful in readable annotations, and image files that are not there. No image is opened."""
    a, problems = dataset.annotations, []
    image = a.image

    def tell(rows, what, example, then, remedy):
        if len(rows):
            problems.append(Problem(what, len(rows), [example(i) for i in rows[:3]], then, remedy))

    def of_image(i):
        return f"{brief(str(a.file_names[i]))} (image {a.image_ids[i]})"

    def of_box(k):
        x0, y0, x1, y1 = a.boxes[k].tolist()
        return (f"{of_image(image[k])}, annotation {a.annotation_ids[k]}: bbox [{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}] "
                f"in {a.sizes[image[k], 1]} x {a.sizes[image[k], 0]} pixels")

    tell(dataset.missing(), "image files are not there", lambda i: f"{brief(dataset.image_path(i))} (image {a.image_ids[i]})",
         STOPS, "complete the folder, or let --fix leave these images out")
    if len(dataset.boxes.labels) == 0:
        problems.append(Problem("split without a box that can be learned", 1, [a.path], "stops; as a val split, its figures are -1",
                                "annotate objects; if there are boxes, see the other problems"))
    for reason, rows in dataset.faults.items():
        tell(np.flatnonzero(rows), reason, of_box, "does not learn them; evaluation counts them as objects not found",
             "correct them, or let --fix leave them out")
    height, width = a.sizes[image].T
    with np.errstate(over="ignore", invalid="ignore"):
        beyond = (np.abs(a.boxes - clip(a)) > 1).any(axis=1) & ~np.logical_or.reduce(list(dataset.faults.values()))
        # Read as x0, y0, x1, y1, do nearly all boxes fit their image, where as x, y, width, height many do not?
        xyxy = np.concatenate([a.boxes[:, :2], a.boxes[:, 2:] - a.boxes[:, :2]], axis=1)
        would_fit = (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1) & (xyxy[:, 2] <= width + 1) & (xyxy[:, 3] <= height + 1)
    if len(beyond) and beyond.mean() > 0.1 and would_fit.mean() > 0.95:
        tell(np.flatnonzero(beyond), "boxes leave their image, but would not if bbox were [x0, y0, x1, y1]", of_box,
             "learns them as [x, y, width, height], cut at the image's edge: boxes that are too large",
             "look at the picture; if so, write bbox as [x0, y0, x1 - x0, y1 - y0]")
    else:
        tell(np.flatnonzero(beyond), "boxes reach more than a pixel beyond their image", of_box, "learns the part inside",
             "check that the image has the size it was annotated in; --fix cuts them")
    tell(np.flatnonzero(a.crowd), "crowd boxes", of_box, "does not learn them; evaluation ignores detections in them",
         "none needed")
    counts = np.diff(dataset.boxes.first)
    tell(np.flatnonzero(counts == 0), "images without a box to learn", of_image, "does not see them; evaluation does",
         "none needed if they are empty")
    per_class = np.bincount(dataset.boxes.labels, minlength=len(a.category_ids))
    tell(np.flatnonzero(per_class == 0), "categories without a box to learn",
         lambda c: f"{brief(a.category_names[c])} (category {a.category_ids[c]})", "never detects them",
         "add boxes, or take them out")
    _, first, several = np.unique(a.category_names, return_index=True, return_counts=True)
    tell(first[several > 1], "category names stand for several categories", lambda c: brief(a.category_names[c]),
         "takes them for different classes", "give each a name of its own, or merge them")
    _, first, several = np.unique(a.file_names, return_index=True, return_counts=True)
    tell(first[several > 1], "image files are listed under several ids", of_image,
         "learns each entry as an image of its own, in which the boxes of the other are background", "merge the entries")
    ids, several = np.unique(a.annotation_ids, return_counts=True)
    tell(np.flatnonzero(np.isin(a.annotation_ids, ids[several > 1]) | (a.annotation_ids == -1)),
         "annotations have no id, or one that another has", of_box, "does not need it; other COCO tools do",
         "--fix numbers them anew")
    return problems


def check_images(dataset: CocoDataset) -> tuple[list[Problem], np.ndarray, list[bytes]]:
    """Decode every image as training does. Returns problems, indices of images it would stop at, hash of each file."""
    def check(i):
        path, upright = dataset.image_path(i), True
        try:
            dataset.image(i)
        except DataError as error:
            return str(error), upright, b""
        with suppress(Exception), Image.open(path) as picture:  # Pillow may refuse what torchvision decodes
            if picture.size == tuple(dataset.annotations.sizes[i, ::-1].tolist()):
                upright = picture.getexif().get(0x0112, 1) not in range(2, 9)
        return None, upright, hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        errors, upright, hashes = zip(*threads.map(check, range(len(dataset))))
    bad, problems = np.array([i for i, error in enumerate(errors) if error], dtype=np.int64), []
    if len(bad):
        problems.append(Problem("images cannot be used", len(bad), [errors[i] for i in bad[:3]], "stops where it meets the first",
                                "see each; --images --fix leaves them out"))
    if not all(upright):
        examples = [dataset.image_path(i) for i in np.flatnonzero(~np.array(upright))[:3]]
        problems.append(Problem("images have an EXIF note that turns them, but width and height of the pixels as stored",
                                upright.count(False), examples, "takes the boxes as drawn on the pixels as stored, as COCO "
                                "tools do", "look at the picture; if boxes are astray, save the files upright"))
    return problems, bad, list(hashes)


def compare_splits(train_and_hashes, val_and_hashes) -> list[Problem]:
    """Problems between the two splits of a data set, each with the hashes of its files (or none)."""
    (train, train_hashes), (val, val_hashes), problems = train_and_hashes, val_and_hashes, []
    ours, theirs = (list(zip(d.annotations.category_ids, d.annotations.category_names)) for d in (train, val))
    if ours != theirs:
        differ = sorted(set(ours) ^ set(theirs)) or ours
        examples = [f"{id} {brief(name)} is in {'train' if (id, name) in ours else 'val'} alone" for id, name in differ[:3]]
        problems.append(Problem("categories differ between train and val", len(differ), examples, STOPS,
                                "give both files the same list of categories"))
    seen = {digest: i for i, digest in enumerate(train_hashes) if digest}
    shared = [(seen[digest], i) for i, digest in enumerate(val_hashes) if digest in seen]
    if shared:
        examples = [f"{train.image_path(i)} and {val.image_path(j)}" for i, j in shared[:3]]
        problems.append(Problem("images of val are in train as well", len(shared), examples,
                                "learns what it is evaluated on: its figures are too good", "take them out of one of the splits"))
    return problems


def describe_dropped(dataset: CocoDataset) -> str:
    """What training begins with, in three lines: what it learns, what it leaves out or doubts, where to read more."""
    a = dataset.annotations
    lines = [f"{a.path}: {len(dataset.with_boxes())} of {len(dataset)} images, {len(dataset.boxes.labels)} of {len(a.labels)} "
             f"boxes, {len(a.category_ids)} classes to learn"]
    problems = find_problems(dataset)
    if problems:
        lines += ["left out or doubtful: " + "; ".join(f"{p.count} {p.what}" for p in problems),
                  f"examples and remedies: python data.py {Path(a.path).parent.parent} --split {split_of(a.path)}"]
    return "\n".join(lines)


def count_locations(boxes: Boxes, sizes, after) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many locations are positive for each box, and how many of them it keeps against smaller boxes.

    The rules are those at the top of assign.py, with center sampling of radius 1.5, applied to unflipped images of `sizes`
    (I, 2) resized to `after` (I, 2). Returns claimed (B,), kept (B,), and the longer side of each box (B,). P are the boxes
    of a portion, K their claims.
    """
    image = np.repeat(np.arange(len(sizes)), np.diff(boxes.first))                      # (B,)
    box = boxes.boxes * np.tile((after / sizes)[:, ::-1], 2)[image].astype(np.float32)   # (B, 4)
    start, end, middle = box[:, :2], box[:, 2:], (box[:, :2] + box[:, 2:]) / 2           # (B, 2): x, y
    order = np.lexsort(((end - start).prod(axis=1), image))                              # in an image, smallest first
    window = np.argwhere(np.ones((3, 3)))            # (9, 2): no other cell's centre is within 1.5 strides of the middle
    claimed, kept = np.zeros((2, len(box)), dtype=np.int64)
    edges = np.unique(np.searchsorted(boxes.first, np.arange(0, len(box), 50_000)))      # portions: memory stays small
    for part in np.split(order, boxes.first[edges[1:]]):                                 # (P,)
        for level in range(5):
            stride, low, high = 8 << level, 32 << level if level else -1, 64 << level if level < 4 else np.inf
            lower = np.maximum(start, middle - 1.5 * stride)[part, None]                  # (P, 1, 2)
            upper = np.minimum(end, middle + 1.5 * stride)[part, None]
            cell = np.floor(lower / stride + 0.5).astype(int) + window                    # (P, 9, 2)
            centre = (cell + np.float32(0.5)) * stride
            farthest = np.maximum(centre - start[part, None], end[part, None] - centre).max(axis=2)  # (P, 9): max(l, t, r, b)
            positive = ((centre > lower) & (centre < upper)).all(axis=2) & (farthest >= low) & (farthest <= high)
            b, n = positive.nonzero()                                                     # (K,)
            # Of those who claim a cell the first wins, which is the smallest.
            _, winner = np.unique((image[part[b]] << 32) + (cell[b, n, 0] << 16) + cell[b, n, 1], return_index=True)
            claimed[part] += positive.sum(axis=1)
            kept[part] += np.bincount(b[winner], minlength=len(part))
    return claimed, kept, (end - start).max(axis=1)


def bars(title, names, counts) -> list[str]:
    """A table with a bar for each row."""
    widest, total, most = max(map(len, names)), max(1, sum(counts)), max(1, *counts)
    return [f"\n  {title}"] + [f"    {name:<{widest}} {count:9,d} {count / total:5.0%} {'#' * math.ceil(40 * count / most)}"
                               for name, count in zip(names, counts)]


def describe(dataset: CocoDataset, short_side, long_side) -> str:
    """What is in a split, as half a page of text."""
    def histogram(title, names, values, edges):
        return bars(title, names, np.bincount(np.digitize(values, edges), minlength=len(names)).tolist())

    a, boxes = dataset.annotations, dataset.boxes
    lines = [f"{a.path}: {len(a.image_ids):,d} images, {len(a.labels):,d} boxes of {len(a.category_ids)} categories; "
             f"to learn: {len(boxes.labels):,d} boxes in {len(dataset.with_boxes()):,d} images"]
    lines += histogram("boxes in an image", ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128 and more"],
                       np.diff(boxes.first), [1, 2, 4, 8, 16, 32, 64, 128])
    per_class = np.bincount(boxes.labels, minlength=len(a.category_ids))
    order = np.argsort(-per_class, kind="stable")
    shown = order if len(order) <= 16 else np.concatenate([order[:10], order[-6:]])
    lines += bars("boxes of a category" + " (the 10 commonest and the 6 rarest)" * (len(order) > 16),
                  [brief(a.category_names[c])[1:-1] for c in shown], per_class[shown].tolist())
    lines += histogram("area, as COCO evaluates it", ["small  < 32 x 32", "medium < 96 x 96", "large"],
                       a.areas[~a.crowd], [32**2, 96**2])
    wh = boxes.boxes[:, 2:] - boxes.boxes[:, :2]
    lines += histogram("width : height", ["< 1:3", "1:3 to 1:1.5", "1:1.5 to 1.5:1", "1.5:1 to 3:1", "> 3:1"],
                       wh[:, 0] / wh[:, 1], [1 / 3, 1 / 1.5, 1.5, 3])
    after = np.array([resized(*size, short_side, long_side) for size in a.sizes.tolist()])
    claimed, kept, longest = count_locations(boxes, a.sizes, after)
    level = np.searchsorted([64, 128, 256, 512], longest / 2)
    lines += bars(f"level that learns the box's centre, images resized to {short_side} x {long_side} at most",
                  [f"P{i + 3}, stride {8 << i:3d}" for i in range(5)], np.bincount(level, minlength=5).tolist())
    none, covered = (claimed == 0).sum(), ((claimed > 0) & (kept == 0)).sum()
    return "\n".join(lines) + f"""
    No location learns {none:,d} boxes, too small or thin for every cell centre of the levels of their size, nor {covered:,d} more,
    whose locations all go to smaller boxes. Of all claims of boxes to locations {1 - kept.sum() / max(1, claimed.sum()):.1%} are lost to
    smaller boxes (ambiguous locations). Center sampling of radius 1.5; images enlarged to that size, too, and not flipped; other
    sizes: --short-side, --long-side."""


def draw_batches(dataset: CocoDataset, images, path, short_side, long_side):
    """Write a picture of three batches of `images` (indices) as the network sees them in training: sized, flipped, on their
    canvas (black: padding)."""
    names = dataset.annotations.category_names
    sampler = TrainSampler(dataset.annotations.sizes, images, batch_size=4, seed=0,
                           short_sides=(round(0.8 * short_side), short_side), long_side=long_side)
    rows = []
    for step in range(3):
        batch = dataset[sampler.global_batch(step)]
        scale = 320 / batch.images.shape[3]
        small = transforms.resize(batch.images, [round(batch.images.shape[2] * scale), 320], antialias=True)
        tiles = [draw_boxes(image, boxes * scale, labels.tolist(), [names[label] for label in labels])
                 for image, boxes, labels in zip(small, batch.boxes, batch.labels)]
        rows.append(make_grid(tiles, padding=3, pad_value=255))                             # (3, h, w)
    transforms.to_pil_image(torch.cat(rows, dim=1)).save(path)
    print(f"  3 batches of 4 as the network would see them, with sizes of 80% to 100%: {path}")


def draw_boxes(image: Tensor, boxes: Tensor, labels: list[int], texts: list[str]) -> Tensor:
    """Boxes (G, 4) on an image (3, h, w) uint8, each in the colour of its label and with its text."""
    if len(boxes) == 0:
        return image
    colours = [f"hsv({label * 222.5 % 360:.0f}, 100%, 75%)" for label in labels]
    texts = [ascii(text)[1:-1] for text in texts]  # torchvision's font has no other letters
    return draw_bounding_boxes(image, boxes, texts, colors=colours, width=2, fill_labels=True, label_colors="white")


def write_fixed(dataset: CocoDataset, out, without=()):
    """Write a copy of a JSON file that has no entry left out in reading, no faulty box, none of the images `without`
    (indices) and no box beyond its image; annotations are numbered from 1."""
    a, out = dataset.annotations, Path(out)
    if out.exists():
        raise DataError(f"{out}: exists already and is not overwritten; name a new file for --fix")
    with open(a.path, encoding="utf-8-sig") as file:
        content = json.load(file)  # once more, with its polygons
    clipped = clip(a)
    good = ~np.logical_or.reduce([np.isin(a.image, without), *dataset.faults.values()])
    annotations = []
    for k in np.flatnonzero(good)[a.rows["annotations"][good].argsort()]:
        entry, (x0, y0, x1, y1) = content["annotations"][a.rows["annotations"][k]], clipped[k].tolist()
        if (clipped[k] != a.boxes[k]).any():
            entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        entry |= {"id": len(annotations) + 1, "area": min(a.areas[k].item(), (x1 - x0) * (y1 - y0)), "iscrowd": int(a.crowd[k])}
        annotations.append(entry)
    before = {table: len(content[table]) for table in FIELDS}
    content = content | {"images": [content["images"][i] for i in np.delete(a.rows["images"], without)], "annotations": annotations,
                         "categories": [content["categories"][i] for i in a.rows["categories"]]}
    unfinished = out.with_name(out.name + ".part")
    try:
        unfinished.write_text(json.dumps(content))
        unfinished.replace(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); name another file for --fix") from None
    print(f"{out}: written, with " + ", ".join(f"{len(content[table]):,d} of {n:,d} {table}" for table, n in before.items()) +
          f"; {a.path} is as it was. To train with it, put it in its place")


# --- the generated data set -------------------------------------------------------------------------------------------

SHAPES = ("rectangle", "ellipse", "triangle")


def make_shapes(root, num_train=1500, num_val=200, size=128, seed=0):
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
            w, h = np.exp(random.uniform(np.log(18), np.log(0.75 * size))) * np.exp(random.uniform(-0.5, 0.5, 2) * [1, -1])
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


# --- command line -----------------------------------------------------------------------------------------------------

def make_folder(path, option) -> Path:
    """A folder to write to, proven before the work whose results go there; `option` names it on the command line."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise DataError(f"{path}: no folder that can be written to ({error.strerror}); name another with {option}") from None
    return Path(path)


def sentence(error: Exception) -> str:
    """What a command says of an error that ends it. The system names a full disk, but not what to do."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"error: {error}" + "; free some space and run this again (training: with --resume, if it had begun)" * full


def check_split(args, kind) -> tuple[CocoDataset, list[bytes], list[Problem]]:
    """Read, describe and draw one split, and write its repaired copy."""
    json_file, folder = find_split(args.dir, kind, args.split)
    problems, hashes = [], []
    dataset = CocoDataset(read_annotations(json_file, problems), folder)
    problems += find_problems(dataset)
    bad = dataset.missing()
    if args.images:
        found, bad, hashes = check_images(dataset)
        problems += found
    print(describe(dataset, args.short_side, args.long_side) + "\n")
    drawable = np.setdiff1d(dataset.with_boxes(), bad)
    if len(drawable):
        try:
            draw_batches(dataset, drawable, args.out / f"{split_of(json_file)}.png", args.short_side, args.long_side)
        except DataError as error:
            problems.append(Problem("image that was to be drawn cannot be used", 1, [str(error)], "stops where it meets it",
                                    "--images looks at all of them"))
    print()
    if args.fix:
        write_fixed(dataset, args.fix, bad)
    return dataset, hashes, problems


def print_problems(problems: list[Problem]):
    for p in sorted(problems, key=lambda p: not p.stops):
        print(f"{'ERROR' if p.stops else 'NOTE'}: {p.count:,d} {p.what}")
        for example in p.examples:
            print(f"    {example}")
        if p.count > len(p.examples):
            print("    ...")
        print(f"  training: {p.then}\n  remedy: {p.remedy}\n")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Check a COCO-format data set: what would training do with it?")
    parser.add_argument("dir", nargs="?", help="folder with annotations/instances_<split>.json and the image folders (default: "
                        "generated shapes)")
    parser.add_argument("--split", default="", help="check this one alone (default: the train and the val split that training takes)")
    parser.add_argument("--images", action="store_true", help="decode every image as training does, and compare files by content")
    parser.add_argument("--fix", metavar="OUT.json", help="write a copy of the split's JSON without what cannot be used")
    parser.add_argument("--out", default="runs/check", help="folder for pictures of annotated images (default: runs/check)")
    parser.add_argument("--short-side", type=int, default=800, help="pixels after resizing (default: 800)")
    parser.add_argument("--long-side", type=int, default=1333, help="pixels after resizing, at most (default: 1333)")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    if args.fix and not args.split:
        raise DataError("--fix repairs one file; name it with --split")
    if min(args.short_side, args.long_side) < 1:
        raise DataError("--short-side and --long-side must be >= 1")
    args.out = make_folder(args.out, "--out")
    if args.dir is None:
        args.dir = args.out / "shapes"
        make_shapes(args.dir)
    checked, problems = [], []
    for kind in ("split",) if args.split else ("train", "val"):
        try:
            dataset, hashes, found = check_split(args, kind)
            checked.append((dataset, hashes))
        except DataError as error:
            found = [Problem("file cannot be used", 1, [str(error)], STOPS, "see there")]
        print_problems(found)
        problems += found
    if len(checked) == 2:
        found = compare_splits(*checked)
        print_problems(found)
        problems += found
    if not args.images:
        print("Images were not opened; --images decodes them all.")
    stops = any(p.stops for p in problems)
    print("Training cannot start." if stops else "Training can start; read the notes above." if problems else "Clean.")
    return 2 if stops else 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, OSError) as error:
        print(sentence(error), file=sys.stderr)
        sys.exit(2)
