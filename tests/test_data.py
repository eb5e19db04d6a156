"""What the detector learns from: reading, deciding, loading and checking, and what each says of data that is not right."""

import copy
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from assign import assign_targets, make_locations
from data import CocoDataset, DataError, Request, TrainSampler, read_annotations

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA_PY = Path(data.__file__).resolve()


def good_content():
    """Four images, three categories with sparse unordered ids, five boxes; nothing to complain of."""
    boxes = [(7, 10, 900, [10, 20, 30, 35]), (8, 10, 3, [1.5, 2, 20, 20]), (9, 30, 41, [0, 0, 64, 48]), (12, 20, 3, [5, 5, 9, 12]),
             (11, 40, 900, [20, 10, 15, 25])]
    return {"images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48 + i} for i in (30, 10, 20, 40)],
            "categories": [{"id": 900, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 41, "name": "eel"}],
            "annotations": [{"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
                            for n, i, c, b in boxes]}


def write_split(root, content, split="train", text=None):
    """A split on disk, with an image of its own content for every entry that names one. Returns the JSON file."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    path = root / "annotations" / f"instances_{split}.json"
    path.write_bytes(text if text is not None else json.dumps(content).encode())
    for entry in good_content()["images"]:
        picture = np.random.default_rng([entry["id"], len(split)]).integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / split / entry["file_name"])
    return path


def open_good(root, content=None):
    return CocoDataset(read_annotations(write_split(root, content or good_content())), root / "train")


def encoded(picture, kind="JPEG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# --- reading ----------------------------------------------------------------------------------------------------------

def test_annotations_stand_in_flat_arrays_sorted_by_image(tmp_path):
    a = open_good(tmp_path).annotations
    assert a.image_ids.tolist() == [30, 10, 20, 40] and a.image.tolist() == [0, 1, 1, 2, 3]
    assert a.annotation_ids.tolist() == [9, 7, 8, 12, 11]
    assert a.boxes[1].tolist() == [10, 20, 40, 55] and a.boxes[2].tolist() == [1.5, 2, 21.5, 22]
    assert a.sizes.tolist() == [[78, 64], [58, 64], [68, 64], [88, 64]]
    assert all(isinstance(v, np.ndarray) and v.dtype != object for k, v in a._asdict().items() if not k.startswith(("path", "category", "rows")))


def test_category_ids_are_arbitrary_and_labels_are_their_rank(tmp_path):
    a = open_good(tmp_path).annotations
    assert (a.category_ids, a.category_names) == ([3, 41, 900], ["dog", "eel", "cat"])
    assert a.labels.tolist() == [1, 2, 0, 0, 2]


def test_whole_floats_bom_missing_iscrowd_and_missing_area_are_read(tmp_path):
    content = good_content()
    content["images"][0]["width"], content["annotations"][0]["image_id"] = 64.0, 10.0
    for entry in content["annotations"]:
        del entry["iscrowd"], entry["area"]
    a = read_annotations(write_split(tmp_path, None, text=b"\xef\xbb\xbf" + json.dumps(content).encode()))
    assert a.sizes[0, 1] == 64 and a.image.tolist() == [0, 1, 1, 2, 3] and not a.crowd.any()
    assert a.areas.tolist() == [64 * 48, 1050, 400, 108, 375]


@pytest.mark.parametrize("area", [None, "large", -3, float("nan"), [1], 10**400])
def test_an_area_that_is_none_is_replaced_by_the_boxes_area(tmp_path, area):
    content = good_content()
    content["annotations"][0]["area"] = area
    assert open_good(tmp_path, content).annotations.areas[1] == 1050


def test_polygons_are_not_kept_in_memory(tmp_path):
    content = good_content()
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    assert "segmentation" not in data.read_json(write_split(tmp_path, content))["annotations"][0]


def change(*steps, to=None, drop=False):
    """A mutation: follow keys, then set or delete the last one."""
    def mutate(content):
        place = content
        for step in steps[:-1]:
            place = place[step]
        if drop:
            del place[steps[-1]]
        else:
            place[steps[-1]] = to
        return content
    return mutate


def repeated(table, **changes):
    def mutate(content):
        content[table].append(copy.deepcopy(content[table][0]) | changes)
        return content
    return mutate


NAN, INF = float("nan"), float("inf")
STOPS = {  # mutation -> what the error must say
    "images missing": (change("images", drop=True), "no list of images"),
    "annotations an object": (change("annotations", to={}), "no list of annotations"),
    "images empty": (change("images", to=[]), "has no images"),
    "categories empty": (change("categories", to=[]), "has no categories"),
    "image a number": (change("images", 1, to=7), "among its images is 7"),
    "list at the top": (lambda content: [content], "holds a list"),
    "image id a string": (change("images", 0, "id", to="30"), "images whose id is not a whole number.*'30'"),
    "image id 1.5": (change("images", 0, "id", to=1.5), "images whose id is not a whole number.*1.5"),
    "image id a bool": (change("images", 0, "id", to=True), "images whose id is not a whole number.*True"),
    "image id huge": (change("images", 0, "id", to=10**40), "images whose id is not.*more than 30 digits"),
    "image id missing": (change("images", 0, "id", drop=True), "images whose id is not a whole number.*has no id"),
    "file name missing": (change("images", 0, "file_name", drop=True), r"images\[0\] \(id 30\) has no file_name"),
    "file name a number": (change("images", 0, "file_name", to=5), "file_name 5"),
    "file name empty": (change("images", 0, "file_name", to=""), "file_name ''"),
    "file name up": (change("images", 0, "file_name", to="../a.png"), "not a path inside the image folder.*'../a.png'"),
    "file name up inside": (change("images", 0, "file_name", to="a/../../a.png"), "not a path inside the image folder"),
    "file name absolute": (change("images", 0, "file_name", to="/etc/passwd"), "not a path inside the image folder.*/etc/passwd"),
    "file name with zero": (change("images", 0, "file_name", to="a\0.png"), "not a path inside the image folder"),
    "file name a half character": (change("images", 0, "file_name", to="\ud800.png"), r"not a path inside the image folder.*ud800"),
    "height missing": (change("images", 1, "height", drop=True), r"height.*images\[1\] \(id 10\) .*has no height"),
    "height zero": (change("images", 1, "height", to=0), "height 0"),
    "width negative": (change("images", 1, "width", to=-64), "width -64"),
    "width a string": (change("images", 1, "width", to="64"), "width '64'"),
    "width 63.5": (change("images", 1, "width", to=63.5), "width 63.5"),
    "width huge": (change("images", 1, "width", to=10**12), "width 1000000000000"),
    "category id a string": (change("categories", 0, "id", to="900"), "categories whose id is not a whole number.*'900'"),
    "category name missing": (change("categories", 0, "name", drop=True), "has no name"),
    "category name a list": (change("categories", 0, "name", to=["cat"]), r"name \['cat'\]"),
    "image id twice": (repeated("images", file_name="else.png"), "2 images whose id stands several times.*id 30"),
    "category id twice": (repeated("categories", name="else"), "2 categories whose id stands several times.*id 900"),
    "image twice": (repeated("images"), "1 images whose id stands several times"),
    "unknown image": (change("annotations", 0, "image_id", to=11), r"annotations\[0\] \(id 7\) has image_id 11, which is not among the images"),
    "unknown category": (change("annotations", 0, "category_id", to=1), r"\(id 7\) has category_id 1, which is not among the categories"),
    "image_id missing": (change("annotations", 3, "image_id", drop=True), r"annotations\[3\] \(id 12\) has no image_id"),
    "image_id a string": (change("annotations", 3, "image_id", to="20"), "image_id '20'"),
    "category_id an object": (change("annotations", 3, "category_id", to={"id": 3}), "category_id {'id': 3}"),
    "bbox missing": (change("annotations", 3, "bbox", drop=True), r"annotations\[3\] \(id 12\) has no bbox"),
    "bbox of three": (change("annotations", 3, "bbox", to=[1, 2, 3]), r"not four numbers.*\(id 12\) has bbox \[1, 2, 3\]"),
    "bbox of five": (change("annotations", 3, "bbox", to=[1, 2, 3, 4, 5]), "not four numbers"),
    "bbox with text": (change("annotations", 3, "bbox", to=["1", 2, 3, 4]), "not four numbers.*'1'"),
    "bbox with null": (change("annotations", 3, "bbox", to=[1, 2, None, 4]), "not four numbers.*None"),
    "bbox with bool": (change("annotations", 3, "bbox", to=[1, 2, True, 4]), "not four numbers.*True"),
    "bbox an object": (change("annotations", 3, "bbox", to={"x": 1}), "not four numbers.*'x'"),
    "bbox a text": (change("annotations", 3, "bbox", to="1 2 3 4"), "not four numbers.*'1 2 3 4'"),
    "bbox huge": (change("annotations", 3, "bbox", to=[1, 2, 10**400, 4]), "not four numbers"),
    "iscrowd 2": (change("annotations", 3, "iscrowd", to=2), "iscrowd 2"),
    "annotation id a string": (change("annotations", 3, "id", to="twelve"), "id 'twelve'"),
    "normalised boxes": (lambda c: c | {"annotations": [a | {"bbox": [0.1, 0.2, 0.3, 0.4]} for a in c["annotations"]]},
                         "5 annotations whose bbox is normalised.*multiply"),
}
NOTES = {  # mutation -> what the report must tell; training can start
    "no width": (change("annotations", 3, "bbox", to=[5, 5, 0, 3]), "1 boxes of no width or height"),
    "no height": (change("annotations", 3, "bbox", to=[5, 5, 3, 0.0]), "1 boxes of no width or height"),
    "negative width": (change("annotations", 3, "bbox", to=[50, 5, -3, 3]), "1 boxes of negative width or height"),
    "not a number": (change("annotations", 3, "bbox", to=[NAN, 5, 3, 3]), "1 boxes with a coordinate that is not finite"),
    "infinite": (change("annotations", 3, "bbox", to=[1, 5, 3, INF]), "1 boxes with a coordinate that is not finite"),
    "overflow": (change("annotations", 3, "bbox", to=[1e308, 5, 1e308, 1]), "1 boxes with a coordinate that is not finite"),
    "right of the image": (change("annotations", 3, "bbox", to=[64, 5, 9, 9]), "1 boxes outside their image"),
    "above the image": (change("annotations", 3, "bbox", to=[5, -30, 9, 9]), "1 boxes outside their image"),
    "beyond the edge": (lambda c: c | {"annotations": c["annotations"] * 3 + [c["annotations"][0] | {"bbox": [-40, 5, 60, 9]}]},
                        "1 boxes reach more than a pixel beyond their image"),
    "crowd": (change("annotations", 3, "iscrowd", to=1), "1 crowd boxes"),
    "image without boxes": (repeated("images", id=77, file_name="10.png", height=58), "1 images without a box to learn"),
    "category without boxes": (repeated("categories", id=5, name="fox"), "1 categories without a box to learn"),
    "name of two categories": (repeated("categories", id=5), "1 category names stand for several categories"),
    "file listed twice": (repeated("images", id=77), "1 image files are listed under several ids"),
    "annotation id twice": (repeated("annotations"), "2 annotations have no id, or one that another has"),
    "annotation id missing": (change("annotations", 3, "id", drop=True), "1 annotations have no id, or one that another has"),
    "xyxy as xywh": (lambda c: c | {"annotations": [a | {"bbox": [30, 20, 60, 44]} for a in c["annotations"]]},
                     r"5 boxes leave their image, but would not if bbox were \[x0, y0, x1, y1\]"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_cannot_be_used_is_one_sentence_that_names_it(tmp_path, name):
    mutate, says = STOPS[name]
    path = write_split(tmp_path, mutate(good_content()))
    with pytest.raises(DataError, match=says) as error:
        read_annotations(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("name", NOTES)
def test_what_is_doubtful_is_counted_and_told(tmp_path, name):
    mutate, says = NOTES[name]
    dataset = open_good(tmp_path, mutate(good_content()))
    problems = data.find_problems(dataset)
    assert any(re.search(says, f"{p.count} {p.what}") for p in problems), problems
    assert not any(p.stops for p in problems) and all(p.examples and p.then and p.remedy for p in problems)
    assert len(data.describe_dropped(dataset).splitlines()) == 3
    assert np.isfinite(dataset.boxes.boxes).all() and (dataset.boxes.boxes[:, 2:] > dataset.boxes.boxes[:, :2]).all()


def test_good_data_has_nothing_to_tell(tmp_path):
    dataset = open_good(tmp_path)
    assert data.find_problems(dataset) == [] and data.check_images(dataset)[0] == []
    assert data.describe_dropped(dataset).endswith("4 of 4 images, 5 of 5 boxes, 3 classes to learn")


@pytest.mark.parametrize("text, says", [
    (b"", "it is empty"), (b"hello", "cannot be read as JSON"), (json.dumps(good_content()).encode()[:300], "is the file complete"),
    (b"\xff\xfe{\x00}\x00", "cannot be read as JSON.*decode"), (b"[" * 100_000, "cannot be read as JSON.*recursion"),
    (b'{"images": ' + b"9" * 5000 + b"}", "cannot be read as JSON.*digits"), (b'{"images": [], "images": []}', "a key twice"),
    (b"{} {}", "Extra data")])
def test_a_file_that_is_not_json_is_said_to_be_none(tmp_path, text, says):
    with pytest.raises(DataError, match=says):
        read_annotations(write_split(tmp_path, None, text=text))


def test_missing_folders_files_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere/annotations: no such folder"):
        data.find_split(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="No such file"):
        read_annotations(tmp_path / "a.json")
    with pytest.raises(DataError, match="directory"):
        read_annotations(tmp_path)
    write_split(tmp_path, good_content())
    with pytest.raises(DataError, match="no val split among.*train.*--val-split"):
        data.find_split(tmp_path, "val")
    with pytest.raises(DataError, match="no instances_test.json; there is train"):
        data.find_split(tmp_path, "train", "test")
    write_split(tmp_path, good_content(), "train_b")
    with pytest.raises(DataError, match="more than one train split"):
        data.find_split(tmp_path, "train")
    write_split(tmp_path, good_content(), "train2017")
    assert data.find_split(tmp_path, "train")[1].name == "train2017"
    (tmp_path / "annotations" / "instances_val.json").write_text("{}")
    with pytest.raises(DataError, match="no image folder val/ or images/val/"):
        data.find_split(tmp_path, "val")


def test_byte_wise_mutations_are_read_or_refused_in_one_sentence(tmp_path):
    rounds = int(os.environ.get("FUZZ_ROUNDS", 400))
    random, text = np.random.default_rng(0), json.dumps(good_content(), allow_nan=True).encode()
    path, refused = write_split(tmp_path, good_content()), 0
    tokens = [b"null", b"-1", b"0", b"NaN", b"1e999", b'"a"', b"[]", b"{}", b"true", b"99999999999999999999", b"0.5", b",", b"\xff", b"\\ud800"]
    for _ in range(rounds):
        mutated = bytearray(text)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(len(mutated)))
            kind = random.integers(5)
            if kind == 0:
                mutated[at] = random.integers(256)
            elif kind == 1:
                del mutated[at:at + int(random.integers(1, 20))]
            elif kind == 2:
                numbers = [m for m in re.finditer(rb"(?<=[ \[])[\d.]+|\"[^\"]*\"", mutated)]
                start, end = numbers[random.integers(len(numbers))].span() if numbers else (at, at)
                mutated[start:end] = tokens[random.integers(len(tokens))]
            elif kind == 3:
                mutated[at:at] = mutated[int(random.integers(len(mutated))):][:int(random.integers(1, 40))]
            else:
                mutated[at] = ord(random.choice(list("0123456789-.eE,:[]{}\"")))
            mutated = mutated or bytearray(b" ")
        path.write_bytes(mutated)
        problems = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                read_annotations(path)
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
            try:  # the checker goes on behind entries that cannot be used
                a = read_annotations(path, problems)
            except DataError:
                continue
            dataset = CocoDataset(a, tmp_path / "train")
            data.find_problems(dataset)
            data.describe(dataset, 80, 133)
            assert len(a.image) == len(a.boxes) == len(a.labels) == len(a.areas) and not np.any(a.image >= len(a.image_ids))
            assert np.isfinite(dataset.boxes.boxes).all() and (dataset.boxes.boxes[:, 2:] > dataset.boxes.boxes[:, :2]).all()
            assert len(a.labels) == 0 or 0 <= a.labels.min() <= a.labels.max() < len(a.category_ids)
    assert 0.2 * rounds < refused < 0.99 * rounds


# --- images -----------------------------------------------------------------------------------------------------------

PHOTO = Image.fromarray(np.asarray(Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 60).convert("RGB")) // 2
                        + np.arange(64, dtype=np.uint8)[None, :, None])


@pytest.mark.parametrize("mode, kind, tolerance", [
    ("RGB", "PNG", 0), ("RGB", "JPEG", 12), ("RGBA", "PNG", 0), ("P", "PNG", 60), ("P", "GIF", 60), ("RGB", "WEBP", 30),
    ("CMYK", "JPEG", 12), ("RGB", "BMP", 0), ("RGB", "TIFF", 0)])
def test_images_of_any_kind_are_loaded_as_rgb(tmp_path, mode, kind, tolerance):
    (tmp_path / "a").write_bytes(encoded(PHOTO.convert(mode), kind))
    image = data.load_image(tmp_path / "a")
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(PHOTO)).mean() <= tolerance / 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_images_have_three_equal_channels(tmp_path, kind):
    (tmp_path / "a").write_bytes(encoded(PHOTO.convert("L"), kind))
    image = data.load_image(tmp_path / "a")
    assert image.shape == (3, 48, 64) and (image == image[:1]).all() and image.float().std() > 5


def test_pngs_of_16_bits_keep_their_upper_8(tmp_path):
    grey = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(grey), "PNG"))
    image = data.load_image(tmp_path / "a")
    assert image.dtype == torch.uint8 and np.array_equal(image[1].numpy(), grey >> 8)


def test_transparency_is_dropped_and_the_colour_below_stays(tmp_path):
    pixels = np.tile(np.array([200, 100, 50, 0], np.uint8), (4, 6, 1))
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    assert data.load_image(tmp_path / "a")[:, 0, 0].tolist() == [200, 100, 50]


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    (tmp_path / "a").write_bytes(encoded(Image.new("RGB", (8, 8), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]))
    assert data.load_image(tmp_path / "a")[:, 0, 0].tolist() == [255, 0, 0]


WHOLE_JPEG, WHOLE_PNG = encoded(PHOTO), encoded(PHOTO, "PNG")


@pytest.mark.parametrize("name, content, says", [
    ("a.jpg", WHOLE_JPEG[:len(WHOLE_JPEG) // 2], "incomplete or truncated"), ("b.jpg", WHOLE_JPEG[:-2], "incomplete or truncated"),
    ("c.jpg", encoded(PHOTO, progressive=True)[:-400], "incomplete or truncated"), ("d.jpg", WHOLE_JPEG[:20], "cannot be decoded"),
    ("e.png", WHOLE_PNG[:len(WHOLE_PNG) // 2], "truncated"), ("f.png", WHOLE_PNG[:200] + b"\x55" * 50 + WHOLE_PNG[250:], "broken data stream"),
    ("g.jpg", b"this is a text", "not an image; it begins with b'this is a te'"), ("h.jpg", b"", "it is empty"),
    ("i.webp", encoded(PHOTO, "WEBP")[:300], "cannot be decoded"), ("j.tif", encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "32 bits")])
def test_images_that_cannot_be_decoded_are_named_with_the_reason(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        data.load_image(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value) and ".cpp" not in str(error.value)


def test_damaged_pngs_never_end_the_process(tmp_path):
    random = np.random.default_rng(0)
    for _ in range(200):
        mutated = bytearray(WHOLE_PNG)
        mutated[random.integers(8, len(mutated))] ^= int(random.integers(1, 256))
        (tmp_path / "a.png").write_bytes(mutated)
        try:
            assert data.load_image(tmp_path / "a.png").dtype == torch.uint8
        except DataError:
            pass


def test_exif_turns_an_image_only_where_the_json_has_the_turned_size(tmp_path):
    dataset = open_good(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6                                      # turn by 90 degrees clockwise to see it upright
    picture = Image.new("RGB", (58, 64))                  # image 10 is 64 wide and 58 high
    picture.paste("white", (0, 0, 58, 20))
    for kind, turned in (("JPEG", True), ("PNG", True), ("JPEG", False)):
        stored = picture if turned else picture.resize((64, 58))
        (tmp_path / "train" / "10.png").write_bytes(encoded(stored, kind, exif=exif))
        image = dataset.image(1)
        assert image.shape == (3, 58, 64)
        assert (image[0, 30, 60] > 200) == turned         # the top is on the right
        problems = data.check_images(dataset)[0]
        assert [p.what for p in problems] == ([] if turned else ["images have an EXIF note that turns them, but width and height of the pixels as stored"])


def test_a_file_of_another_size_than_the_json_is_refused_with_both_sizes(tmp_path):
    dataset = open_good(tmp_path)
    PHOTO.save(tmp_path / "train" / "10.png")
    with pytest.raises(DataError, match=r"10.png \(image 10\): is 64 x 48 pixels, but .*instances_train.json says 64 x 58"):
        dataset.image(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_stays_one_sentence(tmp_path, workers):
    dataset = open_good(tmp_path)
    (tmp_path / "train" / "10.png").unlink()
    batches = data.load(dataset, data.evaluation_batches(dataset.annotations.sizes, 2, 64, 99, True), workers, pin_memory=False)
    with pytest.raises(DataError, match="10.png: no such image file") as error:
        list(batches)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_training_does_not_start_without_an_image_file(tmp_path):
    write_split(tmp_path, good_content())
    assert len(data.open_split(str(tmp_path), None, "train")) == 4
    (tmp_path / "train" / "20.png").unlink()
    with pytest.raises(DataError, match="20.png: no such image file, and 1 of 4 in all"):
        data.open_split(str(tmp_path), None, "train")


# --- deciding ---------------------------------------------------------------------------------------------------------

SIZES = np.random.default_rng(1).integers(40, 200, (53, 2))


def sampler(**changes):
    return TrainSampler(**dict(sizes=SIZES, images=np.arange(3, 53), batch_size=8, seed=5, short_sides=(64, 80), long_side=133) | changes)


def test_a_batch_depends_on_seed_and_step_alone():
    straight, forward = sampler(), sampler()
    batches = [straight.global_batch(step) for step in range(20)]
    for step in (19, 3, 3, 7, 0, 12):
        assert forward.global_batch(step) == batches[step]
    assert sampler(seed=6).global_batch(0) != batches[0]


def test_an_epoch_sees_every_image_and_fills_up_with_few_twice():
    s = sampler()
    assert s.batches_per_epoch == 7
    for epoch in range(3):
        seen = [r.index for step in range(7 * epoch, 7 * epoch + 7) for r in s.global_batch(step)]
        assert sorted(set(seen)) == list(range(3, 53)) and len(seen) == 56


def test_fewer_images_than_a_batch_are_repeated():
    seen = [r.index for r in sampler(images=[4, 9, 11]).global_batch(0)]
    assert sorted(seen.count(i) for i in (4, 9, 11)) == [2, 3, 3]


def test_tall_and_wide_images_share_no_batch_but_one():
    s = sampler()
    mixed = [len({SIZES[r.index, 1] >= SIZES[r.index, 0] for r in s.global_batch(step)}) == 2 for step in range(7)]
    assert sum(mixed) <= 2  # where tall ones end, and where the last batch is filled up from the front


def test_half_of_the_images_are_flipped_and_short_sides_fill_their_range():
    s = sampler(short_sides=(64, 66), long_side=10_000)
    drawn = [r for step in range(200) for r in s.global_batch(step)]
    assert 0.45 < np.mean([r.flip for r in drawn]) < 0.55
    assert {min(r.size) for r in drawn} == {64, 65, 66}
    assert not any(r.flip for step in range(5) for r in sampler(flip=0.0).global_batch(step))


@pytest.mark.parametrize("size, enlarge, expected", [
    ((480, 640), True, (800, 1067)), ((640, 480), True, (1067, 800)), ((400, 1000), True, (533, 1333)), ((480, 640), False, (480, 640)),
    ((1600, 1600), False, (800, 800)), ((1, 100_000), True, (1, 1333)), ((800, 1333), True, (800, 1333))])
def test_resizing_brings_the_short_side_to_800_unless_the_long_side_would_exceed_1333(size, enlarge, expected):
    assert data.resized(*size, 800, 1333, enlarge) == expected


def test_the_canvas_holds_the_whole_global_batch_in_multiples_of_32():
    for step in range(10):
        batch = sampler().global_batch(step)
        (canvas,) = {r.canvas for r in batch}
        for side in (0, 1):
            longest = max(r.size[side] for r in batch)
            assert canvas[side] % 32 == 0 and longest <= canvas[side] < longest + 32


def test_the_sides_of_a_canvas_have_few_different_lengths_so_that_few_networks_are_compiled():
    photographs = np.array([(480, 640), (640, 480), (427, 640)] * 20)
    assert sampler(sizes=photographs, canvas_sides=3, short_sides=(64, 64), long_side=1333).sides == [64, 96]  # of 64 x 96 at most
    several = sampler(sizes=photographs, canvas_sides=3, short_sides=(640, 800), long_side=1333)
    assert several.sides == [800, 1024, 1216]
    for step in range(20):
        batch = several.global_batch(step)
        (canvas,) = {r.canvas for r in batch}
        for side in (0, 1):
            longest = max(r.size[side] for r in batch)
            assert canvas[side] == min(s for s in several.sides if s >= longest)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_out_every_batch_and_keep_its_canvas(world, accumulate):
    s, steps = sampler(), range(3, 9)
    parts = [list(data.shares(s, steps, accumulate, rank, world)) for rank in range(world)]
    assert {len(p) for p in parts} == {len(steps) * accumulate}
    for n, step in enumerate(steps):
        together = [r for part in range(accumulate) for rank in range(world) for r in parts[rank][n * accumulate + part]]
        assert together == s.global_batch(step)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_evaluation_sees_every_image_once_and_unflipped(batch_size):
    batches = data.evaluation_batches(SIZES, batch_size, 64, 133, True)
    assert sorted(r.index for batch in batches for r in batch) == list(range(53))
    assert not any(r.flip for batch in batches for r in batch) and all(len({r.canvas for r in batch}) == 1 for batch in batches)


# --- loading ----------------------------------------------------------------------------------------------------------

def test_a_batch_is_resized_flipped_and_padded_with_zeros(tmp_path):
    dataset = open_good(tmp_path)
    canvas = (160, 128)
    requests = [Request(1, False, (116, 128), canvas), Request(1, True, (58, 64), canvas), Request(2, False, (68, 64), canvas)]
    batch = dataset[requests]
    assert batch.images.shape == (3, 3, 160, 128) and batch.images.dtype == torch.uint8
    for image, (h, w) in zip(batch.images, batch.sizes.tolist()):
        assert (image[:, h:] == 0).all() and (image[:, :, w:] == 0).all() and (image[:, :h, :w] > 0).float().mean() > 0.9
    torch.testing.assert_close(batch.boxes[0], torch.tensor([[20.0, 40, 80, 110], [3, 4, 43, 44]]))
    torch.testing.assert_close(batch.boxes[1], torch.tensor([[24.0, 20, 54, 55], [42.5, 2, 62.5, 22]]))
    assert [label.tolist() for label in batch.labels] == [[2, 0], [2, 0], [0]] and batch.indices.tolist() == [1, 1, 2]
    assert torch.equal(batch.images[1, :, :58, :64].flip(2), dataset.image(1))


def test_an_image_without_boxes_has_empty_tensors(tmp_path):
    content = good_content()
    del content["annotations"][2]
    dataset = open_good(tmp_path, content)
    batch = dataset[[Request(0, True, (78, 64), (96, 64))]]
    assert batch.boxes[0].shape == (0, 4) and batch.labels[0].shape == (0,) and dataset.with_boxes().tolist() == [1, 2, 3]


def test_shapes_are_deterministic_and_go_through_the_same_reader(tmp_path):
    for root in ("a", "b"):
        data.make_shapes(tmp_path / root, num_train=6, num_val=3, size=64)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 11 and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    for kind, count in (("train", 6), ("val", 3)):
        dataset = data.open_split(str(tmp_path / "a"), None, kind)
        assert len(dataset) == count and len(dataset.boxes.labels) == len(dataset.annotations.labels) and dataset.annotations.category_names == list(data.SHAPES)
        assert data.check_images(dataset)[0] == []


# --- checking ---------------------------------------------------------------------------------------------------------

def test_counted_locations_are_those_that_assignment_gives():
    random, sizes = np.random.default_rng(3), np.array([[150, 210], [700, 900], [64, 64], [90, 30]])
    boxes, counts = [], [40, 120, 5, 0]
    for (height, width), n in zip(sizes, counts):
        corners = random.uniform(0, 1, (n, 2, 2)) ** 2 * [width, height]
        size = np.exp(random.uniform(0, 6, (n, 1))) * np.exp(random.uniform(-1.5, 1.5, (n, 2)))
        x0y0 = corners[:, 0]
        boxes.append(np.concatenate([x0y0, np.minimum(x0y0 + size, [width, height])], axis=1))
    flat = data.Boxes(np.concatenate([[0], np.cumsum(counts)]), np.concatenate(boxes).astype(np.float32), np.zeros(sum(counts), np.int64))
    claimed, kept, _ = data.count_locations(flat, sizes, sizes)
    for i, (height, width) in enumerate(sizes):
        locations = make_locations(int(-(-height // 32) * 32), int(-(-width // 32) * 32))
        mine = torch.from_numpy(flat.boxes[flat.first[i]:flat.first[i + 1]])
        winners = assign_targets(locations, [mine], [torch.arange(len(mine))]).labels[0]
        assert torch.bincount(winners[winners >= 0], minlength=len(mine)).tolist() == kept[flat.first[i]:flat.first[i + 1]].tolist()
        for g, box in enumerate(mine):
            alone = assign_targets(locations, [box[None]], [torch.zeros(1, dtype=torch.int64)]).labels
            assert (alone == 0).sum() == claimed[flat.first[i] + g]
    assert (claimed == 0).any() and ((claimed > 0) & (kept == 0)).any()


@pytest.fixture
def check(capsys):
    def run(root, *options):
        code = data.main([str(root), *options, "--out", str(root / "pictures")])
        return code, capsys.readouterr().out
    return run


def test_the_checker_exits_with_0_1_or_2(tmp_path, check):
    write_split(tmp_path, good_content())
    write_split(tmp_path, good_content(), "val")
    code, text = check(tmp_path, "--images")
    assert code == 0 and "Clean." in text, text
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"train.png", "val.png"}
    write_split(tmp_path, NOTES["no width"][0](good_content()), "val")
    code, text = check(tmp_path)
    assert code == 1 and "1 boxes of no width or height" in text and "'20.png' (image 20), annotation 12: bbox [5, 5, 0, 3]" in text
    content = STOPS["bbox of three"][0](STOPS["width a string"][0](good_content()))
    write_split(tmp_path, content, "val")
    code, text = check(tmp_path)
    assert code == 2 and "bbox [1, 2, 3]" in text and "width '64'" in text and "Training cannot start" in text  # all at once
    (tmp_path / "annotations" / "instances_val.json").write_text("")
    assert check(tmp_path)[0] == 2
    code, text = check(tmp_path / "none")
    assert code == 2 and "no such folder" in text


def test_the_checker_is_a_command_whose_errors_are_one_line(tmp_path):
    write_split(tmp_path, good_content())
    result = subprocess.run([sys.executable, str(DATA_PY), str(tmp_path), "--fix", "x.json"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "error: --fix repairs one file; name it with --split\n"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DataError, match=r"no folder that can be written to \(.+\); name another with --out"):
        data.make_folder(tmp_path / place, "--out")
    assert (tmp_path / "file").read_text() == "kept"
    assert list(data.make_folder(tmp_path / "new" / "folder", "--out").iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here, a disk that is always full")
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path):
    write_split(tmp_path, good_content())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.png").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        data.main([str(tmp_path), "--split", "train", "--out", str(tmp_path / "out")])
    assert "No space left on device; free some space and run this again" in data.sentence(raised.value)
    assert data.sentence(DataError("a: b")) == "error: a: b"


def test_train_and_val_are_compared(tmp_path):
    train = open_good(tmp_path)
    content = good_content()
    content["categories"][1]["name"] = "wolf"
    val = CocoDataset(read_annotations(write_split(tmp_path, content, "val")), tmp_path / "val")
    (tmp_path / "val" / "20.png").write_bytes((tmp_path / "train" / "20.png").read_bytes())
    categories, shared = data.compare_splits((train, data.check_images(train)[2]), (val, data.check_images(val)[2]))
    assert categories.stops and "categories differ" in categories.what and "3 'dog' is in train alone" in categories.examples
    assert shared.count == 1 and shared.examples[0].count("20.png") == 2


@pytest.mark.parametrize("name", [*STOPS, *NOTES])
def test_a_repaired_copy_is_clean_and_the_original_is_untouched(tmp_path, name):
    mutate = (STOPS | NOTES)[name][0]
    path = write_split(tmp_path, mutate(good_content()))
    before, problems = path.read_bytes(), []
    try:
        dataset = CocoDataset(read_annotations(path, problems), tmp_path / "train")
    except DataError:
        return  # nothing to repair: no table, or nothing in it
    out = tmp_path / "annotations" / "instances_trainfixed.json"
    data.write_fixed(dataset, out)
    fixed = CocoDataset(read_annotations(out), tmp_path / "train")
    told = {p.what for p in data.find_problems(fixed)}
    assert not told & {*data.faults(fixed.annotations), "annotations have no id, or one that another has"} and not any("beyond" in t for t in told)
    assert np.array_equal(fixed.boxes.boxes, dataset.boxes.boxes) and path.read_bytes() == before
    assert sorted(fixed.annotations.annotation_ids) == list(range(1, len(fixed.annotations.labels) + 1))
    with pytest.raises(DataError, match="exists already"):
        data.write_fixed(dataset, path)


def test_fix_leaves_out_images_that_cannot_be_decoded(tmp_path, check):
    write_split(tmp_path, good_content())
    (tmp_path / "train" / "30.png").unlink()
    (tmp_path / "train" / "10.png").write_bytes(WHOLE_PNG[:90])
    code, text = check(tmp_path, "--split", "train", "--images", "--fix", str(tmp_path / "fixed.json"))
    assert code == 2 and "10.png" in text and "2 of 4 images" in text
    assert read_annotations(tmp_path / "fixed.json").image_ids.tolist() == [20, 40]


# --- real data --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, split, images, boxes, dropped", [
    ("bccd", "train", 292, 3943, 2), ("bccd", "val", 72, 945, 0),                       # two boxes of no width
    ("coco_mini", "train2017", 80, 739, 8), ("coco_mini", "val2017", 79, 624, 5)])      # crowd boxes
def test_real_data_is_read_whole(name, split, images, boxes, dropped):
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not here")
    dataset = data.open_split(str(REAL / name), None, split[:3].replace("tra", "train"))
    assert (len(dataset), len(dataset.annotations.labels), len(dataset.boxes.labels)) == (images, boxes, boxes - dropped)
    batch = dataset[data.evaluation_batches(dataset.annotations.sizes, 4, 160, 266, True)[0]]
    assert batch.images.float().std() > 20
