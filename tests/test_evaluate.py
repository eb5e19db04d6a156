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
import torchvision
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import evaluate
import train
from evaluate import Results
from model import CHECKPOINT_FORMAT, FCOS, ConfigError, Detections, Detector, ModelConfig, load_checkpoint

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
    images = annotations.image_ids[annotations.image]
    keep = ~annotations.crowd
    return Results(images[keep], annotations.boxes[keep].astype(np.float32), np.ones(keep.sum(), np.float32), annotations.labels[keep])


def metrics_of(annotations, results):
    return evaluate.coco_metrics(evaluate.coco_evaluation(annotations, results), annotations, results)


def detector(config=SMALL):
    torch.manual_seed(0)
    return Detector(FCOS(config), torch.device("cpu"), "fp32")


def save_detector(path, config=SMALL, root="", names=data.SHAPES, change=lambda checkpoint: None):
    torch.manual_seed(0)
    checkpoint = {"format": CHECKPOINT_FORMAT, "step": 0, "model": FCOS(config).state_dict(),
                  "config": asdict(train.TrainConfig(model=config, data=str(root))),
                  "categories": {"ids": list(range(1, len(names) + 1)), "names": list(names)}}
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def main(monkeypatch, *options):
    """evaluate.py in this process, where starting another one would prove no more."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
    evaluate.main()


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


def without_optional_keys(content):
    content.pop("info", None)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]


@pytest.mark.parametrize("change", [lambda content: None, number_from_zero, sparse_ids, without_optional_keys],
                         ids=["as it is", "annotation id 0", "sparse ids", "no info, area, iscrowd"])
def test_ground_truth_fed_back_as_detections_has_average_precision_1(shapes, tmp_path, change):
    annotations = open_val(changed(shapes, tmp_path, change)).annotations
    metrics = metrics_of(annotations, truth_as_detections(annotations))
    assert metrics["figures"]["AP"] == 1 and metrics["figures"]["AP50"] == 1
    assert all(c["AP"] == 1 for c in metrics["classes"])


@pytest.mark.skipif(not COCO_MINI.exists(), reason="no COCO images beside the repository (../shared/data/coco_mini)")
def test_figures_are_those_of_pycocotools_on_real_annotations_with_crowds():
    dataset = open_val(COCO_MINI)
    random = np.random.default_rng(0)
    truth = truth_as_detections(dataset.annotations)
    shifted = truth._replace(boxes=(truth.boxes + random.normal(0, 8, truth.boxes.shape)).astype(np.float32),
                             scores=random.random(len(truth.scores)).astype(np.float32))
    metrics = metrics_of(dataset.annotations, shifted)
    theirs = COCO(dataset.annotations.path)
    rows = [{"image_id": int(i), "category_id": dataset.annotations.category_ids[label], "score": float(score),
             "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]} for i, (x0, y0, x1, y1), score, label in zip(*shifted)]
    evaluation = COCOeval(theirs, theirs.loadRes(rows), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert list(metrics["figures"].values()) == evaluation.stats.tolist()
    assert 0.05 < metrics["figures"]["AP"] < 0.95


def test_no_detection_at_all_is_0_and_explained(shapes):
    annotations = open_val(shapes).annotations
    metrics = metrics_of(annotations, evaluate.NOTHING)
    assert metrics["figures"]["AP"] == 0
    (sentence,) = evaluate.explain(metrics, annotations, evaluate.NOTHING)
    assert "not one detection scored above the threshold" in sentence


def test_a_split_without_boxes_is_minus_1_which_is_said_before_detection(shapes, tmp_path, capsys):
    dataset = open_val(changed(shapes, tmp_path, lambda content: content.update(annotations=[])))
    metrics = evaluate.evaluate(detector(), dataset, {"ids": [1, 2, 3], "names": list(data.SHAPES)}, tmp_path)
    assert set(metrics["figures"].values()) == {-1}
    printed = capsys.readouterr().out
    assert printed.index("has no boxes (crowds aside) to find") < printed.index("evaluating: ")


def test_a_class_that_is_missed_and_a_size_that_is_absent_are_explained(shapes):
    annotations = open_val(shapes).annotations
    truth = truth_as_detections(annotations)
    keep = truth.labels != 1
    found = Results(*(column[keep] for column in truth))
    sentences = "; ".join(evaluate.explain(metrics_of(annotations, found), annotations, found))
    assert "AP large is -1: no true box is over 96 x 96 pixels" in sentences
    assert "AP is 0 for classes never detected: ellipse" in sentences
    moved = truth._replace(boxes=truth.boxes + 1000)
    sentences = "; ".join(evaluate.explain(metrics_of(annotations, moved), annotations, moved))
    assert "whose detections all miss" in sentences and "rectangle, ellipse, triangle" in sentences


class WholeImages:
    """A detector that finds one object in every image: the whole of it."""
    config, device = SMALL, torch.device("cpu")

    def __call__(self, images, image_sizes):
        return [Detections(torch.tensor([[0.0, 0.0, w, h]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
                for h, w in image_sizes.tolist()]

    def candidates(self, images, image_sizes):
        (found,) = self(images, image_sizes)
        return tuple(part[None] for part in found)


@pytest.mark.parametrize("tta", [False, True])
def test_every_image_is_evaluated_once_and_its_boxes_are_in_its_own_pixels(shapes, tta):
    dataset = open_val(shapes)
    results = evaluate.detect_all(WholeImages(), dataset, batch_size=4, tta=tta)
    order = results.image_ids.argsort()
    assert results.image_ids[order].tolist() == sorted(dataset.annotations.image_ids.tolist())
    height, width = dataset.annotations.sizes[dataset.annotations.image_ids.argsort()].T
    np.testing.assert_allclose(results.boxes[order], np.stack([0 * width, 0 * height, width, height], axis=1), atol=1e-3)


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
    (tmp_path / "eval").mkdir()
    for name in ("mine.png", "wrong.png"):  # of the user, and of an evaluation before
        (tmp_path / "eval" / name).touch()
    metrics = evaluate.evaluate(detector(), dataset, categories, tmp_path)
    printed = capsys.readouterr().out
    assert (tmp_path / "eval" / "mine.png").exists() and not (tmp_path / "eval" / "wrong.png").exists()  # nothing over 0.3 was found
    assert all(name in printed for name in evaluate.FIGURES) and "triangle" in printed
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == metrics
    listed = COCO(dataset.annotations.path).loadRes(str(tmp_path / "eval" / "results.json")).dataset["annotations"]
    found = evaluate.detect_all(detector(), dataset)
    assert [row["score"] for row in listed] == found.scores.tolist() and [row["image_id"] for row in listed] == found.image_ids.tolist()
    np.testing.assert_allclose([row["bbox"] for row in listed], evaluate.to_xywh(found.boxes), atol=1e-4)
    for name in ("detections.png", "eval/precision_recall.png", "eval/worst.png"):
        assert min(Image.open(tmp_path / name).size) > 300


def test_annotation_ids_that_coco_tools_stumble_over_are_numbered_anew_with_a_notice(shapes, tmp_path, capsys):
    categories = {"ids": [1, 2, 3], "names": list(data.SHAPES)}
    evaluate.evaluate(detector(), open_val(changed(shapes, tmp_path, number_from_zero)), categories, tmp_path)
    assert "numbered anew" in capsys.readouterr().out


def test_the_pictures_of_best_worst_and_wrong_images_show_those(shapes, tmp_path, monkeypatch):
    dataset = open_val(shapes)
    a, truth = dataset.annotations, truth_as_detections(dataset.annotations)
    images, several = a.image_ids, np.flatnonzero(np.bincount(a.image) > 1)
    blind, lying = images[several[0]], images[several[1]]
    found = truth._replace(boxes=np.where((truth.image_ids == lying)[:, None], truth.boxes + 500, truth.boxes),
                           scores=np.where(truth.image_ids == lying, 0.95, 0.9).astype(np.float32))
    found = Results(*(column[found.image_ids != blind] for column in found))
    shown = {}
    monkeypatch.setattr(evaluate, "draw_grid", lambda path, *rest: shown.update({path.name: (images[rest[4]], rest[5])}))
    evaluate.draw_verdicts(tmp_path, evaluate.coco_evaluation(a, found), dataset, found, a.category_names, 0.3, count=2)
    assert set(shown["worst.png"][0]) == {blind, lying} and list(shown["wrong.png"][0]) == [lying]
    n = (a.image == several[1]).sum()
    assert shown["wrong.png"][1] == [f"0 right, {n} wrong, {n} missed; wrong at 0.95"]
    assert not {blind, lying} & set(shown["best.png"][0]) and "0 wrong, 0 missed" in shown["best.png"][1][0]


def test_ticks_are_round_and_enclose_the_values():
    for values, expected in (([0, 1], [0, .2, .4, .6, .8, 1]), ([3, 1590], [0, 200, 400, 600, 800, 1000, 1200, 1400, 1600]),
                             ([0.31, 0.33], [.31, .315, .32, .325, .33]), ([5, 5], None)):
        found = evaluate.ticks(np.array(values, float))
        assert expected is None and len(found) > 1 or np.allclose(found, expected), (values, found)


def test_test_time_augmentation_of_a_single_view_is_plain_detection_and_flips_come_back(shapes, monkeypatch):
    image = open_val(shapes).image(0)
    plain = evaluate.detect_in_image(detector(), image)
    monkeypatch.setattr(evaluate, "TTA_SCALES", (1,))
    flipped = []
    monkeypatch.setattr(data, "place", lambda image, request, canvas, place=data.place: (
        flipped.append(request.flip), place(image, request._replace(flip=False), canvas)))
    merged = evaluate.detect_in_image(detector(), image, tta=True)  # where a flip is asked for, none is made
    assert flipped == [False, True]
    width = image.shape[2]
    assert any(torch.allclose(box, plain.boxes[0], atol=1e-3) for box in merged.boxes)
    x0, y0, x1, y1 = plain.boxes[0].tolist()
    mirrored = torch.tensor([width - x1, y0, width - x0, y1])
    assert any(torch.allclose(box, mirrored, atol=1e-3) for box in merged.boxes)


def test_test_time_augmentation_merges_all_sizes_before_nms(shapes):
    dataset = open_val(shapes)
    results = evaluate.detect_all(detector(), dataset, tta=True)
    assert set(results.image_ids) == set(dataset.annotations.image_ids.tolist())
    d = evaluate.detect_in_image(detector(), dataset.image(0), tta=True)
    assert len(d.scores) <= SMALL.max_detections and (d.scores[:-1] >= d.scores[1:]).all()
    for label in range(3):
        boxes = d.boxes[d.labels == label]
        iou = torchvision.ops.box_iou(boxes, boxes).fill_diagonal_(0).nan_to_num()  # NaN: two boxes without area
        assert iou.numel() == 0 or iou.max() <= SMALL.nms_iou + 1e-5


def test_other_categories_than_the_detectors_are_refused_by_name(shapes, tmp_path):
    def rename(content):
        content["categories"][1]["name"] = "oval"

    with pytest.raises(data.DataError, match="'oval'.*'ellipse'"):
        evaluate.evaluate(detector(), open_val(changed(shapes, tmp_path, rename)), {"ids": [1, 2, 3], "names": list(data.SHAPES)},
                          tmp_path)


def test_prediction_draws_any_picture_and_writes_its_boxes(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, mode in (("grey.png", "L"), ("colour.jpg", "RGB"), ("alpha.png", "RGBA")):
        Image.new(mode, (90, 60)).save(folder / name)
    path = save_detector(tmp_path / "model.pt", config=SMALL)
    main(monkeypatch, path, "--images", folder / "grey.png", folder, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["grey.png", "alpha.png", "colour.jpg", "grey.png"]
    assert all(Image.open(tmp_path / "out" / name).size == (90, 60) for name in ("grey.png", "alpha.png", "colour.png"))


def test_prediction_reports_bad_files_does_the_others_and_exits_non_zero(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.new("RGB", (20_000, 40)).save(tmp_path / "wide.jpg")
    Image.new("P", (40, 30)).save(tmp_path / "palette.gif")
    Image.new("CMYK", (40, 30)).save(tmp_path / "cmyk.jpg")
    Image.new("I;16", (40, 30)).save(tmp_path / "deep.png")
    turned = Image.new("RGB", (40, 30))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "wide.jpg").read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    path = save_detector(tmp_path / "model.pt", config=SMALL)
    done = subprocess.run([sys.executable, "evaluate.py", str(path), "--images", str(tmp_path), str(tmp_path / "absent.jpg"), "--out",
                           str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name, reason in (("torn.jpg", "cannot be decoded"), ("text.png", "not an image"), ("absent.jpg", "no such image file")):
        assert any(f"{tmp_path / name}: " in line and reason in line for line in done.stderr.splitlines()), done.stderr
    assert "3 of the files cannot be read" in done.stderr
    sizes = {Path(row["file"]).name: (row["width"], row["height"]) for row in json.loads((tmp_path / "out" / "detections.json").read_text())}
    assert sizes == {"pixel.png": (1, 1), "wide.jpg": (20_000, 40), "palette.gif": (40, 30), "cmyk.jpg": (40, 30), "deep.png": (40, 30),
                     "turned.jpg": (30, 40)}


@pytest.mark.parametrize("change, says", [
    (lambda c: c.pop("format"), "not a checkpoint of this version of the code .format None, not 2.; use the version.*--convert"),
    (lambda c: c.update(format=1), "not a checkpoint of this version of the code .format 1, not 2."),
    *[(change, f"its '{key}' is missing or of another type") for key in ("model", "config", "categories", "step")
      for change in (lambda c, key=key: c.pop(key), lambda c, key=key: c.update({key: "x"}))],
    (lambda c: c["config"].pop("model"), "its configuration's 'model' is missing or of another type"),
    (lambda c: c["config"]["model"].pop("channels"), "its ModelConfig is not one of this version.*unknown: channels.*version"),
    (lambda c: c["config"]["model"].update(anchors=9), "its ModelConfig .*1 fields are missing or unknown: anchors"),
    (lambda c: c["config"]["model"].update(channels="64"), "its ModelConfig .*--channels '64': must be of type int"),
    (lambda c: c["config"]["model"].update(backbone="vgg"), "its ModelConfig .*--backbone 'vgg': must be one of resnet18"),
    (lambda c: c["config"]["model"].update(channels=64), "its weights are not its configuration's; [0-9]+ names or shapes differ: 'fpn"),
    (lambda c: c["config"]["model"].update(num_classes=4), "its weights are not.*; 2 names or shapes differ: 'head.cls_logits.bias'"),
    (lambda c: c["model"].pop("scales"), "its weights are not.*; 1 names or shapes differ: 'scales'"),
    (lambda c: c["model"].update(scales=[1.0] * 5), "its weights are not.*; 1 names or shapes differ: 'scales'"),
    (lambda c: c["model"].update(scales=torch.ones(5, dtype=torch.int64)), "its weights are not.*; 1 names or shapes differ: 'scales'"),
    (lambda c: c["model"].update({7: torch.ones(1)}), "its weights are not.*; 1 names or shapes differ: '7'"),
    (lambda c: c["categories"].pop("ids"), "its categories have not 3 ids"),
    (lambda c: c["categories"].update(ids=["1", "2", "3"]), "its categories have not 3 ids"),
    (lambda c: c["categories"].update(names=["a", "b"]), "its categories have not 3 names"),
])
def test_a_checkpoint_that_is_not_one_of_this_code_is_refused_with_what_is_wrong(tmp_path, change, says):
    path = save_detector(tmp_path / "model.pt", change=change)
    with pytest.raises(ConfigError, match=f"^{path}: {says}") as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [[], None, "text", torch.ones(3), {"model": {}}], ids=str)
def test_a_file_of_something_else_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="other.pt: not a checkpoint of this version of the code"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_place_that_cannot_be_written_to_is_refused_before_detection(shapes, tmp_path, monkeypatch):
    path = save_detector(tmp_path / "model.pt", root=shapes)
    monkeypatch.setattr(evaluate, "detect_all", None)
    with pytest.raises(data.DataError, match="model.pt: no folder that can be written to .*; name another with --out"):
        main(monkeypatch, path, "--out", path)


@pytest.mark.parametrize("options, sentence", [
    (["nowhere"], "nowhere: no such file or folder"),
    ([ROOT / "tests"], "tests: no checkpoint-*.pt here"),
    ([ROOT / "Makefile"], "Makefile: damaged, or not a file of PyTorch (UnpicklingError); name another run or file"),
    (["tests", "--batch-size", "0"], "--batch-size must be >= 1"),
])
def test_wrong_options_end_in_one_sentence(options, sentence, monkeypatch, capsys):
    with pytest.raises((ConfigError, SystemExit)) as raised:
        main(monkeypatch, *options)
    assert sentence in f"{raised.value} {capsys.readouterr().err}"
