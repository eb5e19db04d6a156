"""assign.py: what should every location predict?  (FCOS, arXiv:1904.01355, Sec. 3.1-3.2)

The detector predicts one box at every location of every pyramid level. A location is the centre
of a feature-map cell, ((i + 0.5) * stride, (j + 0.5) * stride) in pixels of the padded image.
Seen from a location (x, y), a box (x0, y0, x1, y1) is four distances:

    l = x - x0,  t = y - y0,  r = x1 - x,  b = y1 - y                      ("ltrb", Eq. 1)

A location is positive for a box if

 1. it lies strictly inside the box -- with center sampling (FCOS_PLUS), strictly inside the square
    `centre +- radius * stride`, clipped to the box: locations near an edge predict it badly;
 2. max(l, t, r, b) of the whole box is in the size range of the location's level, ends included:
    [-1, 64] [64, 128] [128, 256] [256, 512] [512, inf] pixels for strides 8, 16, 32, 64, 128.

Where several boxes qualify, the smallest area wins, and on equal areas the first box. All other
locations are background. A positive location also learns its centerness (Eq. 3):

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))

The usual implementation compares all L locations with all G boxes. Here each box visits only the
cells it could claim, 4 x 4 a level with center sampling of 1.5, so time and memory hardly depend
on G. `tests/test_assign.py` compares this with the definition above.

Letters: N images, L locations over all levels, G boxes of one image, B boxes of all images,
S levels, V cells of a box's window along one axis.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)  # pixels; P3 .. P7
CELLS_IN_RANGE = 8              # a level learns boxes with max(l, t, r, b) <= 8 of its strides


class Locations(NamedTuple):
    """All locations of a padded image: smallest stride first, row by row in a level."""
    xy: Tensor          # (L, 2) pixels
    stride: Tensor      # (L,) pixels
    size_range: Tensor  # (L, 2) pixels: smallest and largest max(l, t, r, b) of a positive
    grids: tuple[tuple[int, int], ...]  # S: width and height of each level, in cells
    first: Tensor       # (S,) int64: index of each level's first location
    cells: Tensor       # (S, 2) int64: `grids` as a tensor


class Targets(NamedTuple):
    """What every location of every image should predict."""
    labels: Tensor      # (N, L) int64 in [0, C), -1 is background
    ltrb: Tensor        # (N, L, 4) pixels, 0 at background
    centerness: Tensor  # (N, L) in [0, 1], 0 at background


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cache outlives a caller's inference mode
def make_locations(height, width, strides=STRIDES, offset=0.5, device="cpu") -> Locations:
    """The locations of a padded image of `height` x `width` pixels. Cached: do not write to them.

    `offset` is the position of a location in its cell, in strides: 0.5 is the centre (FCOS), 0 the
    corner (torchvision).
    """
    grids = tuple(((width - 1) // s + 1, (height - 1) // s + 1) for s in strides)
    xy, stride, size_range, first = [], [], [], [0]
    limits = [-1.0, *(float(CELLS_IN_RANGE * s) for s in strides[:-1]), math.inf]
    for s, (W, H), smallest, largest in zip(strides, grids, limits, limits[1:]):
        y = (torch.arange(H, dtype=torch.float32) + offset) * s                        # (H,)
        x = (torch.arange(W, dtype=torch.float32) + offset) * s                        # (W,)
        y, x = torch.meshgrid(y, x, indexing="ij")                                     # (H, W)
        xy.append(torch.stack([x, y], dim=-1).view(-1, 2))                             # (H*W, 2)
        stride.append(torch.full((W * H,), float(s)))                                  # (H*W,)
        size_range.append(torch.tensor([smallest, largest]).expand(W * H, 2))          # (H*W, 2)
        first.append(first[-1] + W * H)
    xy, stride, size_range, first, cells = (x.to(device) for x in (
        torch.cat(xy), torch.cat(stride), torch.cat(size_range), torch.tensor(first[:-1]),
        torch.tensor(grids)))
    return Locations(xy, stride, size_range, grids, first, cells)


def assign_targets(locations: Locations, boxes: list[Tensor], labels: list[Tensor],
                   radius: float | None = 1.5) -> Targets:
    """The label, distances and centerness that every location should predict.

    Args:
        locations: from `make_locations`.
        boxes: N tensors (G, 4), xyxy in pixels of the padded image; G may be 0.
        labels: N tensors (G,), int64 in [0, C).
        radius: of center sampling, in strides; None makes the whole box positive.

    No host-device sync. With center sampling no tensor grows with L * G.
    """
    N, L, device = len(boxes), len(locations.xy), locations.xy.device
    box = torch.cat(boxes).to(device, torch.float32)                             # (B, 4)
    label = torch.cat(labels).to(device)                                         # (B,)
    B = len(box)
    image = [n for n, b in enumerate(boxes) for _ in range(len(b))]
    image = torch.tensor(image, dtype=torch.int64, pin_memory=device.type == "cuda")
    image = image.to(device, non_blocking=True)                                  # (B,)

    # Sorted by area (stable: equal areas keep their order), a box's index is its rank: lowest wins.
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    order = area.argsort(stable=True)
    box, label, image = box[order], label[order], image[order]

    # A window of V x V cells for each box and level that holds all its positive locations.
    start, end = box[:, None, :2], box[:, None, 2:]                              # (B, 1, 2): x, y
    stride = locations.stride[locations.first, None]                             # (S, 1)
    origin = locations.xy[locations.first]                                       # (S, 2)
    smallest, largest = locations.size_range[locations.first, :, None].unbind(1)  # (S, 1) each
    radius = math.inf if radius is None else radius
    centre = (start + end) / 2
    lower = torch.maximum(start, centre - radius * stride)                       # (B, S, 2)
    upper = torch.minimum(end, centre + radius * stride)                         # (B, S, 2)
    corner = ((torch.maximum(lower, end - largest) - origin) / stride).floor().clamp(min=0)
    # Cells at most 8 strides from both ends of a box of s strides span min(s, 16 - s) <= 8 strides;
    # the last level has no such bound, but a finite number of cells.
    span = min(2 * radius, max(CELLS_IN_RANGE, *locations.grids[-1]))
    window = torch.arange(1 + math.ceil(span), device=device)                    # (V,)
    cell = corner.long()[..., None] + window                                     # (B, S, 2, V)
    xy = cell * stride[..., None] + origin[..., None]                            # (B, S, 2, V)
    start, end, lower, upper = (x[..., None] for x in (start, end, lower, upper))

    # Both axes must fit, and one side must be far enough for the level.
    farthest = torch.maximum(xy - start, end - xy)                               # (B, S, 2, V)
    fits = ((xy > lower) & (xy < upper) & (farthest <= largest[..., None])
            & (cell < locations.cells[..., None]))
    far = farthest >= smallest[..., None]
    positive = (fits[:, :, 1, :, None] & fits[:, :, 0, None]
                & (far[:, :, 1, :, None] | far[:, :, 0, None]))              # (B, S, V, V): y, x

    # winner[n, l] is the best box that claims location l of image n; B stands for background.
    first = image[:, None, None] * L + locations.first[:, None]                  # (B, S, 1)
    row = first + cell[:, :, 1] * locations.cells[:, :1]                         # (B, S, V)
    location = (row[..., None] + cell[:, :, 0, None]).clamp(max=N * L - 1)       # (B, S, V, V)
    rank = torch.arange(B, device=device, dtype=torch.int32)[:, None, None, None]
    rank = torch.where(positive, rank, B)
    winner = torch.full((N * L,), B, device=device, dtype=torch.int32)
    winner = winner.scatter_reduce_(0, location.flatten(), rank.flatten(), "amin").view(N, L)

    box = torch.cat([box, box.new_zeros(1, 4)])[winner]                          # (N, L, 4)
    label = torch.cat([label, label.new_full((1,), -1)])[winner]                 # (N, L)
    ltrb = torch.cat([locations.xy - box[..., :2], box[..., 2:] - locations.xy], dim=-1)
    background = label < 0
    return Targets(label, ltrb.masked_fill(background[..., None], 0),
                   centerness_target(ltrb).masked_fill(background, 0))


def centerness_target(ltrb: Tensor) -> Tensor:
    """How central a location is in its box: 1 in the centre, 0 on an edge (Eq. 3).

    (..., 4) distances > 0 -> (...,).
    """
    l, t, r, b = ltrb.unbind(-1)
    return (torch.minimum(l, r) / torch.maximum(l, r)
            * (torch.minimum(t, b) / torch.maximum(t, b))).sqrt()
