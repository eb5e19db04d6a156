"""make_shapes.py: a small generated data set in COCO format, for the demo.

    python tools/make_shapes.py runs/shapes

Rectangles, ellipses and triangles with soft shadows: 1,500 images to learn from, 200 to evaluate
on. A pure function of its options: the same files every time.
"""

import argparse
import colorsys
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
from data import UserError  # noqa: E402

SHAPES = ("rectangle", "ellipse", "triangle")


def make_shapes(root, num_train=1500, num_val=200, size=128, seed=0):
    """Make the data set in `root`, unless it is there: written aside and renamed, so never torn."""
    root = Path(root).resolve()
    if (root / "annotations").is_dir():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        made = Path(temporary, root.name)
        _write_split(made, "train", num_train, (seed, 0), size)
        _write_split(made, "val", num_val, (seed, 1), size)
        try:
            made.rename(root)
        except OSError:
            if not (root / "annotations").is_dir():  # made by another process meanwhile
                raise UserError(f"{root}: exists, but is no complete data set; delete it, or name "
                                "another folder") from None


def _write_split(root, split, count, seed, size):
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(1, count + 1):
        picture, objects = _draw_shapes(np.random.default_rng((*seed, i - 1)), size)
        name = f"{i - 1:06d}.jpg"
        picture.save(root / split / name, quality=92)
        images.append(dict(id=i, file_name=name, height=picture.height, width=picture.width))
        for label, x, y, w, h in objects:
            annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=label + 1,
                                    iscrowd=0, bbox=[x, y, w, h], area=w * h))
    categories = [{"id": i, "name": name} for i, name in enumerate(SHAPES, start=1)]
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(
        {"images": images, "annotations": annotations, "categories": categories}))


def _draw_shapes(random, size):
    """1 to 8 shapes over a soft background; later ones may cover a part of earlier ones."""
    height, width = (int(random.integers(size * 3 // 4, size, endpoint=True)) for _ in range(2))
    corners = random.integers(40, 216, 3) + random.integers(-40, 41, (2, 2, 3))
    picture = _colours(corners, width, height)  # a gradient between four colours
    objects, places = [], np.zeros((0, 2, 2))   # start and end, of x and y
    for _ in range(int(random.integers(1, 8, endpoint=True))):
        for _ in range(20):  # find a place that leaves the shapes below recognisable
            side = np.exp(random.uniform(np.log(18), np.log(0.8 * size)))
            label = int(random.integers(len(SHAPES)))
            outline = _outline(SHAPES[label], random) * side                         # (P, 2)
            outline -= outline.min(axis=0)
            room = (width, height) - outline.max(axis=0)
            if (room < 0).any():
                continue
            outline += random.uniform(0, room)
            place = np.array([outline.min(axis=0), outline.max(axis=0)])
            overlap = np.minimum(places[:, 1], place[1]) - np.maximum(places[:, 0], place[0])
            smaller = np.minimum((places[:, 1] - places[:, 0]).prod(axis=1),
                                 (place[1] - place[0]).prod())
            if (overlap.clip(0).prod(axis=1) <= 0.3 * smaller).all():
                break
        else:
            break
        mask = Image.new("L", (4 * width, 4 * height))  # drawn larger and reduced: smooth edges
        ImageDraw.Draw(mask).polygon([tuple(4 * point) for point in outline], 255)
        mask = mask.resize(picture.size, Image.Resampling.BOX)
        shadow = Image.new("L", picture.size)
        shadow.paste(mask.point(lambda v: v // 2), (2, 3))
        picture.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(2.5)))
        colour = 255 * np.array(colorsys.hsv_to_rgb(
            random.random(), random.uniform(0.3, 0.9), random.uniform(0.3, 0.95)))
        light = random.uniform(0.75, 1.25, (2, 2, 1))
        picture.paste(_colours(colour * light, width, height), mask=mask)
        objects.append((label, *place[0].tolist(), *(place[1] - place[0]).tolist()))
        places = np.concatenate([places, place[None]])
    grain = random.normal(0, 4, (height, width, 1))
    return Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)), objects


def _outline(shape, random):
    """The corners (P, 2) of a shape of about 1 x 1, stretched, upright or upside down."""
    if shape == "ellipse":
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        corners = np.stack([np.cos(angle), np.sin(angle)], axis=1) / 2               # (48, 2)
    elif shape == "rectangle":
        corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    else:
        corners = np.array([(random.uniform(-0.3, 0.3), -0.5), (0.5, 0.5), (-0.5, 0.5)])
    stretch = np.exp(random.uniform(-0.5, 0.5))
    return corners * (stretch, 1 / stretch) * random.choice([-1, 1])


def _colours(corners, width, height):
    """A picture that fades between the colours (2, 2, 3) of its corners."""
    small = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="where to write it")
    make_shapes(parser.parse_args(argv).folder)


if __name__ == "__main__":
    evaluate.run_program(main)
