"""Which location learns which box: every rule by hand, then thousands of random cases against the definition."""

import json
import math
import random
import subprocess
import sys

import pytest
import torch
from PIL import Image

import assign as our
from assign import STRIDES, assign_targets, make_locations


def assign(boxes, height=64, width=64, strides=(8,), labels=None, radius=None):
    """Targets of one image, with labels 0, 1, .. unless given."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.arange(len(boxes)) if labels is None else torch.tensor(labels)
    locations = make_locations(height, width, strides)
    targets = assign_targets(locations, [boxes], [labels], radius)
    return locations, targets.labels[0], targets.ltrb[0]


def label_at(locations, labels, x, y, stride=8):
    here = (locations.xy == torch.tensor([x, y])).all(dim=1) & (locations.stride == stride)
    assert here.sum() == 1
    return labels[here].item()


def by_definition(locations, boxes, labels, radius):
    """Every location against every box, as the paper says it: (L,) labels and (L, 4) distances of one image."""
    L = len(locations.xy)
    if len(boxes) == 0:
        return torch.full((L,), -1), torch.zeros(L, 4)
    x, y = locations.xy[:, :1], locations.xy[:, 1:]                                             # (L, 1)
    x0, y0, x1, y1 = boxes.unbind(1)                                                            # (G,)
    ltrb = torch.stack([x - x0, y - y0, x1 - x, y1 - y], dim=-1)                                # (L, G, 4)
    inside = ltrb.amin(-1) > 0                                                                  # (L, G)
    if radius is not None:
        reach = radius * locations.stride[:, None]                                              # (L, 1)
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        inside &= (x > torch.maximum(cx - reach, x0)) & (x < torch.minimum(cx + reach, x1))
        inside &= (y > torch.maximum(cy - reach, y0)) & (y < torch.minimum(cy + reach, y1))
    size = ltrb.amax(-1)                                                                        # (L, G)
    lowest, highest = locations.size_range[:, :1], locations.size_range[:, 1:]
    area = ((x1 - x0) * (y1 - y0)).expand(L, -1)
    area = torch.where(inside & (size >= lowest) & (size <= highest), area, math.inf)
    smallest, winner = area.min(dim=1)  # the first of equals
    label = torch.where(smallest < math.inf, labels[winner], -1)
    return label, ltrb[torch.arange(L), winner] * (label >= 0)[:, None]


def test_locations_are_cell_centres_level_by_level_and_row_by_row():
    locations = make_locations(16, 24, strides=(8, 16))
    assert locations.xy.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert locations.stride.tolist() == [8] * 6 + [16] * 2
    assert [tuple(level) for level in locations.levels] == [(8, 2, 3), (16, 1, 2)]


def test_size_ranges_of_the_five_levels_are_those_of_the_paper():
    locations = make_locations(128, 128)
    ranges = [locations.size_range[locations.stride == s][0].tolist() for s in STRIDES]
    assert ranges == [[-1, 64], [64, 128], [128, 256], [256, 512], [512, math.inf]]


def test_offset_0_puts_locations_on_the_cell_corners():
    assert make_locations(8, 16, strides=(8,), offset=0).xy.tolist() == [[0, 0], [8, 0]]


def test_ltrb_are_the_distances_to_the_four_sides():
    locations, labels, ltrb = assign([[1, 2, 9, 11]], height=16, width=16)
    assert labels.tolist() == [0, -1, -1, -1]
    assert ltrb[0].tolist() == [3, 2, 5, 7]


def test_background_has_label_minus_one_and_no_distances():
    _, labels, ltrb = assign([[0, 0, 10, 10]], height=8, width=24)
    assert labels.tolist() == [0, -1, -1] and ltrb[1:].abs().sum() == 0


def test_a_location_on_the_edge_of_a_box_is_background():
    _, labels, _ = assign([[4, 0, 12, 8]], height=8, width=24)  # the edges run through the locations at x = 4 and 12
    assert labels.tolist() == [-1, -1, -1]


def test_smaller_box_wins_when_two_contain_a_point():
    _, labels, _ = assign([[0, 0, 24, 8], [0, 0, 10, 8]], height=8, width=24)
    assert labels.tolist() == [1, 0, 0]


def test_first_box_wins_when_areas_are_equal():
    _, labels, _ = assign([[0, 0, 16, 8], [8, 0, 24, 8]], height=8, width=24, labels=[5, 3])
    assert labels.tolist() == [5, 5, 3]


def test_both_ends_of_a_size_range_are_included():
    # From (64, 32), a box reaches 64 pixels to the right: highest of stride 8, lowest of stride 16.
    for stride in (8, 16):
        centre = 60 if stride == 8 else 56
        locations, labels, _ = assign([[centre - 8, 24, centre + 64, 80]], height=128, width=256, strides=(8, 16, 32))
        y = 28 if stride == 8 else 40
        assert label_at(locations, labels, centre, y, stride) == 0


def test_size_is_judged_on_the_whole_box_not_on_the_sampled_centre():
    box = [[100, 100, 400, 400]]  # around its centre, 150 to 246 pixels to the farthest side
    locations, labels, _ = assign(box, height=512, width=512, strides=STRIDES, radius=1.5)
    assert set(locations.stride[labels >= 0].tolist()) == {32}


def test_center_sampling_keeps_the_nine_cells_around_a_cell_centre():
    locations, labels, _ = assign([[4, 4, 68, 68]], height=96, width=96, radius=1.5)
    positive = locations.xy[labels >= 0]
    assert positive.amin(0).tolist() == [28, 28] and positive.amax(0).tolist() == [44, 44] and len(positive) == 9


def test_center_sampling_region_is_clipped_to_the_box():
    locations, labels, _ = assign([[0, 24, 60, 32]], height=64, width=64, radius=1.5)
    assert locations.xy[labels >= 0].tolist() == [[20, 28], [28, 28], [36, 28]]


def test_a_box_between_the_cell_centres_has_no_location():
    _, labels, _ = assign([[5, 5, 11, 11]], radius=1.5)
    assert (labels == -1).all()


def test_images_of_a_batch_do_not_see_each_other():
    locations = make_locations(64, 64)
    boxes = [torch.tensor([[0.0, 0, 30, 30]]), torch.zeros(0, 4), torch.tensor([[20.0, 20, 60, 60]])]
    labels = [torch.tensor([1]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    together = assign_targets(locations, boxes, labels)
    for n in range(3):
        alone = assign_targets(locations, boxes[n:n + 1], labels[n:n + 1])
        assert torch.equal(together.labels[n], alone.labels[0]) and torch.equal(together.ltrb[n], alone.ltrb[0])


def test_a_batch_without_boxes_is_all_background():
    targets = assign_targets(make_locations(64, 64), [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    assert (targets.labels == -1).all() and targets.ltrb.abs().sum() == 0


@pytest.mark.parametrize("radius", [1.5, None, 0.6, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_random_boxes_get_what_the_definition_says(seed, radius):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for case in range(60):
        height, width = draw.randint(1, 420), draw.randint(1, 420)
        locations = make_locations(height, width, offset=draw.choice([0.5, 0.0]))
        boxes, labels = [], []
        for _ in range(3):
            count = draw.choice([0, 1, 2, 10, 40]) if case % 20 else 300
            centre, size = torch.rand(count, 2) * torch.tensor([width, height]), torch.exp(torch.rand(count, 2) * 6.5)
            box = torch.cat([centre - size / 2, centre + size / 2], dim=1)
            boxes.append((box / 4).round() * 4 if case % 2 else box)  # on a grid: edges on locations, equal areas
            labels.append(torch.randint(0, 80, (count,)))
        targets = assign_targets(locations, boxes, labels, radius)
        for n in range(3):
            label, ltrb = by_definition(locations, boxes[n], labels[n], radius)
            assert torch.equal(targets.labels[n], label)
            assert torch.equal(targets.ltrb[n], ltrb)


def test_500_boxes_in_an_image_stay_far_below_the_memory_of_all_pairs():
    # All pairs would be 22,400 x 500 x 4 floats = 171 MB an image. The peak is read in a process of its own.
    code = """
import resource, torch
from assign import assign_targets, make_locations
def run(count):
    start = torch.rand(count, 2) * 700
    boxes = torch.cat([start, start + 1 + torch.rand(count, 2) * 300], dim=1)
    assign_targets(make_locations(800, 1344), [boxes], [torch.zeros(count, dtype=torch.int64)])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(run(500) - run(1)) if run(1) else None
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) < 30, f"{printed} MB more"


def test_the_demo_counts_what_the_definition_says_and_draws_a_row_for_each_level(tmp_path, capsys):
    our.main(["--out", str(tmp_path / "new" / "assign.png")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:-1]]
    image, boxes = our.example()
    locations = make_locations(image.height, image.width)
    labels = [by_definition(locations, boxes, torch.arange(len(boxes)), radius)[0] for radius in (None, 1.5)]
    for g, row in enumerate(rows):
        expected = [((label == g) & (locations.stride == s)).sum().item() for label in labels for s in STRIDES]
        assert [int(count) for count in row[-10:]] == expected
    with Image.open(tmp_path / "new" / "assign.png") as picture:
        assert len(rows) == len(boxes) and picture.size == (972, 4 * 250)


def test_the_demo_draws_an_image_of_a_data_set_and_refuses_an_unknown_one_in_a_sentence(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "val2017" / "a.jpg")
    boxes = [{"image_id": 7, "bbox": [8, 8, 40, 40]}, {"image_id": 7, "bbox": [0, 0, 90, 60], "iscrowd": 1}]
    content = {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": boxes}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    assert our.read(tmp_path, 7)[1].tolist() == [[8, 8, 48, 48]]
    our.main(["7", "--data", str(tmp_path), "--out", str(tmp_path / "7.png")])
    with Image.open(tmp_path / "7.png") as picture:
        assert picture.size == (972, 320 + 34)
    ended = subprocess.run([sys.executable, our.__file__, "8", "--data", tmp_path], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "no image 8" in ended.stderr
