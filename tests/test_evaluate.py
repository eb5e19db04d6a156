"""The figures are COCO's, every image counts once, and a zero is explained."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import evaluate
import train
from evaluate import Results
from model import CHECKPOINT_FORMAT, FCOS, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
COCO_MINI = ROOT.parent / "shared" / "data" / "coco_mini"
SMALL = ModelConfig(num_classes=3, backbone="resnet18", backbone_norm="group", channels=32, tower_depth=1, short_side=64, long_side=128,
                    score_threshold=0.0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    data.make_shapes(root, num_train=1, num_val=11, size=64)
    return root


def changed(root, tmp_path, change, split="val"):
    """The data set with another JSON, made by `change(content)`; images stay where they are."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    change(content)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    if not (tmp_path / split).exists():
        (tmp_path / split).symlink_to(root / split)
    return tmp_path


def open_val(root):
    return data.open_split(str(root), None, "val")


def truth_as_detections(annotations):
    images = np.repeat(annotations.image_ids, np.diff(annotations.first))
    keep = ~annotations.crowd
    return Results(images[keep], annotations.boxes[keep].astype(np.float32), np.ones(keep.sum(), np.float32), annotations.labels[keep])


def save_detector(path, config=SMALL, root="", names=data.SHAPES):
    torch.manual_seed(0)
    checkpoint = {"format": CHECKPOINT_FORMAT, "step": 0, "model": FCOS(config).state_dict(),
                  "config": asdict(train.TrainConfig(model=config, data=str(root))),
                  "categories": {"ids": list(range(1, len(names) + 1)), "names": list(names)}}
    torch.save(checkpoint, path)
    return path


def number_from_zero(content):
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = i


def sparse_ids(content):
    for image in content["images"]:
        image["id"] = image["id"] * 977 + 10**9
    for category in content["categories"]:
        category["id"] = category["id"] * 13 + 5
    for annotation in content["annotations"]:
        annotation["image_id"] = annotation["image_id"] * 977 + 10**9
        annotation["category_id"] = annotation["category_id"] * 13 + 5


def all_one_id(content):
    for annotation in content["annotations"]:
        annotation["id"] = 7


def without_optional_keys(content):
    content.pop("info", None)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]


@pytest.mark.parametrize("change", [lambda content: None, number_from_zero, sparse_ids, without_optional_keys],
                         ids=["as it is", "annotation id 0", "sparse ids", "no info, area, iscrowd"])
def test_ground_truth_fed_back_as_detections_has_average_precision_1(shapes, tmp_path, change):
    annotations = open_val(changed(shapes, tmp_path, change)).annotations
    metrics = evaluate.coco_metrics(annotations, truth_as_detections(annotations))
    assert metrics["figures"]["AP"] == 1 and metrics["figures"]["AP50"] == 1
    assert all(c["AP"] == 1 for c in metrics["classes"])


@pytest.mark.skipif(not COCO_MINI.exists(), reason="no COCO images beside the repository (../shared/data/coco_mini)")
def test_figures_are_those_of_pycocotools_on_real_annotations_with_crowds():
    dataset = open_val(COCO_MINI)
    random = np.random.default_rng(0)
    truth = truth_as_detections(dataset.annotations)
    shifted = truth._replace(boxes=(truth.boxes + random.normal(0, 8, truth.boxes.shape)).astype(np.float32),
                             scores=random.random(len(truth.scores)).astype(np.float32))
    metrics = evaluate.coco_metrics(dataset.annotations, shifted)
    theirs = COCO(dataset.annotations.path)
    evaluation = COCOeval(theirs, theirs.loadRes(evaluate.coco_results(shifted, dataset.annotations.category_ids)), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert list(metrics["figures"].values()) == pytest.approx(evaluation.stats.tolist(), abs=2e-3)  # they see rounded boxes
    assert 0.05 < metrics["figures"]["AP"] < 0.95


def test_no_detection_at_all_is_0_and_explained(shapes):
    annotations = open_val(shapes).annotations
    nothing = Results(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    metrics = evaluate.coco_metrics(annotations, nothing)
    assert metrics["figures"]["AP"] == 0
    (sentence,) = evaluate.explain(metrics, annotations, nothing)
    assert "not one detection scored above the threshold" in sentence


def test_a_split_without_boxes_is_minus_1_and_explained(shapes, tmp_path):
    annotations = open_val(changed(shapes, tmp_path, lambda content: content.update(annotations=[]))).annotations
    nothing = Results(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    metrics = evaluate.coco_metrics(annotations, nothing)
    assert metrics["figures"]["AP"] == -1
    assert "no boxes" in evaluate.explain(metrics, annotations, nothing)[0]


def test_a_class_that_is_missed_and_a_size_that_is_absent_are_explained(shapes):
    annotations = open_val(shapes).annotations
    truth = truth_as_detections(annotations)
    keep = truth.labels != 1
    found = Results(*(column[keep] for column in truth))
    sentences = "; ".join(evaluate.explain(evaluate.coco_metrics(annotations, found), annotations, found))
    assert "AP large is -1: no true box is over 96 x 96 pixels" in sentences
    assert "AP is 0 for classes never detected: ellipse" in sentences
    moved = truth._replace(boxes=truth.boxes + 1000)
    sentences = "; ".join(evaluate.explain(evaluate.coco_metrics(annotations, moved), annotations, moved))
    assert "whose detections all miss" in sentences and "rectangle, ellipse, triangle" in sentences


def test_boxes_come_back_in_pixels_of_the_original_image(shapes):
    dataset = open_val(shapes)
    found = []
    for request in sum(data.evaluation_batches(dataset.annotations.sizes, 4, 100, 160, True), []):
        batch = dataset.__getitems__([request])
        scale = torch.from_numpy(dataset.annotations.sizes[request.index]) / batch.sizes[0]
        boxes = batch.boxes[0] * scale.flip(0).repeat(2).float()
        found.append((request.index, boxes))
    for index, boxes in found:
        first, last = dataset.boxes.first[index:index + 2]
        np.testing.assert_allclose(boxes.numpy(), dataset.boxes.boxes[first:last], atol=1e-3)


def test_every_image_is_evaluated_once(shapes, tmp_path):
    dataset = open_val(shapes)
    torch.manual_seed(0)
    results = evaluate.detect_all(FCOS(SMALL), dataset, torch.device("cpu"), batch_size=4, precision="fp32")
    assert set(results.image_ids) == set(dataset.annotations.image_ids.tolist())
    assert all((results.image_ids == i).sum() <= SMALL.max_detections for i in dataset.annotations.image_ids)


def test_two_processes_find_what_one_finds(shapes, tmp_path):
    found = []
    for processes in (1, 2):
        path = save_detector(tmp_path / "model.pt", root=shapes)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        subprocess.run([sys.executable, *launcher, "evaluate.py", str(path), "--out", str(tmp_path / str(processes)), "--precision", "fp32",
                        "--num-workers", "1", "--batch-size", "2"], cwd=ROOT, check=True,
                       env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
        rows = json.loads((tmp_path / str(processes) / "eval" / "results.json").read_text())
        found.append(sorted(rows, key=lambda r: (r["image_id"], -r["score"], r["bbox"])))
    assert found[0] == found[1] and len(found[0]) > 100


def test_evaluation_writes_coco_results_metrics_and_a_picture(shapes, tmp_path, capsys):
    dataset = open_val(shapes)
    categories = {"ids": [1, 2, 3], "names": list(data.SHAPES)}
    metrics = evaluate.evaluate(FCOS(SMALL), dataset, categories, tmp_path, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert all(name in printed for name in evaluate.FIGURES) and "triangle" in printed
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == metrics
    COCO(dataset.annotations.path).loadRes(str(tmp_path / "eval" / "results.json"))
    assert min(Image.open(tmp_path / "detections.png").size) > 300


def test_other_categories_than_the_detectors_are_refused_by_name(shapes, tmp_path):
    def rename(content):
        content["categories"][1]["name"] = "oval"

    with pytest.raises(data.DataError, match="ellipse.*|oval.*"):
        evaluate.evaluate(FCOS(SMALL), open_val(changed(shapes, tmp_path, rename)), {"ids": [1, 2, 3], "names": list(data.SHAPES)},
                          tmp_path, torch.device("cpu"))


def test_prediction_draws_any_picture_and_writes_its_boxes(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, mode in (("grey.png", "L"), ("colour.jpg", "RGB"), ("alpha.png", "RGBA")):
        Image.new(mode, (90, 60)).save(folder / name)
    path = save_detector(tmp_path / "model.pt", config=SMALL)
    subprocess.run([sys.executable, "evaluate.py", str(path), "--images", str(folder / "grey.png"), str(folder), "--out", str(tmp_path / "out")],
                   cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["grey.png", "alpha.png", "colour.jpg", "grey.png"]
    assert all(Image.open(tmp_path / "out" / name).size == (90, 60) for name in ("grey.png", "alpha.png", "colour.png"))


@pytest.mark.parametrize("options, sentence", [
    (["nowhere"], "nowhere: no such run folder or checkpoint"),
    (["tests"], "tests: no checkpoint-*.pt here"),
    (["Makefile"], "Makefile: damaged or not a checkpoint"),
])
def test_wrong_options_end_in_one_sentence(options, sentence):
    done = subprocess.run([sys.executable, "evaluate.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
