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
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import plots  # noqa: E402
import train  # noqa: E402
from data import CocoDataset, UserError  # noqa: E402
from model import atomic_write  # noqa: E402

EXIF_ORIENTATION = 0x0112
LEVELS = ("ERROR", "NOTE", "INFO")


class Findings(list):
    """The kinds of damage in a split: (level, text)."""

    def add(self, level, entries, what, example, training, remedy):
        """Report `entries`, if there are any; example(entry) describes one of them."""
        if len(entries):
            lines = [f"\n{level}: {what}: {len(entries):,d}"]
            lines += [f"    {example(entry)}" for entry in entries[:3] if example]
            lines += ["    ..."] if example and len(entries) > 3 else []
            lines += [f"  training: {training}", f"  remedy: {remedy}"]
            self.append((level, "\n".join(lines)))


def fault(table, entry, ids) -> tuple[str, str] | None:
    """Why the reader would refuse an entry, and the field; `ids` are those of usable entries."""
    for key, (valid, expected) in data.FIELDS[table].items():
        if not valid(entry.get(key)):
            return f"whose {key} is not {expected}", key
        if key == "id" and entry[key] in ids[table]:
            return "that have the id of another", key
    for key, of in (("image_id", "images"), ("category_id", "categories")):
        if key in data.FIELDS[table] and entry[key] not in ids[of]:
            return f"whose {key} is not among the usable {of}", key


def read_split(json_file, folder, add):
    """Read a split without the entries that the reader would refuse, which are reported.

    Returns the dataset, table -> rows of the file that are left, and the annotations as written;
    rows and annotations are in the order of the dataset, sorted by image.
    """
    content = data.read_json(json_file)
    rows, faults = {table: [] for table in data.FIELDS}, {}
    ids = {"images": {}, "categories": {}}  # id -> position among the usable
    for table in data.FIELDS:  # annotations come last
        for i, entry in enumerate(content[table]):
            if found := fault(table, entry, ids):
                faults.setdefault((table, *found), []).append(i)
                continue
            rows[table].append(i)
            if table in ids:
                ids[table][entry["id"]] = len(ids[table])

    annotations, usable = content["annotations"], rows["annotations"]
    usable.sort(key=lambda i: ids["images"][annotations[i]["image_id"]])  # as the reader does
    tiny = {i for i in usable if any(annotations[i]["bbox"])
            and all(abs(x) <= 1 for x in annotations[i]["bbox"])}
    if len(tiny) > len(usable) / 2:  # the reader refuses the file
        faults["annotations", "whose bbox seems to be normalised", "bbox"] = sorted(tiny)
        rows["annotations"] = [i for i in usable if i not in tiny]

    for (table, what, key), found in faults.items():
        def example(i):
            entry = content[table][i]
            return f"{table}[{i}] (id {entry.get('id')!r:.30}): {key} {entry.get(key)!r:.60}"

        add("ERROR", found, f"{table} {what}", example, "stops at the first one",
            "correct them, or leave them out with --fix")
    usable = {table: [content[table][i] for i in rows[table]] for table in data.FIELDS}
    dataset = CocoDataset(data.read_annotations(json_file, usable), folder)
    return dataset, rows, usable["annotations"]


@np.errstate(over="ignore", invalid="ignore")  # of boxes that are not finite
def check_annotations(dataset: CocoDataset, entries: list[dict], training: bool,
                      config: train.TrainConfig, add):
    """What is doubtful in annotations that can be read. No image is opened."""
    a = dataset.annotations

    def of_image(i):
        return f"{a.file_names[i]} (image {a.image_ids[i]})"

    def of_box(k):
        entry, (height, width) = entries[k], a.sizes[a.image[k]]
        return (f"{of_image(a.image[k])}, annotation {entry.get('id')!r:.30}: bbox "
                f"{entry['bbox']} in {width} x {height} pixels")

    if not len(dataset.labels):
        add("ERROR" if training else "NOTE", [a.path], "splits without a box to learn", str,
            "stops" if training else "goes on, but the figures of the evaluation are -1",
            "annotate objects; where there are boxes, see the other findings")

    # Boxes that are not learned, each with one reason, or only in part.
    learnable = data.learnable(a)
    xywh = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    left = ~learnable
    for what, rows in (("with a coordinate that is not finite", ~np.isfinite(xywh).all(axis=1)),
                       ("of negative width or height", (xywh[:, 2:] < 0).any(axis=1)),
                       ("without width or height", (xywh[:, 2:] == 0).any(axis=1)),
                       ("outside their image", left)):
        add("NOTE", np.flatnonzero(left & rows), f"boxes {what}", of_box,
            "does not learn them; evaluation counts each as an object that was not found",
            "correct them, or leave them out with --fix")
        left = left & ~rows
    tiny = learnable & (np.abs(xywh) <= 1).all(axis=1)
    add("NOTE", np.flatnonzero(tiny), "boxes whose bbox seems to be normalised", of_box,
        "learns no box of a pixel; evaluation counts it as not found",
        "multiply x and width by the width of the image, y and height by its height, or leave them "
        "out with --fix")
    beyond = learnable & (np.abs(a.boxes - data.clip(a)) > 1).any(axis=1)
    (height, width), (x0, y0, x1, y1) = a.sizes[a.image].T, xywh.T  # if bbox were xyxy
    would_fit = (x1 > x0) & (y1 > y0) & (x1 <= width + 1) & (y1 <= height + 1)
    what = "boxes that reach more than a pixel beyond their image"
    remedy = "check the width and height of the image; cut the boxes with --fix, in val, too"
    if len(beyond) and beyond.mean() > 0.1 and would_fit.mean() > 0.95:
        what = "boxes that leave their image, but would not if bbox were [x0, y0, x1, y1]"
        remedy = "look at the picture; if so, write [x0, y0, x1 - x0, y1 - y0]"
    add("NOTE", np.flatnonzero(beyond), what, of_box, "learns the part inside; evaluation judges "
        "the whole box: a perfect detector of the visible part scores low", remedy)

    add("INFO", np.flatnonzero(a.crowd), "crowd boxes", of_box,
        "does not learn them; evaluation ignores detections in them", "none needed")
    add("INFO", np.flatnonzero(np.diff(dataset.first) == 0), "images without a box to learn",
        of_image, "leaves them out; evaluation detects in them, too", "none if they are empty")
    per_category = np.bincount(dataset.labels, minlength=len(a.category_ids))
    add("NOTE" if training else "INFO", np.flatnonzero(per_category == 0),
        "categories without a box to learn",
        lambda c: f"{a.category_names[c]} (category {a.category_ids[c]})",
        "never detects them" if training else "is not affected; no figures for them",
        "annotate them, or take them out of both splits")
    names, number = np.unique(a.category_names, return_counts=True)
    add("NOTE", names[number > 1], "category names used more than once", str,
        "takes them for different classes", "rename the categories, or merge them")
    names, number = np.unique(a.file_names, return_counts=True)
    add("NOTE", names[number > 1], "image files listed more than once", str,
        "takes the boxes of the other entries for background", "merge the entries")
    first, ids = {}, [entry.get("id") for entry in entries]
    unnumbered = [k for k, id in enumerate(ids)
                  if type(id) is not int or id < 1 or first.setdefault(id, k) != k]
    add("NOTE", unnumbered, "annotations whose id is missing, below 1, no integer, or that of "
        "another", of_box, "does not use it; other COCO tools do", "number them with --fix")

    without, boxes = train.count_without_location(dataset, config) if training else (0, 0)
    add("ERROR" if without == boxes else "NOTE", range(without),
        f"boxes, of {boxes:,d} in the images sampled, that no location learns", None,
        "stops" if without == boxes else "learns nothing from them; evaluation counts them",
        "raise --train-short-sides, with --enlarge where images are smaller; boxes hidden behind "
        "smaller ones stay without")


def is_turned(image: Image.Image) -> bool:
    """Whether an image has an EXIF note that turns it."""
    try:
        return image.getexif().get(EXIF_ORIENTATION) in range(2, 9)
    except Exception:  # whatever a damaged note makes Pillow raise
        return False


def check_images(dataset: CocoDataset, decode: bool, add) -> tuple[np.ndarray, dict[bytes, str]]:
    """Look for every image file, and decode it as training does.

    Returns the indices of images that cannot be used, and content hash -> path of the decoded.
    """
    def inspect(i):
        """Error, whether it is rotated and dark, content hash."""
        path, size = dataset.image_path(i), tuple(dataset.annotations.sizes[i, ::-1].tolist())
        if not decode:
            return "" if os.path.isfile(path) else f"{path}: no such file", False, False, None
        try:
            dataset.image(i)
        except UserError as error:
            return str(error), False, False, None
        with Image.open(path) as image:
            rotates = image.size == size and is_turned(image)
            dark = image.mode.startswith("I;16") and np.asarray(image).max() < 2**12
        return "", rotates, dark, hashlib.sha256(Path(path).read_bytes()).digest()

    with ThreadPoolExecutor() as threads:
        errors, rotates, dark, digests = zip(*threads.map(inspect, range(len(dataset))))
    bad = np.flatnonzero(errors)
    add("ERROR", bad, "images that cannot be used", errors.__getitem__, "stops",
        "replace them, or leave them out with --images --fix")
    add("NOTE", np.flatnonzero(rotates), "images with an EXIF note that rotates them, listed with "
        "the size they have without it", dataset.image_path, "takes the boxes as drawn on the "
        "pixels as stored", "look at the picture; if the boxes are astray, save the files upright")
    add("NOTE", np.flatnonzero(dark), "images of 16 bits whose values fit in 12",
        dataset.image_path, "keeps the upper 8 of 16 bits, so they are nearly black",
        "multiply the values by 16, or save the files with 8 bits")
    return bad, {digest: dataset.image_path(i) for i, digest in enumerate(digests) if digest}


def compare(train_split, val_split, add):
    """What the two, each its annotations and content hashes, should (not) have in common."""
    (ours, trained), (theirs, judged) = train_split, val_split
    ours, theirs = (set(zip(a.category_ids, a.category_names)) for a in (ours, theirs))
    add("ERROR", sorted(ours ^ theirs), "categories of only one of train and val",
        lambda c: f"{c[0]} {c[1]} is only in {'train' if c in ours else 'val'}",
        "stops", "give both files the same list of categories")
    shared = [(trained[digest], judged[digest]) for digest in judged if digest in trained]
    add("NOTE", shared, "images of val that are in train, too", " = ".join, "learns what it is "
        "evaluated on, so that the figures are too good", "take them out of one of the splits")


def describe(dataset: CocoDataset):
    """Print what is in a split, as half a page of text."""
    def bars(title, names, counts, most=16):
        print(f"  {title}")
        width = max(map(len, names[:most]))
        for name, count in zip(names[:most], counts.tolist()):
            bar = "#" * math.ceil(30 * count / max(1, counts.max()))
            share = count / max(1, counts.sum())
            print(f"    {name:<{width}} {count:9,d} {share:5.0%} {bar}".rstrip())

    def histogram(title, values, edges, names):
        bars(title, names, np.bincount(np.digitize(values, edges), minlength=len(names)))

    a = dataset.annotations
    print(dataset.summary())
    histogram("boxes of an image", np.diff(dataset.first), [1, 2, 4, 8, 16, 32, 64],
              ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64 or more"])
    counts = np.bincount(dataset.labels, minlength=len(a.category_ids))
    order = np.argsort(-counts, kind="stable")
    bars("boxes of a category (the most frequent 16)", [a.category_names[c][:40] for c in order],
         counts[order])
    histogram("area, as COCO evaluates it", a.areas[~a.crowd], [32**2, 96**2],
              ["small  < 32 x 32", "medium < 96 x 96", "large"])
    w, h = (dataset.boxes[:, 2:] - dataset.boxes[:, :2]).T
    histogram("width : height", w / h, [1/3, 1/1.5, 1.5, 3],
              ["< 1:3", "1:3 to 1:1.5", "1:1.5 to 1.5:1", "1.5:1 to 3:1", "> 3:1"])


def draw_batches(dataset: CocoDataset, images, config: train.TrainConfig, path):
    """Draw three batches of `images` as the network sees them in training (black: padding)."""
    a, tiles = dataset.annotations, []
    sampler = data.TrainSampler(a.sizes, images, replace(config, batch_size=4))
    for step in range(3):
        batch = dataset.load(sampler.global_batch(step))
        for i, image, boxes, labels in zip(batch.indices, batch.images,
                                           batch.boxes.split(batch.counts),
                                           batch.labels.split(batch.counts)):
            names = [a.category_names[label] for label in labels]
            tiles.append((f"batch {step + 1}: image {a.image_ids[i]}",
                          evaluate.draw(image, boxes, labels, names, side=320)))
    print("  three training batches of four images: ", end="")
    plots.save_grid(tiles, 4, path)


def write_fixed(a: data.Annotations, rows: dict, left_out, out):
    """Write a copy of the JSON without unusable entries, faulty boxes and the images `left_out`.

    Boxes are cut at the image, annotations numbered from 1; everything else stays as it was.
    """
    boxes = data.clip(a)
    with open(a.path, encoding="utf-8-sig") as file:
        content = json.load(file)  # once more, with its polygons
    annotations = []
    for k in np.flatnonzero(data.learnable(a) & ~np.isin(a.image, left_out)).tolist():
        entry, (x0, y0, x1, y1) = content["annotations"][rows["annotations"][k]], boxes[k]
        if (np.abs(boxes[k] - a.boxes[k]) > 1e-3).any():
            entry["bbox"] = [round(float(x), 3) for x in (x0, y0, x1 - x0, y1 - y0)]
        if max(map(abs, entry["bbox"])) <= 1:  # most of such, and the reader refuses the file
            continue
        annotations.append(entry | {
            "id": len(annotations) + 1, "iscrowd": int(a.crowd[k]),
            "area": float(min(a.areas[k], (x1 - x0) * (y1 - y0)))})
    images = [content["images"][i] for i in np.delete(rows["images"], left_out)]
    categories = [content["categories"][i] for i in rows["categories"]]
    fixed = content | {"images": images, "annotations": annotations, "categories": categories}
    atomic_write(out, lambda file: file.write(json.dumps(fixed).encode()))
    kept = ", ".join(f"{len(fixed[t]):,d} of {len(content[t]):,d} {t}" for t in data.FIELDS)
    print(f"\n{out}: written, with {kept}; to train with it, put it in the place of {a.path}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], usage="%(prog)s DIR [PRESET] [options]",
        epilog="The preset (default: demo) and further options are those of train.py, and say how "
        "training would use the data.", allow_abbrev=False)
    parser.add_argument("dir", help="COCO-format folder")
    parser.add_argument("--split", metavar="NAME", help="check this one (default: train and val)")
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
    kinds = {"train": config.train_split, "val": config.val_split}
    if args.split:
        kinds = {"val" if args.split.startswith("val") else "train": args.split}

    low, high = config.train_short_sides
    print(f"training: a short side of {low if low == high else f'{low} to {high}'}, a long side of "
          f"at most {config.model.long_side} pixels, {'' if config.model.enlarge else 'never '}"
          f"enlarged, center sampling of radius {config.center_radius:g} (0: off)")
    splits, levels = [], set()
    for kind, name in kinds.items():
        print()
        findings = Findings()
        try:
            json_file, folder = data.find_split(args.dir, kind, name)
            dataset, rows, entries = read_split(json_file, folder, findings.add)
            describe(dataset)
            check_annotations(dataset, entries, kind == "train", config, findings.add)
            unusable, hashes = check_images(dataset, args.images, findings.add)
            splits.append((dataset.annotations, hashes))
            if len(splits) == 2:
                compare(*splits, findings.add)
            drawable = np.setdiff1d(dataset.with_boxes(), unusable)
            if len(drawable):
                picture = f"{json_file.stem.removeprefix('instances_')}.png"
                try:
                    draw_batches(dataset, drawable, config, Path(args.out, picture))
                except OSError as error:  # a folder that cannot be written to
                    print(f"not drawn ({error}); name another folder with --out")
        except UserError as error:
            findings.append(("ERROR", f"\nERROR: {error}"))
        for _, text in sorted(findings, key=lambda finding: LEVELS.index(finding[0])):
            print(text)
        levels |= {level for level, _ in findings}
    if args.fix and splits:
        write_fixed(dataset.annotations, rows, unusable, args.fix)

    if not args.images:
        print("\nNo image was decoded; --images decodes them all.")
    print("\nTraining stops at the errors above." if "ERROR" in levels else
          "\nTraining can start; read the notes above." if "NOTE" in levels else
          "\nTraining can start; nothing is wrong.")
    sys.exit(2 if "ERROR" in levels else 1 if "NOTE" in levels and args.strict else 0)


if __name__ == "__main__":
    evaluate.run_program(main)
