"""Which location learns which box: every rule by hand, then random cases against the definition."""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from assign import STRIDES, assign_targets, centerness_target, make_locations


def assign(boxes, height=64, width=64, strides=(8,), labels=None, radius=None):
    """Locations and targets of one image, with labels 0, 1, ... unless given."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.arange(len(boxes)) if labels is None else torch.tensor(labels)
    locations = make_locations(height, width, strides)
    targets = assign_targets(locations, [boxes], [labels], radius)
    return locations, targets.labels[0], targets.ltrb[0]


def by_definition(locations, boxes, labels, radius):
    """Every location against every box, as the paper says it: (L,) labels and (L, 4) ltrb."""
    L = len(locations.xy)
    if len(boxes) == 0:
        return torch.full((L,), -1), torch.zeros(L, 4)
    x, y = locations.xy[:, :1], locations.xy[:, 1:]                              # (L, 1)
    x0, y0, x1, y1 = boxes.unbind(1)                                             # (G,)
    ltrb = torch.stack([x - x0, y - y0, x1 - x, y1 - y], dim=-1)                 # (L, G, 4)
    inside = ltrb.amin(-1) > 0                                                   # (L, G)
    if radius is not None:
        reach = radius * locations.stride[:, None]                               # (L, 1)
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        inside &= (x > torch.maximum(cx - reach, x0)) & (x < torch.minimum(cx + reach, x1))
        inside &= (y > torch.maximum(cy - reach, y0)) & (y < torch.minimum(cy + reach, y1))
    size = ltrb.amax(-1)                                                         # (L, G)
    smallest, largest = locations.size_range[:, :1], locations.size_range[:, 1:]
    area = ((x1 - x0) * (y1 - y0)).expand(L, -1)
    area = torch.where(inside & (size >= smallest) & (size <= largest), area, math.inf)
    best, winner = area.min(dim=1)  # the first of equals
    label = torch.where(best < math.inf, labels[winner], -1)
    return label, ltrb[torch.arange(L), winner] * (label >= 0)[:, None]


# --- locations ----------------------------------------------------------------------------------

def test_locations_are_cell_centres_level_by_level_and_row_by_row():
    locations = make_locations(16, 24, strides=(8, 16))
    assert locations.xy.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12],
                                     [8, 8], [24, 8]]
    assert locations.stride.tolist() == [8] * 6 + [16] * 2
    assert locations.grids == ((3, 2), (2, 1))


def test_offset_0_puts_locations_on_the_cell_corners():
    assert make_locations(8, 16, strides=(8,), offset=0).xy.tolist() == [[0, 0], [8, 0]]


def test_size_ranges_of_the_five_levels_are_those_of_the_paper():
    locations = make_locations(128, 128)
    ranges = [locations.size_range[locations.stride == s][0].tolist() for s in STRIDES]
    assert ranges == [[-1, 64], [64, 128], [128, 256], [256, 512], [512, math.inf]]


# --- the rules by hand --------------------------------------------------------------------------

def test_ltrb_are_the_distances_to_the_four_sides():
    _, labels, ltrb = assign([[1, 2, 9, 11]], height=16, width=16)
    assert labels.tolist() == [0, -1, -1, -1]
    assert ltrb.tolist() == [[3, 2, 5, 7], [0] * 4, [0] * 4, [0] * 4]  # background: zeros


def test_a_location_on_the_edge_of_a_box_is_background():
    _, labels, _ = assign([[4, 0, 12, 8]], height=8, width=24)  # locations at x = 4, 12 and 20
    assert labels.tolist() == [-1, -1, -1]


def test_smaller_box_wins_when_two_contain_a_point():
    _, labels, _ = assign([[0, 0, 24, 8], [0, 0, 10, 8]], height=8, width=24)
    assert labels.tolist() == [1, 0, 0]


def test_first_box_wins_when_areas_are_equal():
    _, labels, _ = assign([[0, 0, 16, 8], [8, 0, 24, 8]], height=8, width=24, labels=[5, 3])
    assert labels.tolist() == [5, 5, 3]


@pytest.mark.parametrize("stride, centre, y", [(8, 60, 28), (16, 56, 40)])
def test_both_ends_of_a_size_range_are_included(stride, centre, y):
    # 64 pixels to the right: the largest distance of stride 8, the smallest of stride 16.
    box = [centre - 8, 24, centre + 64, 80]
    locations, labels, _ = assign([box], height=128, width=256, strides=(8, 16, 32))
    here = (locations.xy == torch.tensor([centre, y])).all(dim=1) & (locations.stride == stride)
    assert labels[here].tolist() == [0]


def test_size_is_judged_on_the_whole_box_not_on_the_sampled_centre():
    box = [[100, 100, 400, 400]]  # from around its centre, 150 to 246 pixels to the farthest side
    locations, labels, _ = assign(box, height=512, width=512, strides=STRIDES, radius=1.5)
    assert set(locations.stride[labels >= 0].tolist()) == {32}


def test_center_sampling_keeps_the_nine_cells_around_a_cell_centre():
    locations, labels, _ = assign([[4, 4, 68, 68]], height=96, width=96, radius=1.5)
    xy = locations.xy[labels >= 0].tolist()
    assert xy == [[x, y] for y in (28, 36, 44) for x in (28, 36, 44)]


def test_the_center_sampling_region_is_clipped_to_the_box():
    locations, labels, _ = assign([[0, 24, 60, 32]], radius=1.5)
    assert locations.xy[labels >= 0].tolist() == [[20, 28], [28, 28], [36, 28]]


def test_a_box_between_the_cell_centres_has_no_location():
    _, labels, _ = assign([[5, 5, 11, 11]], radius=1.5)
    assert (labels == -1).all()


def test_centerness_is_one_in_the_centre_and_falls_to_the_edges():
    ltrb = torch.tensor([[5.0, 5, 5, 5], [1, 4, 4, 4], [1, 1, 4, 4]])
    torch.testing.assert_close(centerness_target(ltrb), torch.tensor([1.0, 0.5, 0.25]))


def test_targets_hold_the_centerness_of_positives_and_zero_at_background():
    locations, boxes = make_locations(8, 24, (8,)), [torch.tensor([[0.0, 0, 20, 16]])]
    targets = assign_targets(locations, boxes, [torch.tensor([2])], None)
    assert targets.labels.tolist() == [[2, 2, -1]]
    # from (4, 4): l, r = 4, 16 and t, b = 4, 12; from (12, 4): l, r = 12, 8
    torch.testing.assert_close(targets.centerness[0], torch.tensor(
        [math.sqrt(4 / 16 * 4 / 12), math.sqrt(8 / 12 * 4 / 12), 0]))


# --- batches ------------------------------------------------------------------------------------

def test_locations_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        locations = make_locations(24, 1000)  # not cached yet
    assert not any(x.is_inference() for x in locations if isinstance(x, torch.Tensor))


def test_a_batch_without_boxes_is_all_background():
    none = torch.zeros(0, dtype=torch.int64)
    targets = assign_targets(make_locations(64, 64), [torch.zeros(0, 4)] * 2, [none] * 2)
    assert targets.labels.shape == (2, 64 + 16 + 4 + 1 + 1) and (targets.labels == -1).all()
    assert (targets.ltrb == 0).all() and (targets.centerness == 0).all()


@pytest.mark.parametrize("radius", [1.5, None, 0.6, 4.0])
def test_random_boxes_get_what_the_definition_says(radius):
    draw = random.Random(0)
    for case in range(200):
        height, width = draw.randint(1, 420), draw.randint(1, 420)
        locations = make_locations(height, width, offset=draw.choice([0.5, 0.0]))
        boxes, labels = [], []
        for _ in range(3):
            count = draw.choice([0, 1, 2, 10, 40]) if case % 20 else 300
            centre = torch.rand(count, 2) * torch.tensor([width, height])
            size = torch.exp(torch.rand(count, 2) * 6.5)
            box = torch.cat([centre - size / 2, centre + size / 2], dim=1)
            # half of the cases on a grid: edges run through locations, areas are equal
            boxes.append((box / 4).round() * 4 if case % 2 else box)
            labels.append(torch.randint(0, 80, (count,)))
        targets = assign_targets(locations, boxes, labels, radius)
        for n in range(3):
            label, ltrb = by_definition(locations, boxes[n], labels[n], radius)
            assert torch.equal(targets.labels[n], label)
            assert torch.equal(targets.ltrb[n], ltrb)


def test_500_boxes_in_an_image_stay_far_below_the_memory_of_all_pairs():
    # All pairs would be 22,400 x 500 x 4 floats = 171 MB. The peak needs a process of its own.
    code = """
import resource, sys, torch
from assign import assign_targets, make_locations
def peak_after(count):
    start = torch.rand(count, 2) * 700
    boxes = torch.cat([start, start + 1 + torch.rand(count, 2) * 300], dim=1)
    assign_targets(make_locations(800, 1344), [boxes], [torch.zeros(count, dtype=torch.int64)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
one = peak_after(1)
print(peak_after(500) - one)
"""
    root = Path(__file__).resolve().parents[1]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True,
                             text=True, check=True).stdout
    assert float(printed) < 30, f"{printed} MB more"
