"""to_coco.py: write the annotations of a YOLO or VOC folder in COCO format.

    python tools/to_coco.py SRC                   SRC/annotations/instances_<split>.json
    python tools/to_coco.py SRC --out DIR         elsewhere

    YOLO   images/train/ + labels/train/*.txt, or train/images/ + train/labels/*.txt, or
           images/ + labels/*.txt (one split, train); names in data.yaml or classes.txt
    VOC    Annotations/*.xml, JPEGImages/, ImageSets/Main/{train,val}.txt

Images are not copied: where the split's folder is not at hand, DIR/<split> becomes a link to it.
A line of YOLO is `class x y w h`, centre and size in parts of the image, or a class and a polygon.
In VOC, pixels count from 1 and the last one belongs to the box; a "difficult" object becomes a
crowd box, which is not learned and which evaluation ignores.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
from data import UserError  # noqa: E402
from model import atomic_write  # noqa: E402


def image_size(path) -> tuple[int, int]:
    """Width and height of an image as it is shown, turned by its EXIF note."""
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return image.size


def yolo_names(src: Path) -> dict[int, str]:
    """Class names from data.yaml, of which only `names:` is understood, or classes.txt."""
    for path in src.glob("*.y*ml"):
        text = re.sub(r"(^|\s)#.*", "", path.read_text("utf-8-sig"))
        block = re.search(r"^names:(.*?)(?=^[^\s\-\]}]|\Z)", text, re.M | re.S)
        if block:  # [a, b]  {0: a, 1: b}  or a line for each: - a  0: a
            items = re.findall(r"(?:(\d+)\s*:\s+|-\s+)?('[^'\n]*'|\"[^\"\n]*\"|"
                               r"[^\s,\[\]{}'\"][^,\[\]{}\n]*)", block[1])
            return {int(key or i): name.strip(" '\"") for i, (key, name) in enumerate(items)}
    path = src / "classes.txt"
    return dict(enumerate(path.read_text("utf-8-sig").splitlines())) if path.is_file() else {}


def yolo_object(line: str, names: dict[int, str], width, height):
    """The class (number, name), xywh box in pixels and crowd (0 or 1) of an object."""
    number, *values = line.split()
    values = [float(value) for value in values]
    if len(values) < 4 or len(values) % 2 or not all(0 <= value <= 1 for value in values):
        raise ValueError
    x, y, w, h = values[:4]
    x, y = x - w / 2, y - h / 2
    if len(values) > 4:  # a polygon
        x, y = min(values[::2]), min(values[1::2])
        w, h = max(values[::2]) - x, max(values[1::2]) - y
    name = names[int(number)] if names else number
    return (int(number), name), (x * width, y * height, w * width, h * height), 0


def read_yolo(src: Path, names: dict[int, str]):
    """Yields split, image folder and (image file, size, objects) of each image."""
    folders = [(x.name, x, src / "labels" / x.name) for x in sorted(src.glob("images/*/"))]
    folders += [(x.name, x / "images", x / "labels") for x in sorted(src.glob("*/"))]
    folders = [f for f in folders if f[1].is_dir() and f[2].is_dir()]
    for split, images, labels in folders or [("train", src / "images", src / "labels")]:
        entries = []
        for path in sorted(images.rglob("*")):
            if path.suffix.lower() not in evaluate.IMAGE_FILES:
                continue
            text, size = labels / path.relative_to(images).with_suffix(".txt"), image_size(path)
            lines, objects = text.read_text().splitlines() if text.is_file() else [], []
            for line in filter(str.strip, lines):
                try:
                    objects.append(yolo_object(line, names, *size))
                except (ValueError, KeyError):
                    raise UserError(f"{text}: {line!r:.80} is not a class ({len(names) or 'any'}) "
                                    "and x y w h, or a polygon, in 0 .. 1; correct it") from None
            entries.append((path, size, objects))
        yield split, images, entries


def read_voc(src: Path):
    """As `read_yolo`."""
    for split in ("train", "val"):
        entries, listing = [], src / "ImageSets" / "Main" / f"{split}.txt"
        for stem in re.findall(r"^\s*(\S+)", listing.read_text(), re.M):
            path, objects = src / "Annotations" / f"{stem}.xml", []
            try:
                root = ElementTree.parse(path)
                for item in root.iter("object"):
                    x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}"))
                                      for key in ("xmin", "ymin", "xmax", "ymax"))
                    objects.append(((0, item.findtext("name").strip()),
                                    (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1),
                                    int(item.findtext("difficult") or 0)))
                image = src / "JPEGImages" / root.findtext("filename").strip()
            except (ValueError, TypeError, AttributeError, SyntaxError) as error:
                raise UserError(f"{path}: is no VOC annotation ({error}); correct it") from None
            entries.append((image, image_size(image), objects))
        yield split, src / "JPEGImages", entries


def write_split(out: Path, split: str, images: Path, entries, classes: list[tuple]):
    """Write a split where `data.find_split` finds it and its images."""
    path = out / "annotations" / f"instances_{split}.json"
    if path.exists():
        raise UserError(f"{path}: exists and is not overwritten; delete it, or name another --out")
    if not entries:
        raise UserError(f"{images}: has no image of the split {split}; see --help")
    folder = next((x for x in (out / split, out / "images" / split) if x.is_dir()), out / split)
    if not folder.exists():
        folder.symlink_to(images.resolve(), target_is_directory=True)
    if not images.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: is in the way of a link to {images}; name another --out")
    below = images.resolve().relative_to(folder.resolve())  # "images" in train/images, or nothing
    rows, annotations = [], []
    for n, (image, (width, height), objects) in enumerate(entries, start=1):
        name = (below / image.relative_to(images)).as_posix()
        rows.append(dict(id=n, file_name=name, width=width, height=height))
        for its_class, box, crowd in objects:
            x, y, w, h = (round(v, 3) for v in box)
            annotations.append(dict(
                id=len(annotations) + 1, image_id=n, category_id=classes.index(its_class) + 1,
                bbox=[x, y, w, h], area=round(w * h, 3), iscrowd=crowd))
    categories = [{"id": i, "name": name} for i, (_, name) in enumerate(classes, start=1)]
    content = {"images": rows, "annotations": annotations, "categories": categories}
    atomic_write(path, lambda file: file.write(json.dumps(content).encode()))
    print(f"{path}: {len(rows):,d} images, {len(annotations):,d} boxes of {len(classes)} "
          f"categories; images in {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="YOLO or VOC folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: SRC)")
    args = parser.parse_args(argv)
    src, out, names = args.src, args.out or args.src, yolo_names(args.src)
    splits = list(read_voc(src) if (src / "Annotations").is_dir() else read_yolo(src, names))
    classes = {its_class for *_, entries in splits for *_, objects in entries
               for its_class, *_ in objects} | names.items()
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split, images, entries in splits:
        write_split(out, split, images, entries, sorted(classes))


if __name__ == "__main__":
    evaluate.run_program(main)
