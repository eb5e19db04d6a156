"""check_data.py: what is in a COCO-format data set, and what would training do with it?

    python tools/check_data.py DIR                          judged as the demo would train on it
    python tools/check_data.py DIR fcos_R_50_FPN_1x --images            decode every image, too
    python tools/check_data.py DIR --train-short-sides 600 800 --long-side 1200    other sizes
    python tools/check_data.py DIR --split train --fix train_fixed.json       a repaired copy

It prints what the splits hold, then every kind of damage with its count, three examples, what
training does with it, and a remedy; and draws three training batches of each split.

    ERROR   training stops at it          exit code 2
    NOTE    training goes on, but look    exit code 0, or 1 with --strict
    INFO    nothing to do                 exit code 0
"""

import argparse
import hashlib
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from assign import CELLS_IN_RANGE, STRIDES  # noqa: E402
from data import CocoDataset, UserError  # noqa: E402
from model import atomic_write  # noqa: E402

EXIF_ORIENTATION = 0x0112


class Problem(NamedTuple):
    """One kind of damage."""
    level: str               # ERROR, NOTE or INFO
    what: str
    examples: list[str]
    training: str            # what training does with it
    remedy: str


class Findings(list):
    """The problems of a split."""

    def add(self, level, entries, what, example, training, remedy):
        """Report `entries`, if there are any; example(entry) describes one of them."""
        if len(entries):
            examples = [example(entry) for entry in entries[:3]] + ["..."] * (len(entries) > 3)
            what = f"{what}: {len(entries):,d}"
            self.append(Problem(level, what, examples, training, remedy))

    def print(self):
        for level in ("ERROR", "NOTE", "INFO"):
            for p in (p for p in self if p.level == level):
                print(f"\n{level}: {p.what}", *p.examples, sep="\n    ")
                print(f"  training: {p.training}\n  remedy: {p.remedy}")


class Split(NamedTuple):
    """What is left of a split without the entries that are not COCO format."""
    kind: str                # train or val
    dataset: CocoDataset
    rows: dict[str, list]    # table -> its usable entries in the file; annotations sorted by image
    annotation_ids: list     # as written, None where there is none
    findings: Findings


# --- reading ------------------------------------------------------------------------------------

def usable_rows(content: dict, findings: Findings) -> dict[str, list[int]]:
    """The entries of each table that the reader accepts; the others are findings."""
    usable = {table: np.ones(len(content[table]), bool) for table in data.FIELDS}

    def report(level, table, rows, what, key, training, remedy):
        def example(i):
            entry = content[table][i]
            value = f"{key} {entry[key]!r:.60}" if key in entry else f"no {key}"
            return f"{table}[{i}] (id {entry.get('id')!r:.30}): {value}"

        findings.add(level, rows, f"{table} {what}", example, training, remedy)

    def refuse(table, rows, what, key):
        report("ERROR", table, rows, what, key, "stops at the first one",
               "correct them, or leave them out with --fix")
        usable[table][rows] = False

    def column(table, key):
        """The (row, value) pairs of entries that are still usable."""
        return [(i, content[table][i][key]) for i in np.flatnonzero(usable[table]).tolist()]

    for table, tests in data.FIELDS.items():
        for key, (valid, expected, default) in tests.items():
            bad = [i for i, e in enumerate(content[table]) if not valid(e.get(key, default))]
            refuse(table, bad, f"whose {key} is not {expected}", key)
    order = {}
    for table, key in (("images", "image_id"), ("categories", "category_id")):
        first = {}
        again = [i for i, id in column(table, "id") if first.setdefault(id, i) != i]
        refuse(table, again, "that have the id of another", "id")
        unknown = [i for i, id in column("annotations", key) if id not in first]
        refuse("annotations", unknown, f"whose {key} is not among the usable {table}", key)
        order[table] = first
    image_of = {i: order["images"][id] for i, id in column("annotations", "image_id")}
    rows = {table: np.flatnonzero(mask).tolist() for table, mask in usable.items()}
    rows["annotations"].sort(key=image_of.get)  # as the reader does

    boxes = dict(column("annotations", "bbox"))
    tiny = [i for i, box in boxes.items() if all(abs(x) <= 1 for x in box)]
    many = len(tiny) > len(boxes) / 2  # as the reader decides
    if many:
        rows["annotations"] = sorted(boxes.keys() - tiny, key=lambda i: (image_of[i], i))
    report("ERROR" if many else "NOTE", "annotations",
           tiny if many else [i for i in tiny if min(boxes[i][2:]) > 0],
           "whose bbox seems to be normalised, as no number in it is above 1", "bbox",
           "stops" if many else "learns no box of a pixel; evaluation counts it as not found",
           "multiply x and width by the width of the image, y and height by its height")
    return rows


def read_split(kind, json_file, folder, findings: Findings) -> Split:
    content = data.read_json(json_file)
    rows = usable_rows(content, findings)
    usable = {table: [content[table][i] for i in rows[table]] for table in data.FIELDS}
    for table in ("images", "categories"):
        if not usable[table]:
            raise UserError(f"{json_file}: none of its {len(content[table])} {table} can be used")
    annotations = data.read_annotations(json_file, usable)
    ids = [entry.get("id") for entry in usable["annotations"]]
    return Split(kind, CocoDataset(annotations, folder), rows, ids, findings)


# --- findings -----------------------------------------------------------------------------------

def check_annotations(split: Split, config: train.TrainConfig):
    """What is doubtful in annotations that can be read. No image is opened."""
    dataset, add, a = split.dataset, split.findings.add, split.dataset.annotations

    def of_image(i):
        return f"{a.file_names[i]} (image {a.image_ids[i]})"

    def of_box(k):
        x0, y0, x1, y1 = a.boxes[k].tolist()
        height, width = a.sizes[a.image[k]].tolist()
        return (f"{of_image(a.image[k])}, annotation {split.annotation_ids[k]!r:.30}: bbox "
                f"[{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}] in {width} x {height} pixels")

    if not len(dataset.labels):
        stops = split.kind == "train"
        add("ERROR" if stops else "NOTE", [a.path], "splits without a box to learn", str,
            "stops" if stops else "goes on, but the figures of the evaluation are -1",
            "annotate objects; where there are boxes, see the other findings")

    # boxes that are not learned, each with one reason
    left, finite = ~data.learnable(a), np.isfinite(a.boxes).all(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        sides = a.boxes[:, 2:] - a.boxes[:, :2]
    for what, rows in (("boxes with a coordinate that is not finite", ~finite),
                       ("boxes of negative width or height", (sides < 0).any(axis=1)),
                       ("boxes without width or height", (sides == 0).any(axis=1)),
                       ("boxes outside their image", np.ones(len(left), bool))):
        add("NOTE", np.flatnonzero(left & rows), what, of_box,
            "does not learn them; evaluation counts each as an object that was not found",
            "correct them, or leave them out with --fix")
        left &= ~rows

    # boxes that are learned in part
    height, width = a.sizes[a.image].T
    with np.errstate(over="ignore", invalid="ignore"):
        beyond = (np.abs(a.boxes - inside(a)) > 1).any(axis=1) & data.learnable(a)
        x0, y0, x1, y1 = np.concatenate([a.boxes[:, :2], sides], axis=1).T  # if bbox were xyxy
        would_fit = (x1 > x0) & (y1 > y0) & (x1 <= width + 1) & (y1 <= height + 1)
    if len(beyond) and beyond.mean() > 0.1 and would_fit.mean() > 0.95:
        add("NOTE", np.flatnonzero(beyond), "boxes that leave their image, but would not if bbox "
            "were [x0, y0, x1, y1]", of_box, "takes bbox for [x, y, width, height]: the boxes are "
            "too large", "look at the picture; if so, write [x0, y0, x1 - x0, y1 - y0]")
    else:
        add("NOTE", np.flatnonzero(beyond), "boxes that reach more than a pixel beyond their image",
            of_box, "learns the part inside, but evaluation judges the whole box as written, so "
            "that a perfect detector of the visible part scores low", "check that the image has "
            "the size it was annotated in; cut the boxes with --fix, in the val split, too")
    add("INFO", np.flatnonzero(a.crowd), "crowd boxes", of_box,
        "does not learn them; evaluation ignores detections in them", "none needed")

    counts = np.diff(dataset.first)
    add("INFO", np.flatnonzero(counts == 0), "images without a box to learn", of_image,
        "leaves them out; evaluation detects in them, too", "none needed if they are empty")
    per_category = np.bincount(dataset.labels, minlength=len(a.category_ids))
    add("NOTE" if split.kind == "train" else "INFO", np.flatnonzero(per_category == 0),
        "categories without a box to learn",
        lambda c: f"{a.category_names[c]} (category {a.category_ids[c]})",
        "never detects them" if split.kind == "train" else "is not affected; no figures for them",
        "annotate them, or take them out of both splits")
    for values, what, training, remedy in (
            (a.category_names, "category names used more than once",
             "takes them for different classes", "rename the categories, or merge them"),
            (a.file_names, "image files listed more than once",
             "takes each entry for an image of its own, in which the boxes of the others are "
             "background", "merge the entries")):
        unique, number = np.unique(values, return_counts=True)
        add("NOTE", unique[number > 1], what, str, training, remedy)
    seen, unnumbered = set(), []
    for k, id in enumerate(split.annotation_ids):
        if type(id) is not int or id < 1 or id in seen:
            unnumbered.append(k)
        else:
            seen.add(id)
    add("NOTE", unnumbered, "annotations whose id is missing, below 1, no integer, or that of "
        "another", of_box, "does not use it, nor does evaluation; other COCO tools do",
        "number them with --fix")

    if split.kind == "train" and len(dataset.labels):
        check_locations(split, config)


def check_locations(split: Split, config: train.TrainConfig):
    """Boxes that get no location at the sizes that training uses."""
    without, boxes = train.count_without_location(split.dataset, config)
    if without:
        split.findings.append(Problem(
            "ERROR" if without == boxes else "NOTE",
            f"boxes that no location learns: {without:,d} of the {boxes:,d} in the images sampled",
            [describe_sizes(config)], "stops" if without == boxes else
            "learns nothing from them; evaluation counts them all the same",
            "raise --train-short-sides" + ("" if config.model.enlarge else ", with --enlarge where "
            "images are smaller") + "; boxes hidden behind smaller ones stay without"))


def describe_sizes(config: train.TrainConfig) -> str:
    low, high = config.train_short_sides
    return (f"training resizes to a short side of {low}{f' to {high}' if high > low else ''}, a "
            f"long side of at most {config.model.long_side} pixels"
            f"{'' if config.model.enlarge else ', never enlarges'}, center sampling "
            f"{f'of radius {config.center_radius:g}' if config.center_radius else 'off'}")


def inside(a: data.Annotations) -> np.ndarray:
    """`data.clip` in float64, (A, 4): an uncut number stays as it was written."""
    return a.boxes.clip(0, a.sizes[a.image][:, [1, 0, 1, 0]])


def check_images(split: Split, decode: bool) -> tuple[np.ndarray, dict[bytes, str]]:
    """Look for every image file, and decode it as training does.

    Returns the indices of images that cannot be used, and content hash -> path of the decoded.
    """
    dataset = split.dataset

    def inspect(i):
        path, size = dataset.image_path(i), tuple(dataset.annotations.sizes[i, ::-1].tolist())
        if not os.path.isfile(path):
            return f"{path}: no such image file", False, False, None
        if not decode:
            return None, False, False, None
        try:
            dataset.image(i)
        except UserError as error:
            return str(error), False, False, None
        with Image.open(path) as image:
            rotates = image.size == size and image.getexif().get(EXIF_ORIENTATION) in range(2, 9)
            dark = image.mode.startswith("I;16") and np.asarray(image).max() < 2**12
        return None, rotates, dark, hashlib.sha256(Path(path).read_bytes()).digest()

    with ThreadPoolExecutor() as threads:
        errors, rotates, dark, digests = zip(*threads.map(inspect, range(len(dataset))))
    bad = np.array([i for i, error in enumerate(errors) if error], np.int64)
    add = split.findings.add
    add("ERROR", bad, "images that cannot be used", errors.__getitem__, "stops",
        "replace them, or leave them out with --images --fix")
    add("NOTE", np.flatnonzero(rotates), "images with an EXIF note that rotates them, listed with "
        "the size they have without it", dataset.image_path, "takes the boxes as drawn on the "
        "pixels as stored", "look at the picture; if the boxes are astray, save the files upright")
    add("NOTE", np.flatnonzero(dark), "images of 16 bits whose values fit in 12",
        dataset.image_path, "keeps the upper 8 of 16 bits, so they are nearly black",
        "multiply the values by 16, or save the files with 8 bits")
    return bad, {digest: dataset.image_path(i) for i, digest in enumerate(digests) if digest}


def compare(splits: list[Split], hashes: list[dict], findings: Findings):
    """What train and val should, and should not, have in common."""
    tables = [s.dataset.annotations for s in splits]
    ours, theirs = (set(zip(a.category_ids, a.category_names)) for a in tables)
    findings.add("ERROR", sorted(ours ^ theirs), "categories of only one of train and val",
                 lambda c: f"{c[0]} {c[1]} is only in {'train' if c in ours else 'val'}",
                 "stops", "give both files the same list of categories")
    shared = [(hashes[0][d], hashes[1][d]) for d in hashes[1] if d in hashes[0]]
    findings.add("NOTE", shared, "images of val that are in train, too", " = ".join,
                 "learns what it is evaluated on, so that the figures are too good",
                 "take them out of one of the splits")


# --- description --------------------------------------------------------------------------------

def bars(title, names, counts, total) -> list[str]:
    """A row with a bar for each name; percentages are of `total`."""
    widest, highest = max(map(len, names)), max(1, *counts)
    return [f"  {title}"] + [
        f"    {name:<{widest}} {count:9,d} {count / max(1, total):5.0%} "
        f"{'#' * math.ceil(30 * count / highest)}".rstrip() for name, count in zip(names, counts)]


def describe(dataset: CocoDataset, config: train.TrainConfig) -> str:
    """What is in a split, as half a page of text."""
    def histogram(title, names, values, edges):
        counts = np.bincount(np.digitize(values, edges), minlength=len(names))
        return bars(title, names, counts.tolist(), len(values))

    a, counts = dataset.annotations, np.diff(dataset.first)
    lines = [f"{a.path}: {len(dataset):,d} images, {len(a.labels):,d} boxes of "
             f"{len(a.category_ids)} categories; to learn: {len(dataset.labels):,d} boxes in "
             f"{len(dataset.with_boxes()):,d} images"]
    lines += histogram("boxes of an image", ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63",
                                             "64 or more"], counts, [1, 2, 4, 8, 16, 32, 64])
    of_category = np.bincount(dataset.labels, minlength=len(a.category_ids))
    order = np.argsort(-of_category, kind="stable")
    shown = order if len(order) <= 16 else np.concatenate([order[:10], order[-6:]])
    lines += bars("boxes of a category" + " (the 10 most and the 6 least frequent)" * (
        len(order) > 16), [a.category_names[c][:40] for c in shown], of_category[shown].tolist(),
        len(dataset.labels))
    lines += histogram("area, as COCO evaluates it", ["small  < 32 x 32", "medium < 96 x 96",
                                                      "large"], a.areas[~a.crowd], [32**2, 96**2])
    w, h = (dataset.boxes[:, 2:] - dataset.boxes[:, :2]).T
    lines += histogram("width : height", ["< 1:3", "1:3 to 1:1.5", "1:1.5 to 1.5:1",
                                          "1.5:1 to 3:1", "> 3:1"], w / h, [1/3, 1/1.5, 1.5, 3])
    short_side = sum(config.train_short_sides) // 2
    scale = np.array([min(data.resized(*size, short_side, config.model.long_side,
                                       config.model.enlarge)) / min(size)
                      for size in a.sizes.tolist()])
    lines += histogram(f"level that learns the centre of a box, at a short side of {short_side}",
                       [f"P{i + 3}, stride {stride}" for i, stride in enumerate(STRIDES)],
                       np.maximum(w, h) / 2 * np.repeat(scale, counts),
                       [CELLS_IN_RANGE * stride for stride in STRIDES[:-1]])
    return "\n".join(lines)


def draw_batches(dataset: CocoDataset, images, config: train.TrainConfig, path):
    """Draw three batches of `images` as the network sees them in training (black: padding)."""
    names, rows, side = dataset.annotations.category_names, [], 320
    sampler = data.TrainSampler(
        dataset.annotations.sizes, images, 4, config.seed, config.train_short_sides,
        config.model.long_side, config.model.enlarge, config.flip, config.canvas_sides)
    for step in range(3):
        batch = dataset.load(sampler.global_batch(step))
        parts = zip(batch.images, batch.boxes.split(batch.counts), batch.labels.split(batch.counts))
        rows.append(make_grid([evaluate.draw(image, boxes, labels, [names[i] for i in labels], side)
                               for image, boxes, labels in parts], padding=6, pad_value=255))
    width = max(row.shape[2] for row in rows)
    rows = [transforms.pad(row, [0, 0, width - row.shape[2], 0], fill=255) for row in rows]
    picture = transforms.to_pil_image(torch.cat(rows, dim=1))
    atomic_write(path, lambda file: picture.save(file, "PNG"))
    print(f"  three training batches of four images: {path}")


# --- repair -------------------------------------------------------------------------------------

def write_fixed(split: Split, left_out, out):
    """Write a copy of the JSON without unusable entries, faulty boxes and the images `left_out`.

    Boxes are cut at the image, annotations numbered from 1; everything else stays as it was.
    """
    a, boxes = split.dataset.annotations, inside(split.dataset.annotations)
    with open(a.path, encoding="utf-8-sig") as file:
        content = json.load(file)  # once more, with its polygons
    annotations = []
    for k in np.flatnonzero(data.learnable(a) & ~np.isin(a.image, left_out)).tolist():
        entry, (x0, y0, x1, y1) = content["annotations"][split.rows["annotations"][k]], boxes[k]
        if (boxes[k] != a.boxes[k]).any():
            entry["bbox"] = [float(x) for x in (x0, y0, x1 - x0, y1 - y0)]
        annotations.append(entry | {
            "id": len(annotations) + 1, "iscrowd": int(a.crowd[k]),
            "area": float(min(a.areas[k], (x1 - x0) * (y1 - y0)))})
    images = [content["images"][row] for row in np.delete(split.rows["images"], left_out)]
    if not images:
        raise UserError(f"{out}: not written, as no image of {a.path} can be used; replace them")
    fixed = content | {"images": images, "annotations": annotations,
                       "categories": [content["categories"][i] for i in split.rows["categories"]]}
    atomic_write(out, lambda file: file.write(json.dumps(fixed).encode()))
    kept = ", ".join(f"{len(fixed[t]):,d} of {len(content[t]):,d} {t}" for t in data.FIELDS)
    print(f"\n{out}: written, with {kept}; to train with it, put it in the place of {a.path}")


# --- command line -------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], usage="%(prog)s DIR [PRESET] [options]",
        allow_abbrev=False, epilog="A preset (default: demo) and all options of train.py can "
        "follow: sizes, center sampling and splits are those that it would train with.")
    parser.add_argument("dir", help="COCO-format folder")
    parser.add_argument("--split", default="", metavar="NAME",
                        help="check this one alone (default: the two that training uses)")
    parser.add_argument("--images", action="store_true",
                        help="decode every image, and look for images of val in train")
    parser.add_argument("--fix", metavar="OUT.json", help="write a repaired copy of the split")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a NOTE")
    parser.add_argument("--out", default="runs/check", metavar="DIR",
                        help="folder for the pictures (default: runs/check)")
    args, rest = parser.parse_known_args(argv)
    config = train.parse_arguments([*rest, "--data", args.dir]).config
    if args.fix and not args.split:
        raise UserError("--fix repairs one file; name it with --split")
    if args.fix and os.path.lexists(args.fix):
        raise UserError(f"{args.fix}: exists and is not overwritten; name a new file for --fix")
    out = evaluate.make_folder(args.out, "--out")

    print(describe_sizes(config))
    splits, hashes, levels = [], [], set()
    kinds = ["val" if args.split.startswith("val") else "train"] if args.split else ["train", "val"]
    for kind in kinds:
        print()
        findings, name = Findings(), args.split or getattr(config, f"{kind}_split")
        try:
            split = read_split(kind, *data.find_split(args.dir, kind, name), findings)
            print(describe(split.dataset, config), flush=True)
            check_annotations(split, config)
            unusable, found = check_images(split, args.images)
            splits.append(split)
            hashes.append(found)
            drawable = np.setdiff1d(split.dataset.with_boxes(), unusable)
            if len(drawable):
                path = Path(split.dataset.annotations.path)
                draw_batches(split.dataset, drawable, config,
                             out / f"{path.stem.removeprefix('instances_')}.png")
        except UserError as error:
            findings.append(Problem("ERROR", str(error), [], "stops", "as the sentence says"))
        findings.print()
        levels |= {p.level for p in findings}
    if len(splits) == 2:
        findings = Findings()
        compare(splits, hashes, findings)
        findings.print()
        levels |= {p.level for p in findings}
    if args.fix:
        if not splits:
            raise UserError(f"{args.fix}: not written, as the split cannot be read; see above")
        write_fixed(splits[0], unusable, args.fix)

    if not args.images:
        print("\nNo image was decoded; --images decodes them all.")
    print("\nTraining stops at the errors above." if "ERROR" in levels else
          "\nTraining can start; read the notes above." if "NOTE" in levels else
          "\nTraining can start; nothing is wrong.")
    sys.exit(2 if "ERROR" in levels else 1 if "NOTE" in levels and args.strict else 0)


if __name__ == "__main__":
    evaluate.run_program(main)
