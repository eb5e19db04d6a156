"""plots.py: the right numbers are drawn."""

import json

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import plots
from conftest import good_content, truth_as_detections, write_split
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


def test_targets_of_the_example_are_counted_and_only_levels_that_learn_are_drawn(tmp_path, capsys):
    plots.main(["targets", "--out", str(tmp_path / "new" / "t.png")])
    small = next(line for line in capsys.readouterr().out.splitlines() if "48 x 48" in line)
    # Strictly inside it are 6 x 5 centers of stride 8, and 2 x 3 within 12 pixels of its middle.
    assert list(map(int, small.split()[4:])) == [30, 0, 0, 0, 0, 6, 0, 0, 0, 0]
    assert min(Image.open(tmp_path / "new" / "t.png").size) > 900


def test_targets_of_an_image_are_found_by_its_id_and_an_unknown_one_is_refused(shapes, tmp_path):
    _, boxes = plots.read_image(shapes, 12)  # train has ids 1 .. 3
    truth = data.open_split(shapes, "val").targets(11)[0]
    np.testing.assert_array_equal(boxes, truth)
    with pytest.raises(data.UserError, match="image 99 is in neither"):
        plots.main(["targets", "--data", str(shapes), "--image", "99"])


def test_curves_of_the_losses_are_those_of_closed_forms(tmp_path, drawn):
    plots.main(["losses", "--out", str(tmp_path / "l.png")])
    (u, loss), (_, slope) = (map(np.asarray, drawn[i].curves["linear_iou"]) for i in (0, 3))
    smaller = u < 0.5  # boxes of s times the size of the target, of 40 x 40 pixels, inside it
    s = 4 ** (2 * u[smaller] - 1)
    np.testing.assert_allclose(loss[smaller], 1 - ((40 * s) ** 2 + 1) / 1601, rtol=1e-4)
    # Each of the four sides lengthens the intersection of 40 s pixels.
    np.testing.assert_allclose(slope[smaller], 2 * 40 * s / 1601, rtol=1e-4)
    p, loss = map(np.asarray, drawn[2].curves["gamma 2"])
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
    found = truth_as_detections(dataset.annotations, 0.9)
    i = int(np.bincount(dataset.annotations.image).argmax())
    first, second, third = np.flatnonzero(dataset.annotations.image == i)[:3].tolist()
    found[first]["bbox"][0] += 1000  # misses
    found[second]["score"] = 0.29
    evaluation = evaluate.coco_evaluation(dataset.annotations, found)
    verdict = plots.judge(evaluation)[dataset.annotations.image_ids[i]]
    missed, wrong, right = ({row["id"] - 1 for row in rows} for rows in verdict.values())
    assert missed == {first, second} and wrong == {first}
    assert third in right and second not in right


def test_pictures_of_an_evaluation_are_written_and_those_of_an_older_one_removed(
        shapes, tmp_path, drawn):
    dataset = data.open_split(shapes, "val")
    a, folder = dataset.annotations, tmp_path / "eval"
    with pytest.raises(data.UserError, match="eval: no evaluation here; write one"):
        plots.main(["evaluation", str(tmp_path)])
    folder.mkdir()
    metrics = evaluate.coco_metrics(a, []) | {"split": [a.path, dataset.folder]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "results.json").write_text("[]")
    other = write_split(tmp_path / "other", good_content(), "val").parents[1]
    with pytest.raises(data.UserError, match="eval: is not an evaluation of .*/instances_val.json"):
        plots.main(["evaluation", str(tmp_path), "--data", str(other)])
    for name, results in (("all right", truth_as_detections(a, 0.9)), ("none", [])):
        (folder / "results.json").write_text(json.dumps(results))
        plots.main(["evaluation", str(tmp_path)])
        pictures = {path.stem for path in folder.glob("*.png")}
        other = "best" if name == "all right" else "worst"
        assert pictures == {"precision_recall", other}
    for panel in drawn:
        assert (min(panel.x_ticks), max(panel.y_ticks)) == (0, 1)
    assert all((y == 1).all() for _, y in drawn[0].curves.values())
