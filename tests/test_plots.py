"""plots.py: the right numbers are drawn, and nothing is cut off."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageFont

import data
import evaluate
import plots
from make_shapes import make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, num_train=3, num_val=12)
    return root


@pytest.fixture
def drawn(monkeypatch):
    """The panels of every chart."""
    panels, chart = [], plots.chart
    monkeypatch.setattr(plots, "chart", lambda new: panels.extend(new) or chart(new))
    return panels


def detections(dataset):
    """All true boxes as detections with score 0.9."""
    a = dataset.annotations
    return evaluate.Results(a.image_ids[a.image], a.boxes.astype(np.float32),
                            np.full(len(a.image), 0.9, np.float32), a.labels)


@pytest.mark.parametrize("values, expected", [
    ([0, 1], [0, .2, .4, .6, .8, 1]), ([20, 1590], [0, 500, 1000, 1500, 2000]), ([0, 0], None),
    ([-1, 0.4], [-1, -.5, 0, .5]), ([180_000], [0, 50_000, 100_000, 150_000, 200_000])])
def test_ticks_are_round_and_enclose_the_values_and_zero(values, expected):
    ticks = plots.ticks(values)
    assert len(ticks) > 1 if expected is None else list(ticks) == pytest.approx(expected)
    assert all(float(label) == pytest.approx(tick) for tick, label in ticks.items())


def test_a_legend_is_not_clipped_however_long_its_names():
    curve = [0, 1], [0, 1]
    picture = plots.chart([plots.Panel("t", "x", {"run" * 50: curve, "b": curve})] * 2)
    pixels = np.asarray(picture.convert("L"))
    length = ImageFont.load_default(13).getlength("run" * 50)
    assert picture.width > 2 * length and (pixels[:, -4:] == 255).all()
    left, right = (pixels[25:45, x:x + picture.width // 2] for x in (0, picture.width // 2))
    assert (left == right).mean() > 0.99 and (left < 200).any()  # nothing runs into the next panel


def test_targets_of_the_example_are_counted_and_only_levels_that_learn_are_drawn(tmp_path, capsys):
    plots.main(["targets", "--out", str(tmp_path / "new" / "t.png")])
    small = next(line for line in capsys.readouterr().out.splitlines() if "48 x 48" in line)
    # Strictly inside it are 6 x 5 centers of stride 8, and 2 x 3 within 12 pixels of its middle.
    assert list(map(int, small.split()[4:])) == [30, 0, 0, 0, 0, 6, 0, 0, 0, 0]
    assert Image.open(tmp_path / "new" / "t.png").size == (972, 4 * (216 + 30))


def test_targets_of_an_image_are_found_by_its_id_and_an_unknown_one_is_refused(shapes, tmp_path):
    _, boxes = plots.read_image(shapes, 12)  # train has ids 1 .. 3
    truth = data.open_split(shapes, "val").targets(11)[0]
    np.testing.assert_array_equal(boxes, truth)
    with pytest.raises(data.UserError, match="image 99 is in neither"):
        plots.main(["targets", "--data", str(shapes), "--image", "99"])


def test_printed_slopes_of_the_losses_are_those_of_closed_forms(tmp_path, capsys, drawn):
    plots.main(["losses", "--out", str(tmp_path / "l.png")])
    small = capsys.readouterr().out.split("\n\n")[1]  # 20 x 20 pixels in the middle of 40 x 40
    iou, slope = 401 / 1601, 20 / 1601                # d iou / d l = the height / (U + 1)
    numbers = {line.split()[0]: [float(x) for x in re.findall(r"-?\d\.\d{4}", line)]
               for line in small.splitlines()[1:]}
    assert numbers["linear_iou"] == pytest.approx([1 - iou] + [-slope] * 4, abs=1e-4)
    assert numbers["iou"] == pytest.approx([-np.log(iou)] + [-slope / iou] * 4, abs=1e-4)
    p, loss = map(np.array, drawn[2].curves["gamma 2"])
    np.testing.assert_allclose(loss, -(1 - p) ** 2 * np.log(p), rtol=1e-4)


def test_curves_are_those_of_the_runs_and_torn_lines_are_skipped(tmp_path, drawn):
    terms = {"cls": 0.5, "box": 0.25, "centerness": 0.25}
    for name, losses in (("a", [2.0, 1.0]), ("b", [3.0])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": 10 * n, "loss": x} | terms) for n, x in enumerate(losses, 1)]
        lines += [json.dumps({"step": 20, "AP": 0.4, "AP50": 0.6})] if name == "a" else []
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "lo')
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    plots.main(["curves", a, b, "--out", str(tmp_path / "c.png")])
    curves = {panel.title: panel.curves for panel in drawn}
    assert list(curves) == ["loss", "cls", "box", "centerness", "AP", "AP50"]
    assert curves["loss"] == {a: ((10, 20), (2.0, 1.0)), b: ((10,), (3.0,))}
    assert curves["AP"] == {a: ((20,), (0.4,)), b: ((), ())}
    with pytest.raises(data.UserError, match="no metrics.jsonl"):
        plots.main(["curves", str(tmp_path)])


def test_a_detection_is_judged_above_the_threshold_and_a_low_one_leaves_its_object_missed(shapes):
    dataset = data.open_split(shapes, "val")
    found = detections(dataset)
    i = int(np.bincount(dataset.annotations.image).argmax())
    first, second, third = np.flatnonzero(dataset.annotations.image == i)[:3].tolist()
    found.boxes[first] += 1000  # misses
    found.scores[second] = 0.29
    evaluation = evaluate.coco_evaluation(dataset.annotations, found)
    verdict = plots.judge(evaluation, dataset.annotations, found)[i]
    assert verdict["wrong"] == [first] and sorted(verdict["missed"]) == [first, second]
    assert third in verdict["right"] and second not in verdict["right"]


def test_best_needs_a_right_detection_and_worst_an_error():
    results = evaluate.Results(None, None, np.array([0.9, 0.5, 0.7]), None)
    verdicts = {0: {"right": [0], "wrong": [1], "missed": []},
                1: {"right": [], "wrong": [2], "missed": [0, 1]},
                2: {"right": [0], "wrong": [], "missed": []},
                3: {"right": [], "wrong": [], "missed": []}}
    chosen = {name: list(images) for name, images in plots.choose(verdicts, results).items()}
    assert chosen == {"best": [2, 0], "worst": [1, 0], "wrong": [1, 0]}


@pytest.mark.parametrize("aspect", [[1.5] * 8, [0.5, 2, 1, 1, 3, 0.7, 1], [0.1], [9.0, 1, 1]])
def test_rows_of_images_have_one_height_and_leave_no_hole(aspect):
    places = plots.layout(np.array(aspect, float))
    ends = set()
    for top in {y for _, y, _, _ in places}:
        row = [place for place in places if place[1] == top]
        assert row[0][0] == 0 and len({h for *_, h in row}) == 1
        assert all(x + w + 8 == after[0] for (x, _, w, _), after in zip(row, row[1:]))
        ends.add(row[-1][0] + row[-1][2])
    assert len(ends) == 1
    assert [w / h for _, _, w, h in places] == pytest.approx(aspect, rel=0.1)


def test_pictures_of_an_evaluation_are_written_and_those_of_an_older_one_removed(
        shapes, tmp_path, monkeypatch, drawn):
    dataset = data.open_split(shapes, "val")
    a, folder = dataset.annotations, tmp_path / "eval"
    categories = {"ids": a.category_ids, "names": a.category_names}
    monkeypatch.setattr(plots, "load_checkpoint", lambda path: {
        "config": {"data": str(shapes), "val_split": ""}, "categories": categories})
    with pytest.raises(data.UserError, match="results.json: no such file"):
        plots.main(["evaluation", str(tmp_path)])
    folder.mkdir()
    for name, results in (("all right", detections(dataset)), ("none", evaluate.NOTHING)):
        text = json.dumps(evaluate.coco_results(results, a.category_ids))
        (folder / "results.json").write_text(text)
        plots.main(["evaluation", str(tmp_path)])
        pictures = {path.stem for path in folder.glob("*.png")}
        other = "best" if name == "all right" else "worst"
        assert pictures == {"precision_recall", other}
    for panel in drawn:
        assert (min(panel.x_ticks), max(panel.y_ticks)) == (0, 1)
    assert all((y == 1).all() for _, y in drawn[0].curves.values())
