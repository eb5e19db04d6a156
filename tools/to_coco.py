"""to_coco.py: write the annotations of a YOLO or VOC folder in COCO format.

    python tools/to_coco.py SRC                   SRC/annotations/instances_<split>.json
    python tools/to_coco.py SRC --out DIR         elsewhere

    YOLO   images/train/ + labels/train/*.txt, or train/images/ + train/labels/*.txt, or
           images/ + labels/*.txt (the split train; val is yours to make); names in classes.txt,
           labels/classes.txt or data.yaml
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
from check_data import is_turned  # noqa: E402
from data import UserError, read_annotations, upright  # noqa: E402
from model import atomic_write  # noqa: E402

YAML_NAME = r"""( *)(?:-|(\d+):)\s+(["']?)(\w[\w ./()&+-]*)\3\s*"""  # - a or 0: "a"


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it in that encoding") from None


def find_files(src: Path):
    """Yields split, image folder and (image file, annotation file) of each image."""
    if (src / "Annotations").is_dir():  # VOC
        images = src / "JPEGImages"
        files = {path.stem: path for path in images.iterdir()}
        for split in ("train", "val"):
            lines = read_text(src / "ImageSets" / "Main" / f"{split}.txt").split("\n")
            stems = [line if line in files else re.sub(r"\s+(-1|0|1)$", "", line)  # without a flag
                     for line in map(str.strip, lines) if line]
            yield split, images, [
                (files.get(stem, images / f"{stem}.jpg"), src / "Annotations" / f"{stem}.xml")
                for stem in stems]
        return
    folders = [(x.name, x, src / "labels" / x.name) for x in sorted(src.glob("images/*/"))]
    folders += [(x.name, x / "images", x / "labels") for x in sorted(src.glob("*/"))]
    folders = [f for f in folders if f[1].is_dir() and f[2].is_dir()]
    for split, images, labels in folders or [("train", src / "images", src / "labels")]:
        yield split, images, [(path, labels / path.relative_to(images).with_suffix(".txt"))
                              for path in sorted(images.rglob("*"))
                              if path.suffix.lower() in evaluate.IMAGE_FILES]


def yolo_names(src: Path) -> dict[int, str]:
    """Class names from classes.txt, or else from `names:` in data.yaml."""
    for path in (src / "classes.txt", src / "labels" / "classes.txt"):  # the second: LabelImg
        if path.is_file():
            return dict(enumerate(map(str.strip, read_text(path).rstrip().split("\n"))))
    return next(filter(None, map(yaml_names, sorted(src.glob("*.y*ml")))), {})


def yaml_names(path: Path) -> dict[int, str]:
    """`names:` as [a, b], or a line for each, - a or 0: a. Anything else is refused."""
    text = re.sub("(?<![^ \n])#.*", "", read_text(path))  # without comments
    blocks = re.findall(r"^names:(.*(?:\n[^\w\n].*|\n)*)(?=\w[^\n]*:|\Z)", text, re.M)
    if not blocks and "names" not in text:
        return {}
    flow = re.fullmatch(r"\s*\[([^]]+?),?\s*\]\s*", blocks[0]) if blocks else None
    lines = ([f"- {name.strip()}" for name in flow[1].split(",")] if flow else
             "".join(blocks).split("\n"))
    items = [re.fullmatch(YAML_NAME, line) for line in filter(str.strip, lines)]
    names = {int(item[2] or n): item[4].strip() for n, item in enumerate(filter(None, items))}
    forms = {(item[1], not item[2]) for item in filter(None, items)}  # indentation, - or a number
    count = re.search(r"^nc:\s*(\d+)", text, re.M)
    if (len(blocks) != 1 or len(forms) != 1 or len(names) < len(items)
            or count and int(count[1]) != len(names)):
        raise UserError(f"{path}: its names are not understood; put them into "
                        f"{path.parent / 'classes.txt'}, one a line")
    return names


def yolo_objects(path: Path, names: dict[int, str], width, height):
    """The class (number, name), xyxy box in pixels and crowd (0 or 1) of each object."""
    objects = []
    for line in filter(str.strip, read_text(path).splitlines() if path.is_file() else []):
        try:
            number, *values = line.split()
            values = [float(value) for value in values]
            if len(values) < 4 or len(values) % 2 or not all(0 <= value <= 1 for value in values):
                raise ValueError
            its_class = int(number), names[int(number)] if names else number
        except (ValueError, KeyError):
            raise UserError(f"{path}: {line!r:.80} is not a class ({len(names) or 'any'}) and x y "
                            "w h, or a polygon, in 0 .. 1; correct it") from None
        if len(values) == 4:
            x, y, w, h = values
            values = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
        objects.append((its_class, (min(xs), min(ys), max(xs), max(ys)), 0))
    return objects


def voc_objects(path: Path):
    """As `yolo_objects`."""
    objects = []
    try:
        for item in ElementTree.parse(path).iter("object"):
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}"))
                              for key in ("xmin", "ymin", "xmax", "ymax"))
            crowd = int(item.findtext("difficult") or 0)
            if crowd not in (0, 1):
                raise ValueError(f"difficult is {crowd}, not 0 or 1")
            objects.append(((0, item.findtext("name").strip()), (x0 - 1, y0 - 1, x1, y1), crowd))
    except (ValueError, TypeError, AttributeError, SyntaxError, LookupError) as error:
        raise UserError(f"{path}: is no VOC annotation ({error}); correct it") from None
    return objects


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
        for its_class, (x0, y0, x1, y1), crowd in objects:
            x, y, w, h = (round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0))
            annotations.append(dict(
                id=len(annotations) + 1, image_id=n, category_id=classes.index(its_class) + 1,
                bbox=[x, y, w, h], area=round(w * h, 3), iscrowd=crowd))
    categories = [dict(id=i, name=name) for i, (_, name) in enumerate(classes, start=1)]
    content = dict(images=rows, annotations=annotations, categories=categories)
    try:
        read_annotations(path, content)
    except UserError as error:  # without its remedy
        raise UserError(f"{str(error).rpartition('; ')[0]}, so it is not written; correct the "
                        f"class names, labels and files of {images}") from None
    atomic_write(path, lambda file: file.write(json.dumps(content).encode()))
    print(f"{path}: {len(rows):,d} images, {len(annotations):,d} boxes of {len(classes)} "
          f"categories ({', '.join(name for _, name in classes)[:100]}); images in {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="YOLO or VOC folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: SRC)")
    args = parser.parse_args(argv)
    out, is_voc = args.out or args.src, (args.src / "Annotations").is_dir()
    names = {} if is_voc else yolo_names(args.src)
    splits, classes, ambiguous = [], set(names.items()), []
    for split, images, files in find_files(args.src):
        entries = []
        for image_file, path in files:
            with Image.open(image_file) as image:
                stored, turned = image.size, is_turned(image)
                size = upright(image).size  # as it is shown
            ambiguous += [image_file] if turned and size == stored else []
            objects = voc_objects(path) if is_voc else yolo_objects(path, names, *size)
            entries.append((image_file, size, objects))
            classes |= {its_class for its_class, _, _ in objects}
        splits.append((split, images, entries))
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split, images, entries in splits:
        write_split(out, split, images, entries, sorted(classes))
    if ambiguous:
        print(f"warning: {len(ambiguous)} images, such as {ambiguous[0]}, are turned by an EXIF "
              "note that keeps their size; training does not turn them, so save them upright")


if __name__ == "__main__":
    evaluate.run_program(main)
