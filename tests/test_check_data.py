"""The tools for data: what the checker says and repairs, conversion to COCO, generated shapes."""

import json
import re
import shutil
from pathlib import Path

import check_data
import make_shapes
import numpy as np
import pytest
import to_coco
from PIL import Image

import data
import train
from conftest import change, good_content, repeated, write_split
from data import UserError, read_annotations

NAN = float("nan")
GARBAGE = b"Exif\0\0garbage"


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path / "data", good_content(), split)
    return tmp_path / "data"


@pytest.fixture
def check(capsys):
    def run(root, *options):
        with pytest.raises(SystemExit) as ended:
            check_data.main([str(root), *options, "--out", str(root / "pictures")])
        return ended.value.code, capsys.readouterr().out
    return run


def bbox(*values):
    return change("annotations", 3, "bbox", list(values))


def boxes(n, *values):
    """The first n of the five boxes become this one."""
    def mutate(content):
        for annotation in content["annotations"][:n]:
            annotation["bbox"] = list(values)
        return content
    return mutate


DAMAGE = {  # name: level, mutation, what must be said
    "no file name": ("ERROR", change("images", 0, "file_name"), "inside.*: 1\n.*file_name None"),
    "file name up": ("ERROR", change("images", 0, "file_name", "../a.png"), r"inside.*\n.*'\.\./a"),
    "no height": ("ERROR", change("images", 1, "height", 0), "height is not a number of pixels: 1"),
    "image id twice": ("ERROR", repeated("images"), r"have the id of another: 1\n.*\(id 30\)"),
    "unknown image": ("ERROR", change("annotations", 0, "image_id", 11),
                      r"among the usable images: 1\n.*annotations\[0\] \(id 7\): image_id 11"),
    "bbox of three": ("ERROR", bbox(1, 2, 3), r"is not four.*: 1\n.*\(id 12\): bbox \[1, 2, 3"),
    "bbox too long to print": ("ERROR", bbox(*range(10**5)), "bbox is not four numbers"),
    "iscrowd 2": ("ERROR", change("annotations", 3, "iscrowd", 2), "iscrowd is not 0 or 1: 1"),
    "80 % normalised": ("ERROR", boxes(4, .1, .2, .3, .4), "seems to be normalised.*: 4\n"),
    "file missing": ("ERROR", change("images", 0, "file_name", "none.png"),
                     r"cannot be used: 1\n.*none.png: no such"),
    "20 % normalised": ("NOTE", bbox(.1, .2, .3, .4), "seems to be normalised.*: 1\n"),
    "not finite": ("NOTE", bbox(NAN, 5, 3, 3), "coordinate that is not finite: 1\n"),
    "reversed": ("NOTE", bbox(50, 5, -3, 3), "negative width or height: 1\n"),
    "empty": ("NOTE", boxes(4, 5, 5, 0, 3), r"without width or height: 4\n    30.png \(image 30\), "
              r"annotation 9: bbox \[5, 5, 0, 3\] in 64 x 78 pixels\n.*\n.*\n    \.\.\.\n"),
    "outside": ("NOTE", bbox(5, -30, 9, 9), "outside their image: 1\n"),
    "beyond": ("NOTE", bbox(-20, 5, 60, 9), r"beyond their image: 1\n(.*\n)+?.*of the visible"),
    "xyxy": ("NOTE", boxes(5, 30, 20, 60, 44), r"not if bbox were \[x0, y0, x1, y1\]: 5\n"),
    "category without boxes": ("NOTE", repeated("categories", id=5, name="山羊"), r"1\n.*山羊"),
    "name twice": ("NOTE", repeated("categories", id=5), r"used more than once: 1\n    cat\n"),
    "file twice": ("NOTE", repeated("images", id=77), r"listed more than once: 1\n    30.png\n"),
    "annotation id twice": ("NOTE", repeated("annotations"), "whose id is missing.*: 1\n"),
    "no location": ("NOTE", bbox(5, 5, 1.5, 12), r"of 5 .*no location learns: 1\n(.*\n)+?.*--en"),
    "crowd": ("INFO", change("annotations", 1, "iscrowd", 1), "crowd boxes: 1\n"),
    "no boxes": ("INFO", repeated("images", id=77, file_name="train.png"), "box to learn: 1\n"),
}


def test_good_data_has_nothing_wrong_and_pictures_are_drawn(root, check):
    code, text = check(root, "--images", "--strict")
    assert code == 0 and text.endswith("Training can start; nothing is wrong.\n"), text
    assert {p.name for p in (root / "pictures").iterdir()} == {"train.png", "val.png"}


@pytest.mark.parametrize("level, mutate, says", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_counted_shown_and_repaired(root, check, level, mutate, says):
    shutil.copy(root / "train" / "30.png", root / "train" / "train.png")
    write_split(root, mutate(good_content()))
    before = (root / "annotations" / "instances_train.json").read_bytes()
    code, text = check(root, "--split", "train", "--fix", str(root / "fixed.json"), "--strict")
    assert code == {"ERROR": 2, "NOTE": 1, "INFO": 0}[level]
    found = re.search(f"{level}: .*{says}", text)
    assert found and max(map(len, text.splitlines())) < 400, text
    assert (root / "annotations" / "instances_train.json").read_bytes() == before
    a = read_annotations(root / "fixed.json")
    assert data.learnable(a).all() and (np.abs(a.boxes - data.clip(a)) < 1e-3).all()
    content = json.loads((root / "fixed.json").read_text())
    assert [x["id"] for x in content["annotations"]] == list(range(1, len(a.labels) + 1))
    assert all("segmentation" in annotation for annotation in content["annotations"])


@pytest.mark.parametrize("text", [b"", b'{"images": []}',
                                  json.dumps(good_content() | {"images": []}).encode()])
def test_a_file_without_any_entry_to_use_is_an_error(root, check, text):
    (root / "annotations" / "instances_val.json").write_bytes(text)
    code, out = check(root)
    assert code == 2 and re.search("ERROR: .*instances_val.json: ", out), out
    (root / "annotations" / "instances_val.json").unlink()
    code, out = check(root)
    assert code == 2 and "no splits match 'val' among train" in out


def test_only_a_train_split_needs_boxes(root, check):
    write_split(root, good_content() | {"annotations": []}, "val")
    code, text = check(root)
    assert code == 0 and "NOTE: splits without a box to learn: 1" in text and "can start" in text
    write_split(root, good_content() | {"annotations": []})
    code, text = check(root)
    assert code == 2 and "ERROR: splits without a box to learn: 1" in text


def test_fix_leaves_out_images_that_are_missing_or_cannot_be_decoded(root, check):
    (root / "train" / "30.png").unlink()
    (root / "train" / "10.png").write_bytes((root / "train" / "10.png").read_bytes()[:90])
    code, text = check(root, "--split", "train", "--images", "--fix", str(root / "fixed.json"))
    assert code == 2 and "images that cannot be used: 2" in text and "2 of 4 images" in text
    assert sorted(read_annotations(root / "fixed.json").image_ids) == [20, 40]


def test_fix_leaves_out_boxes_of_which_the_reader_would_refuse_a_majority(root, check):
    outside, tiny = boxes(4, 500, 500, 9, 9)(good_content()), boxes(4, .1, .2, .3, .4)
    content = tiny(good_content())
    content["annotations"] += outside["annotations"][:4]
    content["annotations"][3]["bbox"] = [-9, -9, 9.5, 9.5]  # cut to .5 x .5
    write_split(root, content)
    check(root, "--split", "train", "--fix", str(root / "fixed.json"))
    assert len(read_annotations(root / "fixed.json").boxes) == 1


@pytest.mark.parametrize("options, says", [
    (["--fix", "x.json"], "name it with --split"),
    (["--split", "train", "--fix", __file__], "exists and is not overwritten")])
def test_what_the_command_cannot_do_is_its_own_error(root, options, says):
    before = Path(__file__).read_bytes()
    with pytest.raises(UserError, match=says):
        check_data.main([str(root), "--out", str(root / "pictures"), *options])
    assert Path(__file__).read_bytes() == before


def test_train_and_val_are_compared(root, check):
    write_split(root, change("categories", 1, "name", "wolf")(good_content()), "val")
    shutil.copy(root / "train" / "20.png", root / "val" / "20.png")
    code, text = check(root, "--images")
    assert code == 2 and "categories of only one of train and val: 2\n    3 dog is only in" in text
    assert re.search(r"val that are in train, too: 1\n    .*train/20.png = .*val/20.png", text)


def test_images_that_come_out_rotated_or_dark_are_noted(root, check):
    exif = Image.Exif()
    exif[check_data.EXIF_ORIENTATION] = 3
    Image.open(root / "train" / "10.png").save(root / "train" / "10.png", exif=exif)
    for i, brightest in ((20, 2**12), (40, 2**12 - 1)):
        pixels = np.full((48 + i, 64), brightest, np.uint16)
        Image.fromarray(pixels).save(root / "train" / f"{i}.png")
    code, text = check(root, "--images")
    assert code == 0 and re.search("EXIF note that rotates .*: 1\n.*/10.png\n", text), text
    assert re.search(r"values fit in 12: 1\n.*/40.png\n", text)


def test_an_exif_note_that_cannot_be_read_is_no_error(root, check, tmp_path):
    Image.open(root / "train" / "10.png").save(root / "train" / "10.png", exif=GARBAGE)
    assert check(root, "--images", "--strict")[0] == 0
    image(tmp_path / "yolo" / "images" / "a.png", exif=GARBAGE)
    text(tmp_path / "yolo" / "labels" / "a.txt", "0 .5 .5 .2 .2")
    to_coco.main([str(tmp_path / "yolo")])
    assert data.open_split(tmp_path / "yolo", "train").annotations.sizes.tolist() == [[50, 100]]


def test_an_exif_note_that_turns_a_yolo_image_but_keeps_its_size_is_told(tmp_path, capsys):
    for name, orientation in (("a", 1), ("b", 3), ("c", 6)):
        exif = Image.Exif()
        exif[check_data.EXIF_ORIENTATION] = orientation
        image(tmp_path / "images" / f"{name}.png", exif=exif)
        text(tmp_path / "labels" / f"{name}.txt", "0 .5 .5 .2 .2")
    text(tmp_path / "labels" / "classes.txt", "cat")
    to_coco.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"warning: 1 images, such as .*/b.png, are turned", printed)
    assert "3 boxes of 1 categories (cat)" in printed
    sizes = data.open_split(tmp_path, "train").annotations.sizes
    assert sizes.tolist() == [[50, 100], [50, 100], [100, 50]]


def test_findings_are_printed_where_no_picture_can_be_written(root, check):
    (root / "pictures").write_text("in the way")
    code, text = check(root)
    assert code == 0 and "not drawn (" in text and text.endswith("nothing is wrong.\n")


def test_locations_are_counted_by_the_rule_of_training_at_the_sizes_of_the_preset(root, check):
    write_split(root, bbox(5, 5, 1.5, 12)(good_content()))
    dataset = data.open_split(root, "train")
    for options, words in ((["demo"], "224 to 288"), (["demo", "--center-radius", "0.01"], "0.01"),
                           (["fcos_R_50_FPN_1x", "--train-short-sides", "64", "64"], "of 64,")):
        config = train.parse_arguments(options).config
        without, total = train.count_without_location(dataset, config)
        code, text = check(root, *options)
        assert f"of {total} in the images sampled, that no location learns: {without}\n" in text
        assert words in text
        assert code == (2 if without == total else 0)
    assert "no location learns" not in check(root, "fcos_R_50_FPN_1x")[1]  # enlarged to 800


# --- conversion ---------------------------------------------------------------------------------

def converted(src, out=None):
    to_coco.main([str(src), *(["--out", str(out)] if out else [])])
    return [data.open_split(out or src, kind) for kind in ("train", "val")]


def image(path, width=100, height=50, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "red").save(path, **options)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if type(content) is bytes else content.encode())


@pytest.mark.parametrize("layout, beside, names", [
    ("images/{}|labels/{}", True, "names: ['car', \"street lamp\"]"),
    ("{}/images|{}/labels", False, "names:\n- car  # a\n- street lamp\nnc: 2"),
    ("{}/images|{}/labels", True, "names:\n  0: car\n  1: street lamp\nnc: 2")])
def test_yolo_folders_become_coco(tmp_path, layout, beside, names):
    text(tmp_path / "yolo" / "data.yaml", names)
    for split in ("train", "val"):
        images, labels = (tmp_path / "yolo" / part.format(split) for part in layout.split("|"))
        image(images / "a.png")
        image(images / "empty.png")
        text(labels / "a.txt", "1 0.5 0.4 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n")
    out = None if beside else tmp_path / "out"
    for dataset in converted(tmp_path / "yolo", out):
        a = dataset.annotations
        assert a.category_names == ["car", "street lamp"] and dataset.with_boxes().tolist() == [0]
        assert a.labels.tolist() == [1, 0]
        assert a.boxes.round(3).tolist() == [[40, 10, 60, 30], [10, 10, 30, 30]]
        assert dataset.image(0).shape == (3, 50, 100)
    with pytest.raises(UserError, match="exists and is not overwritten"):
        converted(tmp_path / "yolo", out)


YAML = {  # what is written: the names; none: it is refused
    "names: [a b, 'C',  \"d-1\",\n  e,]  # f\n\n# g\nnc: 4": ["a b", "C", "d-1", "e"],
    "nc: 2\nnames:  # all\n# none\n\n- 'C'\n- b c # d\n# e\npath: x": ["C", "b c"],
    "\ufeffnames:\n    0: \"a\"\n    1: b/c (d)\nnc: 2": ["a", "b/c (d)"],
    "train: images": [],
    "names:\n- a, b\n- c": None,
    "names:\n- 'C #'": None,
    "names:\n- car [big]": None,
    "names: ['dog''s', c]": None,
    'names: {"0": "a", "1": "b"}': None,
    "names:\n- a\n  b": None,
    "names:\n- a\n  - b": None,
    "names:\n- a\nb": None,
    "names:\n  0: a\n  - b": None,
    "names:\n  0: a\n  0: b": None,
    'names: ["a\\n", b]': None,
    "names: [a,\n\n  b\n  c]": None,
    "names: []": None,
    "names:\n": None,
    "{names: [a, b]}": None,
    "names: [a]\nnc: 2": None,
    "names: [a]\nnames: [b]": None,
}


@pytest.mark.parametrize("content, expected", YAML.items(), ids=range(len(YAML)))
def test_names_in_yaml_are_understood_completely_or_refused(tmp_path, content, expected):
    text(tmp_path / "data.yaml", content)
    if expected is not None:
        assert list(to_coco.yolo_names(tmp_path).items()) == list(enumerate(expected))
        return
    with pytest.raises(UserError, match="data.yaml: its names .*classes.txt, one a line"):
        to_coco.yolo_names(tmp_path)
    text(tmp_path / "classes.txt", "a, b\nc\n\n")
    assert to_coco.yolo_names(tmp_path) == {0: "a, b", 1: "c"}


@pytest.mark.parametrize("file", ["classes.txt", "data.yaml", "labels/a.txt"])
def test_text_is_utf_8_with_or_without_a_mark_or_its_file_is_named(tmp_path, file):
    files = {"classes.txt": "ä\n", "data.yaml": "names: [ä]", "labels/a.txt": "0 .5 .5 .2 .2"}
    for n, mark in enumerate((b"\xef\xbb\xbf", b"\xff\xfe")):
        root = tmp_path / str(n)
        image(root / "images" / "a.png")
        text(root / "labels" / "a.txt", files["labels/a.txt"])
        text(root / file, mark + files[file].encode())
        if n:
            with pytest.raises(UserError, match=f"{file}: is not UTF-8"):
                to_coco.main([str(root)])
        else:
            to_coco.main([str(root)])
            names = data.open_split(root, "train").annotations.category_names
            assert names == ["0" if file == "labels/a.txt" else "ä"]


@pytest.mark.parametrize("names, label, says", [
    ("a\n\nb", "0 .5 .5 .2 .2", "has name ''"), ("a\x01\nb", "", r"has name 'a\\x01'"),
    (None, "", "list of categories is empty")])
def test_what_the_reader_would_refuse_is_not_written(tmp_path, names, label, says):
    if names:
        text(tmp_path / "classes.txt", names)
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", label)
    with pytest.raises(UserError, match=f"{says}.*; correct .*images"):
        to_coco.main([str(tmp_path)])
    assert not list(tmp_path.rglob("*.json"))


OBJECT = ("<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>11</xmin><ymin>1</ymin>"
          "<xmax>20</xmax><ymax>50</ymax></bndbox></object>")


def test_voc_pixels_count_from_one_and_difficult_objects_are_crowds(tmp_path):
    for n, split in enumerate(("train", "val")):
        text(tmp_path / "ImageSets" / "Main" / f"{split}.txt", f"{n}\n")
        image(tmp_path / "JPEGImages" / f"{n}.jpg")
        text(tmp_path / "Annotations" / f"{n}.xml", f"<annotation><filename>{n}.jpg</filename>"
             f"{OBJECT.format('dog', 1)}{OBJECT.format('cat', 0)}</annotation>")
    for dataset in converted(tmp_path):
        a = dataset.annotations
        assert a.boxes.tolist() == 2 * [[10, 0, 20, 50]] and a.crowd.tolist() == [True, False]
        assert a.category_names == ["cat", "dog"] and a.labels.tolist() == [1, 0]


@pytest.fixture
def voc(tmp_path):
    """Two images with a blank in their names, listed with and without a flag."""
    for split, stem, line in (("train", "a b", "a b\n"), ("val", "c 1", "\ufeffc 1  -1\r\n\r\n")):
        text(tmp_path / "ImageSets" / "Main" / f"{split}.txt", line)
        image(tmp_path / "JPEGImages" / f"{stem}.jpg")
        text(tmp_path / "Annotations" / f"{stem}.xml", f"<a>{OBJECT.format('dog', 0)}</a>")
    text(tmp_path / "classes.txt", "cat\ndog\n")  # of another program
    return tmp_path


def test_voc_names_of_files_may_have_blanks_and_a_flag_behind_them(voc):
    files = [dataset.annotations.file_names.tolist() for dataset in converted(voc)]
    assert files == [["a b.jpg"], ["c 1.jpg"]]
    text(voc / "ImageSets" / "Main" / "train.txt", "c 1\na b 1\n")
    train, _ = converted(voc, voc / "out")
    assert train.annotations.file_names.tolist() == ["c 1.jpg", "a b.jpg"]
    assert train.annotations.category_names == ["dog"]


@pytest.mark.parametrize("content, says", [
    (f"<a>{OBJECT.format('dog', 2)}</a>", "difficult is 2"),
    ('<?xml version="1.0" encoding="none"?><a/>', "encoding")])
def test_wrong_voc_annotations_are_a_sentence(voc, content, says):
    text(voc / "Annotations" / "a b.xml", content)
    with pytest.raises(UserError, match=f"a b.xml: is no VOC annotation .*{says}"):
        converted(voc)


@pytest.mark.parametrize("line", ["2 .5 .5 .1 .1", "0 .5 .5 .1", "0 50 20 10 10"])
def test_a_wrong_line_of_yolo_is_a_sentence_that_names_it(tmp_path, line):
    text(tmp_path / "classes.txt", "a\nb\n")
    image(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", line)
    with pytest.raises(UserError, match=re.escape(line)):
        to_coco.main([str(tmp_path)])
    assert not list(tmp_path.rglob("*.json"))


# --- shapes -------------------------------------------------------------------------------------

def test_shapes_are_the_same_every_time_and_good_data(tmp_path, check):
    for name in ("a", "b"):
        make_shapes.make_shapes(tmp_path / name, num_train=6, num_val=3, size=64)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 11 and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    code, text = check(tmp_path / "a", "--images")
    assert code == 0 and "NOTE" not in text


def test_shapes_are_made_once_and_nothing_else_is_overwritten(tmp_path, monkeypatch):
    make_shapes.make_shapes(tmp_path / "a", num_train=1, num_val=1, size=64)
    text(tmp_path / "b" / "photo.jpg", "mine")
    with pytest.raises(UserError, match="exists, but is no complete data set"):
        make_shapes.make_shapes(tmp_path / "b", num_train=1, num_val=1, size=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    monkeypatch.setattr(make_shapes, "_draw_shapes", None)
    make_shapes.make_shapes(tmp_path / "a")  # it is there: nothing is drawn
