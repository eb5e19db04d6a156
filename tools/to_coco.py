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

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
from data import UserError  # noqa: E402
from model import atomic_write  # noqa: E402

EXIF_ORIENTATION = 0x0112


def image_size(path) -> tuple[int, int]:
    """Width and height of an image as it is shown, turned by its EXIF note."""
    try:
        with Image.open(path) as image:
            sideways = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
            return image.size[::-1] if sideways else image.size
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no image ({error}); replace it, or take it out") from None


def yolo_names(src: Path) -> dict[int, str]:
    """Class names from data.yaml, of which only `names:` is understood, or classes.txt."""
    for path in sorted(src.glob("*.y*ml")):
        text = re.sub(r"(^|\s)#.*", "", path.read_text("utf-8-sig", "replace"))
        block = re.search(r"^names:(.*?)(?=^[^\s\-\]}]|\Z)", text, re.M | re.S)
        if block:  # [a, b]  {0: a, 1: b}  or a line for each: - a  0: a
            items = re.findall(r"(?:(\d+)\s*:\s+|-\s+)?('[^'\n]*'|\"[^\"\n]*\"|"
                               r"[^\s,\[\]{}'\"][^,\[\]{}\n]*)", block[1])
            return {int(key or i): name.strip(" '\"") for i, (key, name) in enumerate(items)}
    for path in (src / "classes.txt", src / "labels" / "classes.txt"):
        if path.is_file():
            return dict(enumerate(path.read_text("utf-8-sig", "replace").splitlines()))
    return {}


def yolo_box(line: str, width, height) -> tuple[int, list[float]]:
    """Class and xywh in pixels; a ValueError if it is not a line of YOLO."""
    label, *values = line.split()
    values = [float(value) for value in values]
    if len(values) < 4 or len(values) % 2 or not all(0 <= value <= 1 for value in values):
        raise ValueError
    x, y, w, h = values[:4]
    x, y = x - w / 2, y - h / 2
    if len(values) > 4:  # a polygon
        x, y = min(values[::2]), min(values[1::2])
        w, h = max(values[::2]) - x, max(values[1::2]) - y
    return int(label), [x * width, y * height, w * width, h * height]


def read_yolo(src: Path, names: dict[int, str]):
    """Yields split, image folder and (image file, width, height, objects) of each image."""
    folders = [(x.name, x, src / "labels" / x.name) for x in sorted(src.glob("images/*/"))]
    folders += [(x.name, x / "images", x / "labels") for x in sorted(src.glob("*/"))]
    folders = [f for f in folders if f[1].is_dir() and f[2].is_dir()]
    for split, images, labels in folders or [("train", src / "images", src / "labels")]:
        entries = []
        for path in sorted(images.rglob("*")):
            if path.suffix.lower() not in evaluate.IMAGE_FILES:
                continue
            width, height = image_size(path)
            text, objects = labels / path.relative_to(images).with_suffix(".txt"), []
            for line in text.read_text(errors="replace").splitlines() if text.is_file() else ():
                try:
                    if line.strip():
                        label, box = yolo_box(line, width, height)
                        objects.append((label, names[label] if names else str(label), box, 0))
                except (ValueError, KeyError):
                    raise UserError(f"{text}: {line!r:.80} is not a class ({len(names) or 'any'}) "
                                    "and x y w h, or a polygon, between 0 and 1; correct it"
                                    ) from None
            entries.append((path, width, height, objects))
        yield split, images, entries


def read_voc(src: Path):
    for split in ("train", "val"):
        listing, entries = src / "ImageSets" / "Main" / f"{split}.txt", []
        if not listing.is_file():
            raise UserError(f"{listing}: no such file; list the images of the split there")
        lines = listing.read_text(errors="replace").splitlines()
        for stem in (line.split()[0] for line in lines if line.strip()):
            path = src / "Annotations" / f"{stem}.xml"
            try:
                root, objects = ElementTree.parse(path).getroot(), []
                for item in root.iter("object"):
                    name, crowd = item.findtext("name").strip(), item.findtext("difficult") or 0
                    x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}"))
                                      for key in ("xmin", "ymin", "xmax", "ymax"))
                    objects.append((name, name, [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
                                    int(crowd)))
                image = src / "JPEGImages" / (root.findtext("filename") or f"{stem}.jpg").strip()
                size = [int(root.findtext(f"size/{side}") or 0) for side in ("width", "height")]
            except (OSError, ValueError, TypeError, AttributeError, SyntaxError) as error:
                raise UserError(f"{path}: is no VOC annotation ({error}); correct it, or take "
                                f"{stem} out of {listing}") from None
            entries.append((image, *(size if min(size) > 0 else image_size(image)), objects))
        yield split, src / "JPEGImages", entries


def write_split(out: Path, split: str, images: Path, entries, ids: dict):
    """Write a split where `data.find_split` finds it and its images."""
    path = out / "annotations" / f"instances_{split}.json"
    if path.exists():
        raise UserError(f"{path}: exists and is not overwritten; delete it, or name another --out")
    if not entries:
        raise UserError(f"{images}: has no image of the split {split}")
    folder = next((folder for folder in (out / split, out / "images" / split) if folder.is_dir()),
                  out / split)
    if not folder.exists():
        folder.symlink_to(images.resolve(), target_is_directory=True)
    if not images.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: is in the way of a link to {images}; name another --out")
    below = images.resolve().relative_to(folder.resolve())  # "images" in train/images, or nothing
    content = {"images": [], "annotations": [],
               "categories": [{"id": id, "name": name} for (_, name), id in ids.items()]}
    for n, (image, width, height, objects) in enumerate(entries, start=1):
        name = (below / image.relative_to(images)).as_posix()
        content["images"].append({"id": n, "file_name": name, "width": width, "height": height})
        for label, name, box, crowd in objects:
            x, y, w, h = (round(v, 3) for v in box)
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": n, "iscrowd": crowd,
                "category_id": ids[label, name], "bbox": [x, y, w, h], "area": round(w * h, 3)})
    atomic_write(path, lambda file: file.write(json.dumps(content).encode()))
    print(f"{path}: {len(entries):,d} images, {len(content['annotations']):,d} boxes of "
          f"{len(ids)} categories; images in {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("src", type=Path, help="YOLO or VOC folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: SRC)")
    args = parser.parse_args(argv)
    src, out = args.src, args.out or args.src
    names = yolo_names(src)
    if (src / "Annotations").is_dir():
        splits = list(read_voc(src))
    elif any(src.glob("labels")) or any(src.glob("*/labels")):
        splits = list(read_yolo(src, names))
    else:
        raise UserError(f"{src}: has no labels/ (YOLO) and no Annotations/ (VOC)")
    classes = {(label, name) for *_, entries in splits for *_, objects in entries
               for label, name, _, _ in objects} | names.items()
    ids = {one: id for id, one in enumerate(sorted(classes), start=1)}
    evaluate.make_folder(out / "annotations", "--out")
    for split, images, entries in splits:
        write_split(out, split, images, entries, ids)


if __name__ == "__main__":
    evaluate.run_program(main)
