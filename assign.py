"""assign.py: which location learns which box?  (FCOS, arXiv:1904.01355, Sec. 3.1-3.2; center sampling: FCOS_PLUS)

The detector predicts one box at every location of every pyramid level. A location is the centre of a feature-map
cell, ((i + 0.5) * stride, (j + 0.5) * stride) in pixels of the padded image. Seen from a location (x, y), a box
(x0, y0, x1, y1) is four distances:

    l = x - x0,  t = y - y0,  r = x1 - x,  b = y1 - y        ("ltrb", Eq. 1 of the paper)

A location is positive for a box iff

 1. it lies strictly inside the box -- with center sampling, strictly inside the square  centre +- radius * stride
    clipped to the box, since locations near a box's edge predict it badly;
 2. max(l, t, r, b) of the whole box is within the size range of the location's level, ends included: its farthest
    side is 4 to 8 strides away, on the first level also less and on the last also more, which makes
    [-1, 64] [64, 128] [128, 256] [256, 512] [512, inf] pixels for strides 8 .. 128.

Where several boxes qualify the smallest area wins, and on equal areas the first box. Everything else is background.

The usual implementation compares all L locations with all G boxes. Here every box visits only the cells that can be
its own, few with center sampling, so that time and memory hardly depend on G; `tests/test_assign.py` holds it to the
definition above.

    python assign.py                                        which location learns which box, in a drawn example
    python assign.py IMAGE_ID --data DIR                    in an image of a COCO-format data set, at its own size

Letters: N images, L locations over all levels, B boxes of all images, G of one; a level has H x W cells, and a box
visits a window of V x U of them; K are the locations of a level that learn.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)  # pixels; P3 .. P7
CELLS_IN_RANGE = 8              # a level learns boxes with max(l, t, r, b) <= 8 of its strides


class Level(NamedTuple):
    """The grid of one pyramid level."""
    stride: int  # pixels
    height: int  # cells
    width: int   # cells


class Locations(NamedTuple):
    """All locations of a padded image: level by level (smallest stride first), row by row in a level."""
    xy: Tensor          # (L, 2) pixels
    stride: Tensor      # (L,) pixels
    size_range: Tensor  # (L, 2) pixels: lowest and highest max(l, t, r, b) that the location learns
    levels: tuple[Level, ...]


class Targets(NamedTuple):
    """What every location of every image should predict."""
    labels: Tensor  # (N, L) int64 in [0, C), -1 is background
    ltrb: Tensor    # (N, L, 4) pixels, 0 at background


def make_locations(height, width, strides=STRIDES, offset=0.5, device=None) -> Locations:
    """The locations of a padded image of `height` x `width` pixels.

    `offset` is the place of a location in its cell, in strides: 0.5 is the centre (FCOS), 0 the corner (torchvision).
    """
    levels = tuple(Level(s, math.ceil(height / s), math.ceil(width / s)) for s in strides)
    xy, stride, size_range = [], [], []
    lowest = -1.0
    for level in levels:
        y = (torch.arange(level.height, device=device, dtype=torch.float32) + offset) * level.stride  # (H,)
        x = (torch.arange(level.width, device=device, dtype=torch.float32) + offset) * level.stride   # (W,)
        y, x = torch.meshgrid(y, x, indexing="ij")                               # (H, W)
        highest = math.inf if level is levels[-1] else float(CELLS_IN_RANGE * level.stride)
        xy.append(torch.stack([x, y], dim=-1).view(-1, 2))                       # (H*W, 2)
        stride.append(torch.full((y.numel(),), float(level.stride), device=device))
        size_range.append(torch.stack([torch.full_like(x, lowest), torch.full_like(x, highest)], dim=-1).view(-1, 2))
        lowest = highest
    return Locations(torch.cat(xy), torch.cat(stride), torch.cat(size_range), levels)


def assign_targets(locations: Locations, boxes: list[Tensor], labels: list[Tensor], radius: float | None = 1.5) -> Targets:
    """The label and the distances that every location should predict (rules: see the top of this file).

    Args:
        locations: from `make_locations`.
        boxes: N tensors (G, 4), xyxy in pixels of the padded image; G may be 0.
        labels: N tensors (G,), int64 in [0, C).
        radius: of center sampling, in strides; None makes the whole box positive.

    No step waits for the device. With center sampling no tensor grows with L * G.
    """
    N, L, device = len(boxes), len(locations.xy), locations.xy.device
    counts = torch.tensor([len(b) for b in boxes]).to(device, non_blocking=True)
    box = torch.cat(boxes).to(device, torch.float32)                             # (B, 4)
    label = torch.cat(labels).to(device)                                         # (B,)
    B = len(box)
    image = torch.arange(N, device=device).repeat_interleave(counts, output_size=B)

    # Sorted by area (stable: equal areas keep their order), a box's index is its priority: the lowest one wins.
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    order = area.argsort(stable=True)
    box, label, image = box[order], label[order], image[order]

    # winner[n, l] is the best box that claims location l of image n; B, worse than any, stands for background.
    winner = torch.full((N, L), B, device=device, dtype=torch.int32)
    start, end = box[:, :2], box[:, 2:]                                          # (B, 2): x, y
    lower, upper, centre = start, end, (start + end) / 2
    first = 0                                                                    # the level's first location
    for level in locations.levels:
        last = first + level.height * level.width
        xs = locations.xy[first:first + level.width, 0]                          # (W,)
        ys = locations.xy[first:last:level.width, 1]                             # (H,)
        size_range = locations.size_range[first]                                 # (2,)
        # Along an axis, the cells at most 8 strides from both ends of a box of s strides span min(s, 16 - s) <= 8 strides.
        extent = CELLS_IN_RANGE if level is not locations.levels[-1] else math.inf
        if radius is not None:
            lower = torch.maximum(start, centre - radius * level.stride)
            upper = torch.minimum(end, centre + radius * level.stride)
            extent = min(extent, 2 * radius)
        x_cell, x_fits, x_far = _window(xs, lower[:, 0], upper[:, 0], start[:, 0], end[:, 0], level.stride, extent, *size_range)
        y_cell, y_fits, y_far = _window(ys, lower[:, 1], upper[:, 1], start[:, 1], end[:, 1], level.stride, extent, *size_range)
        positive = y_fits[:, :, None] & x_fits[:, None, :] & (y_far[:, :, None] | x_far[:, None, :])    # (B, V, U)
        rank = torch.where(positive, torch.arange(B, device=device, dtype=torch.int32)[:, None, None], B)
        row = image[:, None] * L + first + y_cell * level.width                  # (B, V)
        location = row[:, :, None] + x_cell[:, None, :]                          # (B, V, U)
        winner.view(-1).scatter_reduce_(0, location.flatten(), rank.flatten(), "amin")
        first = last

    box = torch.cat([box, box.new_zeros(1, 4)])[winner]                          # (N, L, 4)
    label = torch.cat([label, label.new_full((1,), -1)])[winner]                 # (N, L)
    ltrb = torch.cat([locations.xy - box[..., :2], box[..., 2:] - locations.xy], dim=-1)
    return Targets(label, torch.where(label[..., None] >= 0, ltrb, 0.0))


def _window(centres, lower, upper, start, end, stride, extent, lowest, highest):
    """Along one axis, a run of V cells for each box: all whose centre is strictly between `lower` and `upper`, and not
    farther than `highest` from either end of the box, `start` .. `end` (all (B,)). These span at most `extent` strides.

    Returns, all (B, V): each cell's index; whether it is such a cell; and whether its centre is as far as `lowest` from
    an end. The maximum over both axes is in the size range iff both fit and one is far.
    """
    cells = len(centres) if math.isinf(extent) else min(len(centres), math.ceil(extent) + 1)
    begin = (torch.maximum(lower, end - highest) - centres[0]) / stride                     # (B,) in cells
    first = begin.floor().clamp(0, len(centres) - cells).long()                            # (B,)
    cell = first[:, None] + torch.arange(cells, device=first.device)                       # (B, V)
    centre = centres[cell]
    inside = (centre > lower[:, None]) & (centre < upper[:, None])
    farthest = torch.maximum(centre - start[:, None], end[:, None] - centre)               # (B, V)
    return cell, inside & (farthest <= highest), farthest >= lowest


# --- what it looks like -----------------------------------------------------------------------------------------------

COLOURS = ("crimson", "royalblue", "forestgreen", "darkorange", "purple", "saddlebrown")  # of the boxes, in turns


def example() -> tuple[Image.Image, Tensor]:
    """Four ellipses and their boxes (4, 4)."""
    boxes = [(24, 24, 404, 276), (224, 64, 424, 244), (496, 84, 584, 168), (544, 124, 592, 172)]
    image = Image.new("RGB", (640, 288), "#d8d8d8")
    for box, grey in zip(boxes, ("#a8a8a8", "#787878", "#787878", "#484848")):
        ImageDraw.Draw(image).ellipse(box, grey)
    return image, torch.tensor(boxes).float()


def read(folder: Path, image_id: int | None) -> tuple[Image.Image, Tensor]:
    """An image of a COCO-format data set (None: its first one), sought in val before train, and the boxes to learn (G, 4)."""
    for file in sorted((folder / "annotations").glob("instances_*.json"), reverse=True):
        content, split = json.loads(file.read_text()), file.stem.removeprefix("instances_")
        images = folder / split if (folder / split).is_dir() else folder / "images" / split
        for entry in content["images"]:
            if image_id in (None, entry["id"]):
                boxes = [(x, y, x + w, y + h) for a in content["annotations"] for x, y, w, h in [a["bbox"]]
                         if a["image_id"] == entry["id"] and not a.get("iscrowd") and w > 0 and h > 0]
                return Image.open(images / entry["file_name"]).convert("RGB"), torch.tensor(boxes).view(-1, 4).float()
    raise ValueError(f"{folder}/annotations/instances_*.json: no image{'' if image_id is None else f' {image_id}'}")


def draw(image, boxes, locations: Locations, columns: dict[str, Targets]) -> Image.Image:
    """A row for each level that learns, a column for each of the targets, whose labels are indices of boxes. A positive
    location is drawn as its cell, in the colour of its box, and the paler the lower its centerness target (loss.py)."""
    width = 480
    scale, height = width / image.width, round(width * image.height / image.width)
    pale = Image.blend(image.resize((width, height)), Image.new("RGB", (width, height), "white"), 0.7)
    learns = torch.stack([targets.labels[0] >= 0 for targets in columns.values()]).any(0)  # (L,)
    strides = locations.stride[learns].unique().int().tolist() or STRIDES
    picture = Image.new("RGB", (len(columns) * (width + 12) - 12, len(strides) * (height + 34)), "white")
    for row, stride in enumerate(strides):
        lowest, highest = locations.size_range[locations.stride == stride][0].clamp(min=0).tolist()
        for column, (title, targets) in enumerate(columns.items()):
            panel, here = pale.copy(), (locations.stride == stride) & (targets.labels[0] >= 0)
            pen = ImageDraw.Draw(panel, "RGBA")
            lt, rb = targets.ltrb[0, here].split(2, dim=1)                                 # (K, 2) each
            centerness = (torch.minimum(lt, rb) / torch.maximum(lt, rb)).prod(1).sqrt()    # (K,)
            corner, side = (locations.xy[here] - stride / 2) * scale, max(0, stride * scale - 2)  # (K, 2), a gap between cells
            for (x, y), g, c in zip(corner.tolist(), targets.labels[0, here].tolist(), centerness.tolist()):
                pen.rectangle((x, y, x + side, y + side), ImageColor.getrgb(COLOURS[g % len(COLOURS)]) + (round(40 + 215 * c),))
            for g, box in enumerate((boxes * scale).tolist()):
                pen.rectangle(box, outline=COLOURS[g % len(COLOURS)], width=2)
            left, top = column * (width + 12), row * (height + 34) + 24
            picture.paste(panel, (left, top))
            title = f"stride {stride}, max(l, t, r, b) {lowest:.0f} .. {highest:.0f}: {title}"
            ImageDraw.Draw(picture).text((left, top - 6), title, "black", ImageFont.load_default(16), "ls")
    return picture


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw which location learns which box.")
    parser.add_argument("image_id", type=int, nargs="?", help="image of the data set (default: its first one)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="COCO-format data set (default: a drawn example)")
    parser.add_argument("--out", type=Path, default="runs/assign.png", metavar="FILE", help="default: runs/assign.png")
    args = parser.parse_args(argv)
    if args.image_id is not None and args.data is None:
        parser.error("IMAGE_ID needs --data")
    image, boxes = read(args.data, args.image_id) if args.data else example()
    locations, labels = make_locations(image.height, image.width), torch.arange(len(boxes))
    columns = {title: assign_targets(locations, [boxes], [labels], radius)
               for title, radius in (("whole box", None), ("center sampling 1.5", 1.5))}
    print("positive locations       " + "".join(f"{title:<30}" for title in columns))
    print("box                  " + 2 * "    P3    P4    P5    P6    P7")
    for g, (w, h) in enumerate((boxes[:, 2:] - boxes[:, :2]).tolist()):
        counts = [((t.labels[0] == g) & (locations.stride == s)).sum() for t in columns.values() for s in STRIDES]
        print(f"{COLOURS[g % len(COLOURS)]:<12}{f'{w:.0f} x {h:.0f}':<9}" + "".join(f"{count:6}" for count in counts))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(image, boxes, locations, columns).save(args.out)
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {error}; python data.py DIR checks a data set")
