"""From files to batches: reading, sampling and loading, and what each says of faulty data."""

import io
import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import SHARED, change, good_content, repeated, write_split
from data import CocoDataset, Request, TrainSampler, UserError, read_annotations
from model import ModelConfig
from train import TrainConfig

NAN = float("nan")


def open_good(root, content=None):
    return CocoDataset(read_annotations(write_split(root, content or good_content())),
                       root / "train")


# --- reading ------------------------------------------------------------------------------------

def test_annotations_are_flat_arrays_sorted_by_image(tmp_path):
    a = open_good(tmp_path).annotations
    assert a.image_ids.tolist() == [30, 10, 20, 40] and a.image.tolist() == [0, 1, 1, 2, 3]
    assert a.boxes[1:3].tolist() == [[10, 20, 40, 55], [1.5, 2, 21.5, 22]]
    assert a.sizes.tolist() == [[78, 64], [58, 64], [68, 64], [88, 64]]
    assert a.areas.tolist() == [64 * 48, 1050, 400, 108, 375]


def test_category_ids_are_arbitrary_labels_are_their_rank_and_names_of_any_language(tmp_path):
    content = json.loads(json.dumps(good_content()).replace("900", "-7").replace("30", str(2**52)))
    content["images"][1]["file_name"] = content["categories"][0]["name"] = "写真 é.png"
    a = read_annotations(write_split(tmp_path, content))
    assert (a.category_ids, a.category_names) == ([-7, 3, 41], ["写真 é.png", "dog", "eel"])
    assert a.labels.tolist() == [2, 0, 1, 1, 0] and a.image_ids[0] == 2**52
    assert a.file_names[1] == "写真 é.png"


def test_whole_floats_a_bom_and_missing_or_senseless_iscrowd_and_area_are_read(tmp_path):
    content = good_content()
    content["images"][0]["width"], content["annotations"][0]["image_id"] = 64.0, 10.0
    for entry in content["annotations"]:
        del entry["iscrowd"], entry["area"]
    for entry, area in zip(content["annotations"], (None, "large", -3, NAN)):
        entry["area"] = area
    a = read_annotations(write_split(tmp_path, b"\xef\xbb\xbf" + json.dumps(content).encode()))
    assert a.sizes[0, 1] == 64 and a.image.tolist() == [0, 1, 1, 2, 3] and not a.crowd.any()
    assert a.areas.tolist() == [64 * 48, 1050, 400, 108, 375]


@pytest.mark.parametrize("mutate, says", [
    (lambda c: [c], "no list of categories"),
    (lambda c: c | {"images": [7]}, "no list of images"),
    (lambda c: c | {"images": [], "annotations": []}, "list of images is empty"),
    (change("images", 0, "id", "30"), r"images\[0\].* has id '30' instead of an integer"),
    (change("images", 0, "id", True), "has id True"),
    (change("images", 0, "file_name"), r"images\[0\] \(id 30\) has file_name None"),
    (change("images", 0, "file_name", "a/../../b.png"), "instead of a path inside the image fol"),
    (change("images", 0, "file_name", "\ud800.png"), "instead of a path inside the image folder"),
    (change("images", 1, "height", 0), r"\(id 10\) has height 0 instead of a number of pixels"),
    (change("categories", 0, "name"), r"categories\[0\] \(id 900\) has name None"),
    (repeated("images", file_name="else.png"), r"images\[4\] \(id 30\) has the id of another"),
    (change("annotations", 3, "image_id", 11), r"\(id 12\) has image_id 11, which is not among"),
    (change("annotations", 3, "category_id", 1), "has category_id 1, which is not among"),
    (change("annotations", 3, "bbox", [1, 2, 3]), r"has bbox \[1, 2, 3\] instead of four numbers"),
    (change("annotations", 3, "bbox", [1, 2, "3", 4]), "instead of four numbers"),
    (change("annotations", 3, "bbox", [1, 2, 10**400, 4]), "has bbox"),
    (change("annotations", 3, "iscrowd", 2), "has iscrowd 2 instead of 0 or 1"),
    (lambda c: c | {"annotations": c["annotations"][:1] + [
        a | {"bbox": [.1, .2, .3, .4]} for a in c["annotations"][1:]]},
     r"annotations\[1\].*normalised like most.*multiply")])
def test_what_is_not_coco_format_is_refused_in_a_sentence_that_names_it(tmp_path, mutate, says):
    path = write_split(tmp_path, mutate(good_content()))
    with pytest.raises(UserError, match=says) as error:
        read_annotations(path)
    told = str(error.value)
    assert str(path) in told and "\n" not in told and len(told) < 500 and told.encode()


@pytest.mark.parametrize("text", [
    b"", json.dumps(good_content()).encode()[:300], b"\xff\xfe{\x00}\x00", b"[" * 100_000])
def test_a_file_that_is_not_json_is_said_to_be_none(tmp_path, text):
    with pytest.raises(UserError, match="train.json: cannot be read as JSON"):
        read_annotations(write_split(tmp_path, text))


@pytest.mark.parametrize("bbox", [
    [5, 5, 0, 3], [50, 5, -3, 3], [NAN, 5, 3, 3], [1e308, 5, 1e308, 1], [64, 5, 9, 9],
    [5, 5, 1e-5, 9]])
def test_a_faulty_box_is_left_out_and_counted(tmp_path, bbox):
    dataset = open_good(tmp_path, change("annotations", 3, "bbox", bbox)(good_content()))
    assert dataset.with_boxes().tolist() == [0, 1, 3] and dataset.targets(2)[0].shape == (0, 4)
    assert data.learnable(dataset.annotations).tolist() == [True, True, True, False, True]
    assert dataset.summary().endswith("3 of 4 images with 4 boxes of 3 classes; left out: 0 crowd "
                                      "and 1 faulty boxes")


def test_boxes_are_clipped_to_their_image_and_crowds_are_left_out(tmp_path):
    content = change("annotations", 0, "bbox", [-10, 20, 500, 500])(good_content())
    dataset = open_good(tmp_path, change("annotations", 3, "iscrowd", 1)(content))
    boxes, labels = dataset.targets(1)
    assert boxes.tolist() == [[0, 20, 64, 58], [1.5, 2, 21.5, 22]] and labels.tolist() == [2, 0]
    assert dataset.with_boxes().tolist() == [0, 1, 3] and len(dataset.labels) == 4
    assert dataset.targets(3)[0].tolist() == [[20, 10, 35, 35]]  # the image behind the crowd's
    assert dataset.summary().endswith("left out: 1 crowd and 0 faulty boxes")


def test_missing_folders_and_splits_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder; name the data with DATA="):
        data.find_split(tmp_path / "nowhere", "train")
    write_split(tmp_path, good_content())
    with pytest.raises(UserError, match="no splits match 'val' among train; .*--val-split"):
        data.find_split(tmp_path, "val")
    write_split(tmp_path, good_content(), "train_b")
    with pytest.raises(UserError, match="2 splits match 'train'"):
        data.find_split(tmp_path, "train")
    assert data.find_split(tmp_path, "train", "train_b")[1] == tmp_path / "train_b"
    write_split(tmp_path, good_content(), "train2017")
    assert data.find_split(tmp_path, "train")[1].name == "train2017"
    (tmp_path / "train2017").rename(tmp_path / "images")
    with pytest.raises(UserError, match="no image folder train2017/ or images/train2017/"):
        data.find_split(tmp_path, "train")
    (tmp_path / "images" / "train2017").mkdir()
    assert data.find_split(tmp_path, "train")[1] == tmp_path / "images" / "train2017"


def test_a_split_opens_only_with_all_of_its_image_files(tmp_path):
    write_split(tmp_path, change("images", 0, "file_name", "below/30.png")(good_content()))
    (tmp_path / "train" / "below").mkdir()
    (tmp_path / "train" / "30.png").rename(tmp_path / "train" / "below" / "30.png")
    assert len(data.open_split(tmp_path, "train")) == 4
    image = tmp_path / "train" / "20.png"
    for replace in (image.unlink, image.mkdir, lambda: image.rmdir() or image.symlink_to("none")):
        replace()
        with pytest.raises(UserError, match="20.png: no such image file"):
            data.open_split(tmp_path, "train")


@pytest.mark.parametrize("name, split, images, boxes, dropped", [
    ("bccd", "train", 292, 3943, 2), ("bccd", "val", 72, 945, 0),               # no width
    ("coco_mini", "train", 80, 739, 8), ("coco_mini", "val", 79, 624, 5)])      # crowds
def test_real_data_is_read_whole(name, split, images, boxes, dropped):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is absent")
    dataset = data.open_split(SHARED / name, split)
    assert (len(dataset), len(dataset.annotations.labels)) == (images, boxes)
    assert len(dataset.labels) == boxes - dropped
    batch = dataset[data.evaluation_batches(dataset.annotations.sizes, 4, 160, 266, True)[0]]
    assert batch.images.float().std() > 20


# --- images -------------------------------------------------------------------------------------

PHOTO = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 60).convert("RGB")
PHOTO = Image.blend(PHOTO, Image.linear_gradient("L").resize((64, 48)).convert("RGB"), 0.5)


def encoded(picture, kind="JPEG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode, kind, tolerance", [
    ("RGB", "PNG", 0), ("RGB", "JPEG", 4), ("RGB", "WEBP", 10), ("CMYK", "JPEG", 4),
    ("RGBA", "PNG", 0), ("P", "GIF", 20), ("L", "JPEG", 4), ("LA", "PNG", 0)])
def test_images_of_any_kind_are_loaded_as_rgb(tmp_path, mode, kind, tolerance):
    picture = PHOTO.convert(mode)
    if mode == "RGBA":
        picture.putalpha(0)  # transparency is dropped
    (tmp_path / "a").write_bytes(encoded(picture, kind))
    image = data.load_image(tmp_path / "a")
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    expected = np.asarray(PHOTO.convert("L").convert("RGB") if "L" in mode else PHOTO).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() <= tolerance


def test_pngs_of_16_bits_keep_their_upper_8(tmp_path):
    grey = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    Image.fromarray(grey).save(tmp_path / "a.png")
    image = data.load_image(tmp_path / "a.png").numpy()
    assert image.dtype == np.uint8 and all(np.array_equal(channel, grey >> 8) for channel in image)


JPEG, PNG = encoded(PHOTO), encoded(PHOTO, "PNG")


@pytest.mark.parametrize("content", [
    JPEG[:len(JPEG) // 2], JPEG[:-2], encoded(PHOTO, progressive=True)[:-400], b"text",
    PNG[:len(PNG) // 2], PNG[:200] + b"\x55" * 50 + PNG[250:],
    encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")])
def test_images_that_cannot_be_decoded_are_named_in_a_sentence(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a.jpg: cannot be decoded as an image \(.+\)") as error:
        data.load_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, orientation, turned", [
    ("JPEG", 6, True), ("PNG", 6, True), ("JPEG", 6, False), ("JPEG", 3, False)])
def test_exif_turns_an_image_only_where_the_json_has_the_turned_size(tmp_path, kind, orientation,
                                                                     turned):
    dataset, exif = open_good(tmp_path), Image.Exif()
    exif[0x0112] = orientation            # to be turned clockwise by 6: 90, 3: 180 degrees
    picture = Image.new("RGB", (58, 64))  # image 10 is 64 wide and 58 high
    picture.paste("white", (0, 0, 58, 20))
    stored = picture if turned else picture.resize((64, 58))
    (tmp_path / "train" / "10.png").write_bytes(encoded(stored, kind, exif=exif))
    image = dataset.image(1)
    assert image.shape == (3, 58, 64)
    at_right, at_top = (image[0, 30, 60] > 200).item(), (image[0, 5, 5] > 200).item()
    assert (at_right, at_top) == (turned, not turned)


def test_a_file_of_another_size_than_the_json_is_refused_with_both_sizes(tmp_path):
    dataset = open_good(tmp_path)
    PHOTO.save(tmp_path / "train" / "10.png")
    with pytest.raises(UserError, match=r"10.png \(image 10\): is 64 x 48 pixels, but .*"
                                        r"instances_train.json says 64 x 58"):
        dataset.image(1)


# --- sampling -----------------------------------------------------------------------------------

SIZES = np.random.default_rng(1).integers(40, 200, (53, 2))


def sampler(sizes=SIZES, images=np.arange(3, 53), long_side=133, **changes):
    config = TrainConfig(**dict(batch_size=8, seed=5, train_short_sides=(64, 80), canvas_sides=0,
                                model=ModelConfig(long_side=long_side)) | changes)
    return TrainSampler(sizes, images, config)


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = sampler(), sampler()
    global_batches = [one.global_batch(step) for step in range(20)]
    for step in (19, 3, 3, 7, 0, 12):
        assert other.global_batch(step) == global_batches[step]
    assert sampler(seed=6).global_batch(0) != global_batches[0]


@pytest.mark.parametrize("world, count", [(1, 2), (2, 2), (4, 1)])
def test_processes_and_microbatches_share_every_global_batch(world, count):
    s, steps = sampler(), range(3, 9)
    parts = [list(data.microbatches(s, steps, count, rank, world)) for rank in range(world)]
    assert {len(p) for p in parts} == {len(steps) * count}
    for n, step in enumerate(steps):
        together = [request for m in range(count) for rank in range(world)
                    for request in parts[rank][n * count + m]]
        assert together == s.global_batch(step)


def test_an_epoch_sees_every_image_and_few_twice():
    s = sampler()
    assert s.batches_per_epoch == 7
    for epoch in range(3):
        seen = [r.index for step in range(7 * epoch, 7 * epoch + 7) for r in s.global_batch(step)]
        assert sorted(set(seen)) == list(range(3, 53)) and len(seen) == 56


def test_the_only_tall_image_is_shown_as_often_as_the_wide_ones():
    sizes = np.array([[64, 48]] + [[48, 64]] * 292)
    s = sampler(sizes=sizes, images=np.arange(293), batch_size=16, train_short_sides=(64, 64))
    shown = np.bincount([r.index for step in range(50 * s.batches_per_epoch)
                         for r in s.global_batch(step)])
    assert shown.min() >= 50 and shown.max() < 62  # 51.9 on average


def test_half_of_the_images_are_flipped_and_short_sides_fill_their_range():
    s = sampler(train_short_sides=(64, 66), long_side=10_000)
    drawn = [request for step in range(200) for request in s.global_batch(step)]
    assert 0.45 < np.mean([request.flip for request in drawn]) < 0.55
    assert {min(request.size) for request in drawn} == {64, 65, 66}
    assert not any(r.flip for step in range(5) for r in sampler(flip=0.0).global_batch(step))


@pytest.mark.parametrize("size, enlarge, expected", [
    ((480, 640), True, (800, 1067)), ((640, 480), True, (1067, 800)),
    ((400, 1000), True, (533, 1333)), ((480, 640), False, (480, 640)),
    ((1, 100_000), True, (1, 1333))])
def test_the_short_side_becomes_800_unless_the_long_side_would_exceed_1333(size, enlarge, expected):
    assert data.resized(*size, 800, 1333, enlarge) == expected


@pytest.mark.parametrize("sides", [0, 1, 4])
def test_the_canvas_holds_the_global_batch_in_multiples_of_32_of_few_lengths_if_wanted(sides):
    s, lengths = sampler(canvas_sides=sides), set()
    for step in range(30):
        batch = s.global_batch(step)
        (canvas,) = {request.canvas for request in batch}
        lengths |= {*canvas}
        for side in (0, 1):
            longest = max(request.size[side] for request in batch)
            assert canvas[side] % 32 == 0 and longest <= canvas[side]
            assert canvas[side] < longest + 32 or sides
    assert len(lengths) <= (sides or 5)


def test_evaluation_sees_every_image_once_and_unflipped():
    evaluated = data.evaluation_batches(SIZES, 7, 64, 133, True)
    assert sorted(r.index for batch in evaluated for r in batch) == list(range(53))
    assert not any(request.flip for batch in evaluated for request in batch)
    assert all(len({request.canvas for request in batch}) == 1 for batch in evaluated)


# --- loading ------------------------------------------------------------------------------------

def test_a_batch_is_resized_flipped_and_padded_with_zeros(tmp_path):
    content, canvas = good_content(), (160, 128)
    del content["annotations"][2]  # now image 30 has no boxes
    dataset = open_good(tmp_path, content)
    batch = dataset[[Request(i, flip, size, canvas, ()) for i, flip, size in (
        (1, False, (116, 128)), (0, True, (78, 64)), (1, True, (58, 64)), (2, False, (68, 64)))]]
    assert batch.images.shape == (4, 3, 160, 128) and batch.images.dtype == torch.uint8
    for image, (h, w) in zip(batch.images, batch.sizes.tolist()):
        assert (image[:, h:] == 0).all() and (image[:, :, w:] == 0).all()
        assert (image[:, :h, :w] > 0).float().mean() > 0.9
    torch.testing.assert_close(batch.boxes, torch.tensor([
        [20.0, 40, 80, 110], [3, 4, 43, 44],        # twice as large
        [24, 20, 54, 55], [42.5, 2, 62.5, 22],      # flipped
        [5, 5, 14, 17]]))
    assert batch.labels.tolist() == [2, 0, 2, 0, 0]
    assert (batch.counts, batch.indices) == ([2, 0, 2, 1], [1, 0, 1, 2])
    assert torch.equal(batch.images[2, :, :58, :64].flip(2), dataset.image(1))


def test_without_a_stream_a_batch_asks_for_no_accelerator(monkeypatch):
    batch = data.Batch(*(torch.ones(1),) * 4, [1], [0])
    monkeypatch.setattr(torch.cuda, "stream", None)  # it fails on a Mac with MPS
    assert batch.to("cpu").images is batch.images


def test_a_batch_in_which_no_image_has_a_box_has_empty_tensors(tmp_path):
    content = good_content() | {"annotations": []}
    batch = open_good(tmp_path, content)[[Request(0, True, (78, 64), (96, 64), ())]]
    assert batch.boxes.shape == (0, 4) and batch.labels.shape == (0,) and batch.counts == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_until_an_error_that_stays_one_sentence(tmp_path, workers):
    dataset = open_good(tmp_path)
    requests = data.evaluation_batches(dataset.annotations.sizes, 1, 64, 99, True)
    (tmp_path / "train" / f"{dataset.annotations.image_ids[requests[3][0].index]}.png").unlink()
    loaded = data.batches(dataset, requests, workers, pin_memory=False)
    for request in requests[:3]:
        assert next(loaded).indices == [request[0].index]
    with pytest.raises(UserError, match=r"\d+.png: no such image file$") as error:
        next(loaded)
    assert error.value.__cause__ is None


def test_shared_memory_that_a_batch_would_fill_is_refused_before_it_hangs_the_workers(
        tmp_path, monkeypatch):
    dataset, free = open_good(tmp_path), 2 * 3 * 64 * 64  # for two batches of one image
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    small, large = ([Request(0, False, (48, 64), (side, side))] for side in (64, 96))
    for batch in data.batches(dataset, [small] * 3, num_workers=1, pin_memory=False):
        assert batch.indices == [0]
    for requests in ([large], [small, small, small, large]):
        with pytest.raises(UserError, match="/dev/shm: .*--num-workers 0"):
            list(data.batches(dataset, requests, num_workers=1, pin_memory=False))


def test_workers_load_for_a_thread(tmp_path):
    dataset = open_good(tmp_path)
    with ThreadPoolExecutor(1) as thread:
        (batch,) = thread.submit(lambda: list(data.batches(
            dataset, [[Request(0, False, (48, 64), (64, 64))]], 1, False))).result()
    assert batch.indices == [0]


def test_a_photo_with_a_damaged_exif_note_is_taken_as_it_is(tmp_path):
    Image.new("RGB", (9, 5), "red").save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert data.load_image(tmp_path / "a.png", apply_exif=True).shape == (3, 5, 9)


def test_a_killed_worker_is_told_where_its_batch_is_due_and_not_in_the_middle_of_a_step(
        tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LOADER_TIMEOUT", 1)
    requests = [[Request(0, False, (48, 64), (64, 64))]] * 100
    batches = data.batches(open_good(tmp_path), requests, num_workers=1, pin_memory=False)
    others = set(multiprocessing.active_children())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        torch.ones(9).sum()  # the step; the signal arrives in it
    with pytest.raises(UserError, match="loading stopped .*worker.*--num-workers 0"):
        for _ in range(99):
            next(batches)


class Fails(CocoDataset):
    def load(self, requests):
        raise KeyError("a bug")


def test_a_bug_in_loading_keeps_its_class_and_its_traceback(tmp_path):
    dataset = open_good(tmp_path)
    dataset = Fails(dataset.annotations, dataset.folder)
    with pytest.raises(KeyError, match="a bug") as raised:
        next(data.batches(dataset, [[Request(0, False, (48, 64), (64, 64))]], 1, False))
    assert "in load" in raised.value.__notes__[0]
