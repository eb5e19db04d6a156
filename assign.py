"""assign.py: which location learns which box?  (FCOS, arXiv:1904.01355, Sec. 3.1-3.2; center sampling: FCOS_PLUS)

The detector predicts one box at every location of every pyramid level. A location is the centre of a feature-map
cell, ((i + 0.5) * stride, (j + 0.5) * stride) in pixels of the padded image. Seen from a location (x, y), a box
(x0, y0, x1, y1) is four distances:

    l = x - x0,  t = y - y0,  r = x1 - x,  b = y1 - y        ("ltrb", Eq. 1 of the paper)

A location is positive for a box iff

 1. it lies strictly inside the box -- with center sampling, strictly inside the square  centre +- radius * stride
    clipped to the box, since locations near a box's edge predict it badly;
 2. max(l, t, r, b) of the whole box is within the size range of the location's level, ends included: a level
    learns the boxes of up to 8 strides, [-1, 64] [64, 128] [128, 256] [256, 512] [512, inf] for strides 8 .. 128.

Where several boxes qualify the smallest area wins, and on equal areas the first box. Everything else is background.

The usual implementation compares all L locations with all G boxes. Here every box visits only the few cells around
its centre, so that time and memory hardly depend on G; `tests/test_assign.py` holds it to the definition above.

Letters: N images, L locations over all levels, B boxes of all images, G of one; a level has H x W cells, and a box
visits a window of V x U of them.
"""

import math
from typing import NamedTuple

import torch
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

    No step waits for the device and no tensor grows with L * G.
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

    # winner[n, l] is the best box that claims location l of image n; B stands for background. Column L is where
    # the visited cells that are not positive go.
    winner = torch.full((N, L + 1), B, device=device)
    lower, upper = box[:, :2], box[:, 2:]                                        # (B, 2): x, y
    first = 0                                                                    # the level's first location
    for level in locations.levels:
        last = first + level.height * level.width
        xs = locations.xy[first:first + level.width, 0]                          # (W,)
        ys = locations.xy[first:last:level.width, 1]                             # (H,)
        lowest, highest = locations.size_range[first]
        if radius is not None:
            centre = (box[:, :2] + box[:, 2:]) / 2
            lower = torch.maximum(box[:, :2], centre - radius * level.stride)
            upper = torch.minimum(box[:, 2:], centre + radius * level.stride)
            extent = 2 * radius
        else:                                          # no larger box is within the range, but on the last level
            extent = 2 * CELLS_IN_RANGE if level is not locations.levels[-1] else math.inf
        x_cell, x_inside, x_size = _window(xs, lower[:, 0], upper[:, 0], box[:, 0], box[:, 2], level.stride, extent)
        y_cell, y_inside, y_size = _window(ys, lower[:, 1], upper[:, 1], box[:, 1], box[:, 3], level.stride, extent)
        size = torch.maximum(y_size[:, :, None], x_size[:, None, :])             # (B, V, U): max(l, t, r, b)
        positive = y_inside[:, :, None] & x_inside[:, None, :] & (size >= lowest) & (size <= highest)
        location = first + y_cell[:, :, None] * level.width + x_cell[:, None, :]
        slot = image.view(-1, 1, 1) * (L + 1) + torch.where(positive, location, L)
        rank = torch.arange(B, device=device).view(-1, 1, 1).expand_as(slot)
        winner.view(-1).scatter_reduce_(0, slot.flatten(), rank.flatten(), "amin")
        first = last
    winner = winner[:, :L]                                                       # (N, L)

    box = torch.cat([box, box.new_zeros(1, 4)])[winner]                          # (N, L, 4)
    label = torch.cat([label, label.new_full((1,), -1)])[winner]                 # (N, L)
    ltrb = torch.cat([locations.xy - box[..., :2], box[..., 2:] - locations.xy], dim=-1)
    return Targets(label, torch.where(label[..., None] >= 0, ltrb, 0.0))


def _window(centres, lower, upper, start, end, stride, extent):
    """Along one axis, the run of cells that holds all centres strictly between `lower` and `upper` (both (B,)).

    Returns each cell's index, whether its centre is inside, and its distance to the farther end of the box
    `start` .. `end`; all (B, V) for an interval of at most `extent` strides, which V - 1 cells can cover.
    """
    cells = len(centres) if math.isinf(extent) else min(len(centres), math.ceil(extent) + 1)
    before = ((lower - centres[0]) / stride).floor().clamp(0, len(centres) - cells).long()  # (B,)
    cell = before[:, None] + torch.arange(cells, device=before.device)                      # (B, V)
    centre = centres[cell]
    inside = (centre > lower[:, None]) & (centre < upper[:, None])
    return cell, inside, torch.maximum(centre - start[:, None], end[:, None] - centre)
