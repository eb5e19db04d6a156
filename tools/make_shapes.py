"""make_shapes.py: a small generated data set in COCO format, for the demo.

    python tools/make_shapes.py runs/shapes

Rectangles, ellipses and triangles on textured backgrounds: 1,500 images to learn from, 200 to
evaluate on. A pure function of its options: the same files every time.
"""

import argparse
import colorsys
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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
    """1 to 8 shapes on a textured background; later ones may cover a part of earlier ones."""
    height, width = (int(random.integers(size * 3 // 4, size, endpoint=True)) for _ in range(2))

    def texture(grain):
        """Smooth noise of `grain` pixels around a colour of its own."""
        cells = (max(2, height // grain), max(2, width // grain), 3)
        noise = random.integers(60, 196, 3) + random.integers(-40, 41, cells)
        small = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        return small.resize((width, height), Image.Resampling.BICUBIC)

    picture = Image.blend(texture(int(random.integers(16, 64))),
                          texture(int(random.integers(1, 6))), 0.4)
    objects, places = [], np.zeros((0, 2, 2))  # start and end, of x and y
    for _ in range(int(random.integers(1, 8, endpoint=True))):
        for _ in range(20):  # find a place that leaves the shapes below recognisable
            side = np.exp(random.uniform(np.log(18), np.log(0.75 * size)))
            w, h = side * np.exp(random.uniform(-0.5, 0.5, 2) * [1, -1])
            w, h = round(min(w, width - 2)), round(min(h, height - 2))
            x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
            place = np.array([(x, y), (x + w, y + h)])
            overlap = np.minimum(places[:, 1], place[1]) - np.maximum(places[:, 0], place[0])
            smaller = np.minimum((places[:, 1] - places[:, 0]).prod(axis=1), w * h)
            if (overlap.clip(0).prod(axis=1) <= 0.3 * smaller).all():
                break
        else:
            break
        label = int(random.integers(len(SHAPES)))
        mask = Image.new("L", (4 * w, 4 * h))  # drawn larger and reduced: smooth edges
        pen, right, bottom = ImageDraw.Draw(mask), 4 * w - 1, 4 * h - 1
        if SHAPES[label] == "rectangle":
            pen.rectangle((0, 0, right, bottom), fill=255)
        elif SHAPES[label] == "ellipse":
            pen.ellipse((0, 0, right, bottom), fill=255)
        else:
            tip, base = (0, bottom) if random.random() < 0.5 else (bottom, 0)
            pen.polygon([(random.uniform(0.2, 0.8) * right, tip), (0, base), (right, base)], 255)
        colour = colorsys.hsv_to_rgb(random.random(), random.uniform(0.6, 1),
                                     random.choice([0.35, 0.95]))
        grain = random.integers(-25, 26, (h, w, 1)) + 255 * np.array(colour)
        picture.paste(Image.fromarray(grain.clip(0, 255).astype(np.uint8)), (x, y),
                      mask.resize((w, h), Image.Resampling.LANCZOS))
        objects.append((label, x, y, w, h))
        places = np.concatenate([places, place[None]])
    return picture, objects


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="where to write it")
    make_shapes(parser.parse_args(argv).folder)


if __name__ == "__main__":
    evaluate.run_program(main)
