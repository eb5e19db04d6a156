"""The figures are COCO's, every image counts once, and a zero is explained."""

import errno
import json
import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
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
from conftest import ROOT, SHARED, edit, finish, link_copy, start, truth_as_detections
from data import UserError
from evaluate import Detector
from make_shapes import SHAPES, make_shapes
from model import CHECKPOINT_FORMAT, FCOS, ModelConfig

SMALL = ModelConfig(num_classes=3, backbone="resnet18", backbone_norm="group", channels=16,
                    tower_depth=1, short_side=64, long_side=128, score_threshold=0.0)
CATEGORIES = {"ids": [1, 2, 3], "names": list(SHAPES)}


def main(*options):
    """evaluate.py in this process, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        evaluate.run_program(lambda: evaluate.main([str(option) for option in options]))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, num_train=1, num_val=11, size=64)
    return root


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Detector(FCOS(SMALL), CATEGORIES, "cpu", "fp32")


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    """A file with the weights of `detector`."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.pt"
    torch.save({"format": CHECKPOINT_FORMAT, "step": 0, "model": FCOS(SMALL).state_dict(),
                "config": asdict(train.TrainConfig(model=SMALL, data=str(shapes))),
                "categories": CATEGORIES}, path)
    return path


def val_of(root):
    return data.open_split(root, "val")


def changed(root, folder, change):
    """The val split with another JSON."""
    root = link_copy(root, folder / "changed")
    edit(root / "annotations" / "instances_val.json", change)
    return val_of(root)


# --- the figures are COCO's ---------------------------------------------------------------------

def odd_ids(content):
    for image in content["images"]:
        image["id"] = image["id"] * 977 + 10**9
    for category in content["categories"]:
        category["id"] = category["id"] * 13 + 5
    for i, annotation in enumerate(content["annotations"]):
        annotation.update(id=i, image_id=annotation["image_id"] * 977 + 10**9,
                          category_id=annotation["category_id"] * 13 + 5)


def without_optional_keys(content):
    for annotation in content["annotations"]:
        del annotation["id"], annotation["area"], annotation["iscrowd"]


@pytest.mark.parametrize("change", [odd_ids, without_optional_keys])
def test_the_true_boxes_as_detections_have_average_precision_1(shapes, tmp_path, change):
    a = changed(shapes, tmp_path, change).annotations
    metrics = evaluate.coco_metrics(a, truth_as_detections(a))
    assert metrics["figures"]["AP"] == metrics["figures"]["AP50"] == 1
    assert all(c["AP"] == 1 for c in metrics["classes"])


def test_a_false_detection_between_two_true_ones_costs_what_it_must(shapes, tmp_path):
    def two_boxes(content):
        content["annotations"] = [dict(image_id=1, category_id=1, bbox=[x, 2, 20, 20])
                                  for x in (1, 25)]

    a = changed(shapes, tmp_path, two_boxes).annotations
    boxes = [[1, 2, 20, 20], [1, 30, 20, 18], [25, 2, 20, 20]]  # right, wrong, right
    found = [dict(image_id=1, category_id=1, bbox=box, score=score)
             for box, score in zip(boxes, (0.9, 0.8, 0.7))]
    metrics = evaluate.coco_metrics(a, found)
    # precision is 1 at the recalls 0, 0.01 .. 0.5 and 2/3 at 0.51 .. 1
    assert metrics["figures"]["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert metrics["classes"][0]["boxes"] == 2 and metrics["classes"][0]["detections"] == 3


@pytest.mark.skipif(not (SHARED / "coco_mini").exists(), reason="no ../shared/data/coco_mini")
def test_figures_are_those_of_pycocotools_on_real_annotations_with_crowds():
    a, random = val_of(SHARED / "coco_mini").annotations, np.random.default_rng(0)
    found = [row | dict(bbox=(row["bbox"] + random.normal(0, 8, 4)).tolist(),
                        score=random.random()) for row in truth_as_detections(a)]
    theirs = COCO(a.path)
    evaluation = COCOeval(theirs, theirs.loadRes([dict(row) for row in found]), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    figures = evaluate.coco_metrics(a, found)["figures"]
    assert list(figures.values()) == evaluation.stats.tolist() and 0.05 < figures["AP"] < 0.95


@pytest.mark.parametrize("bbox", [[math.nan, 5, 20, 20], [5, 5, math.inf, 20], [5, 5, 20, 0]])
def test_a_faulty_true_box_is_an_object_that_nothing_hits(shapes, tmp_path, bbox):
    clean = truth_as_detections(val_of(shapes).annotations)
    a = changed(shapes, tmp_path, lambda c: c["annotations"][0].update(bbox=bbox)).annotations
    label = int(a.labels[0])
    boxes = int((a.labels == label).sum())
    for row, score in zip(clean, np.linspace(0.5, 1, len(clean)).tolist()):
        row["score"] = score  # so its own detection comes last
    figures = evaluate.coco_metrics(a, clean)
    assert figures["figures"]["AP"] < 1 and figures["classes"][label]["boxes"] == boxes
    recalls = np.linspace(0, 1, 101) <= (boxes - 1) / boxes
    assert figures["classes"][label]["AP"] == pytest.approx(recalls.mean())


# --- a zero is explained ------------------------------------------------------------------------

def explained(a, results):
    return "; ".join(evaluate.explain(evaluate.coco_metrics(a, results)))


def test_0_without_a_detection_and_minus_1_without_a_true_box_are_explained(shapes, tmp_path):
    a = val_of(shapes).annotations
    assert evaluate.coco_metrics(a, [])["figures"]["AP"] == 0
    assert "every figure is 0: no detection scored above" in explained(a, [])
    a = changed(shapes, tmp_path, lambda content: content.update(annotations=[])).annotations
    assert set(evaluate.coco_metrics(a, [])["figures"].values()) == {-1}
    assert "every figure is -1: " in explained(a, [])


def test_a_missed_class_and_an_absent_size_are_explained(shapes):
    a = val_of(shapes).annotations
    truth = truth_as_detections(a)
    sentences = explained(a, [row for row in truth if row["category_id"] != 2])
    assert "AP large is -1: no true box is larger than 96 x 96 pixels" in sentences
    assert "AP is 0, as the class was never detected: ellipse" in sentences
    sentences = explained(a, [row | {"bbox": [1000, 1000, 9, 9]} for row in truth])
    assert ("AP is 0, as none of its detections matches a true box at IoU 0.5: rectangle, ellipse, "
            "triangle") in sentences


def test_the_table_shows_the_best_and_worst_classes_that_have_boxes(capsys):
    classes = [dict(name=f"c{i}", AP=i / 10 if i < 4 else -1.0, AP50=0, boxes=1, detections=1)
               for i in range(7)]
    figures = dict.fromkeys(evaluate.FIGURES, 0.5)
    evaluate.print_metrics({"figures": figures, "classes": classes}, shown=1)
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1] == "c"]
    assert [row[:2] for row in table] == [["class", "AP"], ["c3", "0.300"], ["c0", "0.000"]]


def test_other_categories_than_the_detectors_are_refused_by_name(shapes, tmp_path, detector):
    dataset = changed(shapes, tmp_path, lambda c: c["categories"][1].update(name="oval"))
    with pytest.raises(UserError, match="2 'ellipse' is only there, 2 'oval' is only here"):
        evaluate.evaluate(detector, dataset)


# --- every image counts once --------------------------------------------------------------------

class WholeImages(Detector):
    """Finds one object in every image: the whole of it."""

    def candidates(self, images, sizes):
        boxes = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], dim=1).float()[:, None]
        return boxes, torch.ones(boxes.shape[:2]), torch.zeros(boxes.shape[:2], dtype=torch.int64)


@pytest.mark.parametrize("tta", [False, True])
def test_every_image_is_detected_once_in_its_own_pixels(shapes, tta):
    dataset = val_of(shapes)
    a, model = dataset.annotations, FCOS(replace(SMALL, short_side=50))
    fake = WholeImages(model, CATEGORIES, "cpu")
    results = evaluate.detect_all(fake, dataset, batch_size=4, tta=tta)
    results.sort(key=lambda row: row["image_id"])
    assert [row["image_id"] for row in results] == sorted(a.image_ids.tolist())
    height, width = a.sizes[a.image_ids.argsort()].T
    whole = np.stack([0 * width, 0 * height, width, height], axis=1)
    np.testing.assert_allclose([row["bbox"] for row in results], whole, atol=1e-3)


def test_two_processes_find_what_one_finds(shapes, checkpoint, tmp_path, capsys):
    options = [checkpoint, "--precision", "fp32", "--batch-size", 2]
    processes = start(tmp_path / "log", *options, "--out", tmp_path / "two", "--num-workers", 1,
                      world=2, program="evaluate")
    main(*options, "--out", tmp_path / "one", "--num-workers", 0)
    assert finish(processes) == [0, 0], (tmp_path / "log").read_text()
    one, two = ([json.loads((tmp_path / n / "eval" / name).read_text()) for name in
                 ("metrics.json", "results.json")] for n in ("one", "two"))
    assert one[0] == two[0]
    one, two = (sorted(x[1], key=lambda r: (r["image_id"], -r["score"], r["bbox"]))
                for x in (one, two))
    assert len(one) > 100 and [(r["image_id"], r["category_id"]) for r in one] == [
        (r["image_id"], r["category_id"]) for r in two]
    for key in ("bbox", "score"):
        np.testing.assert_allclose([r[key] for r in one], [r[key] for r in two], atol=1e-5)


def test_evaluation_writes_coco_results_metrics_and_a_picture(shapes, checkpoint, tmp_path, capsys):
    main(checkpoint, "--out", tmp_path, "--precision", "fp32", "--num-workers", 0)
    printed, dataset = capsys.readouterr().out, val_of(shapes)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert all(f"{metrics['figures'][name]:.3f}" in printed for name in evaluate.FIGURES)
    assert all(name in printed for name in SHAPES) and "11 of 11 images" in printed
    theirs = COCO(dataset.annotations.path).loadRes(str(tmp_path / "eval" / "results.json"))
    assert len(theirs.getImgIds()) == 11 and set(theirs.getCatIds()) == {1, 2, 3}
    assert min(Image.open(tmp_path / "detections.png").size) > 300
    assert metrics["split"] == [dataset.annotations.path, dataset.folder]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_evaluation(
        checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written to; name another folder with --out"):
        evaluate.main([str(checkpoint), "--out", str(tmp_path)])


# --- the detector -------------------------------------------------------------------------------

def test_a_detector_takes_an_image_in_any_form(detector, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    forms = [tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(array), array,
             torch.from_numpy(array).permute(2, 0, 1), array[:, ::-1][:, ::-1]]
    found = detector(forms)
    assert len(found) == len(forms) and len(found[0]) == SMALL.max_detections
    for d in found:
        assert torch.equal(d.boxes, found[0].boxes) and torch.equal(d.scores, found[0].scores)
    d = found[0]
    assert (d.boxes >= 0).all() and (d.boxes <= torch.tensor([90, 60, 90, 60])).all()
    assert d.boxes[:, 2].max() > 64  # pixels of the image, not of the resized one
    threshold = d.scores[4].item()
    few = list(detector(array, threshold=threshold))
    assert len(few) == int((d.scores >= threshold).sum()) < len(d)
    for (box, score, name), i in zip(few, range(len(few))):
        assert box == d.boxes[i].tolist() and score == d.scores[i] and name == SHAPES[d.labels[i]]


def test_an_opened_image_of_16_bits_is_read_like_its_file(detector, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 50), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    opened, read = detector([Image.open(tmp_path / "deep.png"), tmp_path / "deep.png"])
    assert torch.equal(opened.scores, read.scores) and torch.equal(opened.boxes, read.boxes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_graph_finds_what_the_network_finds_and_outlives_inference_mode_and_serves_threads():
    model = FCOS(SMALL)
    captured = Detector(model, CATEGORIES, "cuda", "fp32")
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(5)]
    with torch.inference_mode():
        found = captured(images[:4])  # from the third on, by a graph
    assert len(captured.graphs) == 1
    with ThreadPoolExecutor(4) as threads:
        found += threads.map(captured, 8 * images)
    for image, d in zip(images[:4] + 8 * images, found, strict=True):
        eager = Detector(model, CATEGORIES, "cuda", "fp32")(image)
        assert len(d) > 5 and d.names == eager.names
        torch.testing.assert_close(d.scores, eager.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(d.boxes, eager.boxes, rtol=0, atol=1e-2)


@pytest.mark.parametrize("image", [
    np.zeros((9, 9, 3)), torch.zeros(9, 9, 3, dtype=torch.uint8), np.zeros((9, 9), np.uint8),
    np.zeros((0, 9, 3), np.uint8)],
    ids=["floats", "channels last", "grey array", "empty"])
def test_what_is_no_rgb_image_is_refused(detector, image):
    with pytest.raises(UserError, match="must be a path"):
        detector(image)


def test_a_detector_can_be_sent_to_another_process(detector):
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    detector.graphs["shape"] = lambda: None  # as little to be pickled as a graph
    assert torch.equal(pickle.loads(pickle.dumps(detector))(image).boxes, detector(image).boxes)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision 'fp16': must be auto, bf16 or fp32"):
        Detector(FCOS(SMALL), CATEGORIES, "cpu", "fp16")


def test_inclusive_boxes_end_a_pixel_later_inside_the_image(detector):
    boxes = torch.tensor([[[10.0, 10, 20, 20], [50, 50, 64, 63]]])
    assert detector.to_image(boxes, (64, 64), (128, 192)).tolist() == [
        [[30, 20, 60, 40], [150, 100, 192, 126]]]
    inclusive = Detector(FCOS(replace(SMALL, inclusive_boxes=True)), CATEGORIES, "cpu", "fp32")
    assert inclusive.to_image(boxes, (64, 64), (128, 192)).tolist() == [
        [[30, 20, 61, 41], [150, 100, 192, 127]]]


class Bright(Detector):
    """Finds the bright part of an image."""

    def candidates(self, images, sizes):
        rows, columns = (images[0].amax((0, d)) > 127 for d in (2, 1))
        y, x = (part.nonzero() for part in (rows, columns))
        box = torch.tensor([[[x.min(), y.min(), x.max() + 1, y.max() + 1]]], dtype=torch.float32)
        return box, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)


def test_test_time_augmentation_brings_every_size_and_flip_back_to_the_image():
    image = np.zeros((60, 90, 3), np.uint8)
    image[10:40, 20:40] = 255
    bright = Bright(FCOS(SMALL), CATEGORIES, "cpu", "fp32")
    ((plain, _, _),), ((box, score, name),) = bright(image), bright(image, tta=True)
    assert plain == pytest.approx([20, 10, 40, 40], abs=1)
    assert box == pytest.approx(plain, abs=2) and (score, name) == (1, "rectangle")


def test_flipped_views_agree_where_the_last_pixel_belongs_to_the_box(monkeypatch):
    class Inclusive(Bright):
        def candidates(self, images, sizes):
            boxes, scores, labels = super().candidates(images, sizes)
            return boxes - torch.tensor([0, 0, 1, 1]), scores, labels

    image = np.zeros((64, 90, 3), np.uint8)
    image[10:40, 20:40] = 255
    config = replace(SMALL, short_side=64, long_side=90, inclusive_boxes=True, nms_iou=1.0)
    monkeypatch.setattr(evaluate, "TTA_SCALES", (1,))
    found = Inclusive(FCOS(config), CATEGORIES, "cpu", "fp32")(image, tta=True)
    assert found.boxes.tolist() == [[20, 10, 40, 40]] * 2


# --- prediction ---------------------------------------------------------------------------------

def test_prediction_writes_pictures_and_all_boxes_and_says_the_best_score(
        checkpoint, tmp_path, capsys):
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for name, mode in (("grey.png", "L"), ("colour.jpg", "RGB"), ("alpha.png", "RGBA")):
        Image.new(mode, (90, 60)).save(folder / name)
    main(checkpoint, "--images", folder / "grey.png", folder, "--out", out)
    rows = json.loads((out / "detections.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["grey.png", "alpha.png", "colour.jpg",
                                                        "grey.png"]
    assert [row["picture"] for row in rows] == [
        "001-grey.png", "002-alpha.png", "003-colour.png", "004-grey.png"]
    assert all((out / row["picture"]).exists() and row["width"] == 90 for row in rows)
    scores = [d["score"] for d in rows[0]["detections"]]
    assert len(scores) == 100 and scores == sorted(scores, reverse=True)
    assert f"grey.png: 0 objects; best score {scores[0]:.3f}" in capsys.readouterr().out
    main(checkpoint, "--images", folder / "grey.png", "--out", out, "--threshold", scores[1])
    assert json.loads((out / "detections.json").read_text()) == rows[:1]  # whatever is drawn
    assert "grey.png: 0 objects" not in capsys.readouterr().out


def test_prediction_reports_unreadable_files_and_does_the_others(checkpoint, tmp_path, capsys):
    for name, mode, size in (("pixel.png", "RGB", (1, 1)), ("wide.jpg", "RGB", (2000, 9)),
                             (f"{250 * 'n'}.png", "RGB", (8, 8)),
                             ("deep.png", "I;16", (40, 30))):
        Image.new(mode, size).save(tmp_path / name)
    Image.new("RGB", (40, 30)).save(os.fsencode(tmp_path) + b"/caf\xe9.png")  # not UTF-8
    turned = Image.new("RGB", (40, 30))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "wide.jpg").read_bytes()[:600])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit, match="3 files could not be read"):
        main(checkpoint, "--images", tmp_path, tmp_path / "absent.jpg", "--out", tmp_path / "out")
    told = capsys.readouterr().err
    for name in ("torn.jpg", "text.png", "absent.jpg"):
        assert f"error: {tmp_path / name}: " in told
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {Path(row["file"]).stem: (row["width"], row["height"]) for row in rows} == {
        "pixel": (1, 1), 250 * "n": (8, 8), "wide": (2000, 9), "deep": (40, 30), "turned": (30, 40),
        "caf\\xe9": (40, 30)}


def test_prediction_never_overwrites_the_photo(checkpoint, tmp_path):
    photos = [tmp_path / "photo.png", tmp_path / "001-photo.png"]
    for photo in photos:
        Image.new("RGB", (90, 60)).save(photo)
    before = photos[1].read_bytes()
    with pytest.raises(SystemExit, match="photo.png: would be overwritten; .*--out"):
        main(checkpoint, "--images", *photos, "--out", tmp_path)
    assert photos[1].read_bytes() == before


def test_the_detector_works_from_another_folder(checkpoint, tmp_path):
    script = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from evaluate import load_detector
detector = load_detector({str(checkpoint)!r}, "cpu")
Image = sys.modules["PIL.Image"]
for box, score, name in detector(Image.new("RGB", (90, 60)), threshold=0.0):
    print(name, score, box)
assert "pycocotools" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 100 and done.stdout.split()[0] in SHAPES


# --- the program --------------------------------------------------------------------------------

def test_a_terminal_that_was_closed_does_not_end_a_run(monkeypatch):
    def closed(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.print", closed)
    evaluate.print0("step 1")


@pytest.mark.parametrize("error, sentence", [
    (KeyboardInterrupt(), "^130$"), (UserError("what; remedy"), "^error: what; remedy$"),
    (FileNotFoundError(2, "No such file", "x.json"), "^error: .*No such file.*x.json"),
    (torch.OutOfMemoryError("CUDA out of memory."), "^error: out of memory .*--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "^error: out of memory .*--batch-size")])
def test_an_error_ends_the_program_in_a_sentence(error, sentence):
    def fails():
        raise error

    with pytest.raises(SystemExit, match=sentence):
        evaluate.run_program(fails)


@pytest.mark.parametrize("options, sentence", [
    (["nowhere"], "nowhere: no such file"),
    ([ROOT / "tests"], "tests: no checkpoint-*.pt here"),
    (["tests", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["CHECKPOINT", "--out", "CHECKPOINT"], "model.pt"),
    (["CHECKPOINT", "--images", "FOLDER"], "no image file in this folder")])
def test_wrong_options_end_in_one_sentence(options, sentence, checkpoint, tmp_path, capsys):
    paths = {"CHECKPOINT": checkpoint, "FOLDER": tmp_path}
    with pytest.raises(SystemExit) as raised:
        main(*(paths.get(option, option) for option in options))
    assert sentence in f"{raised.value} {capsys.readouterr().err}"
