"""From pixels to boxes: the configuration, the network, decoding by hand, and checkpoints.

test_import_weights.py compares the whole network with torchvision and maskrcnn-benchmark.
"""

import copy
import math
import re
from argparse import Namespace
from dataclasses import asdict, dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import model as our
from assign import make_locations
from conftest import greedy_nms
from data import UserError
from model import BACKBONES, FCOS, ModelConfig, Outputs, detect

SMALL = ModelConfig(num_classes=3, backbone="resnet18", channels=32, tower_depth=1)


def small_model(**changes):
    """A small detector whose frozen norms do something."""
    model = FCOS(replace(SMALL, **changes))
    for norm in model.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.running_mean.normal_(0, 0.1)
            norm.bias.normal_(0, 0.1)
    return model


# --- configuration ------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("channels", 12), ("num_classes", 0), ("frozen_stages", 6), ("short_side", 10**12),
    ("nms_iou", math.nan), ("nms_iou", 1.01), ("pixel_std", (0, 1, 1)), ("pixel_mean", [1, 2, 3]),
    ("pixel_mean", (1, 2)), ("short_side", "800"), ("max_detections", True), ("enlarge", 1),
    ("backbone", "nonsense"), ("box_unit", None)])
def test_a_value_of_another_type_or_out_of_range_is_refused_in_a_sentence(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*must be") as error:
        ModelConfig(**{name: value})
    assert "\n" not in str(error.value)


def test_fields_added_since_take_their_defaults_with_a_notice_and_need_only_their_line(capsys):
    @dataclass(frozen=True)
    class Extended(ModelConfig):
        x: int = 3

    values = asdict(SMALL)
    del values["nms_iou"]
    assert our.config_from_dict(Extended, values, "old.pt").x == 3
    notice = capsys.readouterr().out
    assert notice.count("\n") == 1 and "nms_iou = 0.6, x = 3" in notice
    assert our.config_from_dict(ModelConfig, asdict(SMALL), "new.pt") == SMALL
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--x -1"):
        Extended(x=-1)


# --- the network --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_builds_with_the_channels_that_it_says(name):
    with torch.device("meta"):
        backbone = our.Backbone(ModelConfig(backbone=name))
        features = backbone(torch.empty(1, 3, 64, 96))
    assert [f.shape[1] for f in features] == backbone.channels
    assert [f.shape[2:] for f in features] == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("norm, stages", [("frozen_batch", 2), ("group", 0), ("frozen_batch", 5)])
def test_frozen_stages_have_no_gradient_and_all_else_has(norm, stages):
    model = small_model(frozen_stages=stages, backbone_norm=norm)
    sum(x.float().sum() for x in model(torch.rand(1, 3, 128, 128) * 255)).backward()
    frozen = (("conv1.", "bn1."), "layer1.", "layer2.", "layer3.", "layer4.")[:stages]
    for name, parameter in model.named_parameters():
        expected = not any(map(name.removeprefix("backbone.body.").startswith, frozen))
        assert parameter.requires_grad == expected == (parameter.grad is not None), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_frozen_norm_is_torchvision_s_in_place_and_in_the_precision_of_its_input(dtype):
    norm, theirs = our.FrozenNorm(8), FrozenBatchNorm2d(8)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    theirs.load_state_dict(norm.state_dict())
    x = torch.randn(2, 8, 4, 4).to(dtype)
    expected = theirs(x)
    assert norm(x) is x and x.dtype == dtype
    rounded_twice = {"atol": 0.1, "rtol": 0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(x, expected.to(dtype), **rounded_twice)


def test_a_group_norm_keeps_bfloat16_where_autocast_makes_it_float32(monkeypatch):
    group_norm, x = F.group_norm, torch.randn(2, 16, 4, 4).bfloat16()
    monkeypatch.setattr(F, "group_norm", lambda x, *args: group_norm(x.float(), *args))  # a GPU's
    norm = our.GroupNorm(2, 16)
    assert norm(x).dtype == torch.bfloat16 and norm(x.float()).dtype == torch.float32
    assert torch.equal(norm(x), group_norm(x.float(), 2).bfloat16())


def test_folded_norms_equal_unfolded_ones():
    model = small_model(backbone="resnet50").eval()
    folded, images = copy.deepcopy(model), torch.randint(0, 256, (1, 3, 64, 96))
    our.fold_frozen_norms(folded)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        for a, b in zip(folded.double()(images), model.double()(images)):
            torch.testing.assert_close(a, b)


def test_bfloat16_weights_decode_in_float32():
    model = small_model()
    for part in (model.backbone, model.fpn, model.head):
        part.bfloat16()
    outputs = model(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    assert [x.dtype for x in outputs] == [torch.bfloat16, torch.float32, torch.float32]


def test_padding_is_exactly_zero_after_normalization():
    images, sizes = torch.full((2, 3, 8, 12), 200, dtype=torch.uint8), [[8, 12], [5, 7]]
    x = small_model().normalize(images, torch.tensor(sizes))
    assert (x[0] != 0).all() and (x[1, :, :5, :7] != 0).all()
    assert (x[1, :, 5:] == 0).all() and (x[1, :, :, 7:] == 0).all()
    expected = [(200 - m) / s for m, s in zip(SMALL.pixel_mean, SMALL.pixel_std)]
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor(expected))


def test_the_head_starts_with_std_001_bias_0_and_prior_001():
    head = our.Head(ModelConfig())
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            assert abs(module.weight.std() - 0.01) < 5e-4 and abs(module.weight.mean()) < 1e-3, name
            bias = math.log(0.01 / 0.99) if name == "cls_logits" else 0.0
            torch.testing.assert_close(module.bias, torch.full_like(module.bias, bias))
    groups = [module.num_groups for module in head.modules() if isinstance(module, nn.GroupNorm)]
    assert groups == [32] * 8


# --- decoding -----------------------------------------------------------------------------------

CONFIG = ModelConfig(num_classes=3)


def outputs_with(*found, size=(128, 128), N=1):
    """Background, but for (image, level, row, column, label, class score, centerness, ltrb)."""
    locations = make_locations(*size)
    L = len(locations.xy)
    outputs = Outputs(torch.full((N, L, 3), -20.0), torch.ones(N, L, 4), torch.zeros(N, L))
    for n, level, row, column, label, score, centerness, ltrb in found:
        at = locations.first[level] + row * locations.grids[level][0] + column
        outputs.logits[n, at, label] = math.log(score / (1 - score))
        outputs.centerness[n, at] = math.log(centerness / (1 - centerness))
        outputs.ltrb[n, at] = torch.tensor(ltrb, dtype=torch.float32)
    return outputs, locations


def detect_one(*found, size=(128, 128), **changes):
    outputs, locations = outputs_with(*found)
    (d,) = detect(outputs, locations, [size], replace(CONFIG, **changes))
    assert d.boxes.shape == (len(d.scores), 4) and d.labels.dtype == torch.int64
    return d


def test_a_hand_worked_detection():
    d = detect_one((0, 0, 2, 3, 1, 0.8, 0.5, (1, 2, 3, 4)),       # at (28, 20)
                   (0, 2, 0, 1, 2, 0.9, 0.9, (8, 16, 32, 64)))    # at (48, 16); its top is at 0
    assert d.boxes.tolist() == [[40, 0, 80, 80], [27, 18, 31, 24]]
    torch.testing.assert_close(d.scores, torch.tensor([0.81, 0.4]))
    assert d.labels.tolist() == [2, 1]
    assert len(detect_one().scores) == 0


def test_locations_in_the_padding_find_no_box_without_area():
    inside = (0, 0, 2, 3, 1, 0.8, 0.5, (1, 2, 3, 4))
    right = (0, 0, 2, 12, 1, 0.9, 0.9, (3, 3, 3, 3))   # at (100, 20), the image ends at x = 64
    below = (0, 0, 12, 2, 1, 0.9, 0.9, (3, 3, 3, 3))   # at (20, 100), the image ends at y = 80
    over_the_edge = (0, 0, 0, 8, 0, 0.7, 0.9, (6, 3, 3, 3))  # at (68, 4): the box begins at 62
    d = detect_one(inside, right, below, over_the_edge, size=(80, 64))
    assert d.boxes.tolist() == [[62, 1, 64, 7], [27, 18, 31, 24]]
    outputs, locations = outputs_with(right)
    boxes, scores, _ = our.candidates(outputs, locations, torch.tensor([[80, 64]]), CONFIG)
    assert (scores == 0).all()


def test_the_threshold_is_on_the_class_score_or_on_the_final_score():
    """The square root is taken after the class score was compared, before the final one is."""
    found = [(0, 0, 0, 0, 0, 0.06, 0.01, (1, 1, 1, 1)), (0, 0, 9, 9, 0, 0.04, 0.99, (1, 1, 1, 1))]
    assert detect_one(*found).scores.tolist() == pytest.approx([0.06 * 0.01])
    assert detect_one(*found, threshold_on="final").scores.tolist() == []
    lower = detect_one(*found, threshold_on="final", score_threshold=0.03, sqrt_score=True)
    assert lower.scores.tolist() == pytest.approx([math.sqrt(0.04 * 0.99)])
    root = detect_one(*found, sqrt_score=True)
    assert root.scores.tolist() == pytest.approx([math.sqrt(0.06 * 0.01)])


def test_a_box_suppresses_the_poorer_ones_of_its_class_and_image_alone():
    near = (20, 20, 20, 20)  # neighbours overlap by 32 / 48
    found = [(0, 0, 5, 5, 0, 0.9, 0.9, near), (0, 0, 5, 6, 0, 0.8, 0.9, near),
             (0, 0, 6, 5, 1, 0.7, 0.9, near)]
    assert detect_one(*found).labels.tolist() == [0, 1]
    assert detect_one(*found, nms_iou=0.67).labels.tolist() == [0, 0, 1]
    outputs, locations = outputs_with(found[0], (1, *found[1][1:]), N=2)
    d = detect(outputs, locations, [(128, 128)] * 2, CONFIG)
    assert [len(image.boxes) for image in d] == [1, 1]


def test_nms_of_a_chain_of_ties_and_of_padding():
    chain = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])  # neighbours: IoU 0.43
    same, falling, tied = chain[[0, 0, 0]], torch.tensor([3.0, 2, 1]), torch.ones(3)
    for boxes, scores, groups, iou_threshold, survivors in [
            (chain, falling, [0, 0, 0], 0.4, [0, 2]),  # a suppressed box suppresses nothing
            (chain, falling, [0, 0, 0], 0.5, [0, 1, 2]),
            (chain, falling, [0, 1, 0], 0.4, [0, 1, 2]),
            (same, tied, [0, 0, 0], 0.5, [0]),  # the lower index wins
            (same, tied, [1, 0, 0], 0.5, [0, 1]),
            (same, falling, [-1, 0, -1], 0.5, [1]),  # padding neither survives nor suppresses
            (same, falling, [-1, -2, -1], 0.5, [])]:
        for nms in (our.nms_mask, greedy_nms):
            keep = nms(boxes, scores, torch.tensor(groups), iou_threshold)
            assert keep.nonzero()[:, 0].tolist() == survivors, (scores, groups, iou_threshold)


def test_nms_of_many_groups_equals_nms_of_each_group_bit_for_bit():
    boxes, scores = torch.rand(600, 4) * 30 + torch.tensor([0, 0, 30, 30]), torch.rand(600)
    boxes[::50] = torch.tensor([1300.0, 700, 1333, 800])  # equal boxes in several groups
    groups = torch.randint(-1, 5, (600,)) * 9_999_999     # negative: padding
    kept = our.nms_mask(boxes, scores, groups, 0.6)
    assert kept.equal(greedy_nms(boxes.double(), scores, groups, 0.6))
    assert 0 < kept.sum() < (groups >= 0).sum()


@pytest.mark.parametrize("k", [3, 50, 5_000])
def test_looking_at_the_best_locations_alone_finds_what_looking_at_all_finds(k):
    config = ModelConfig(num_classes=7, candidates_per_level=k, score_threshold=0.4,
                         max_detections=100)
    locations, N, C = make_locations(128, 256), 2, 7
    L = len(locations.xy)
    ltrb = torch.rand(N, L, 4) * 0.1  # boxes that do not overlap
    outputs = Outputs(torch.randn(N, L, C), ltrb, torch.randn(N, L))
    for n, d in enumerate(detect(outputs, locations, [(128, 256)] * N, config)):
        score = outputs.logits[n].sigmoid()
        final = torch.where(score > 0.4, score * outputs.centerness[n].sigmoid()[:, None], 0.0)
        levels = final.split([W * H for W, H in locations.grids])
        best = torch.cat([level.flatten().sort(descending=True).values[:k] for level in levels])
        expected = best[best > 0].sort(descending=True).values[:100]
        assert len(expected) == 100 or k == 3
        torch.testing.assert_close(d.scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spacing", ["stride", "even"])
def test_decoding_has_no_host_device_sync(spacing):
    outputs, _ = outputs_with((0, 0, 2, 3, 1, 0.8, 0.5, (1, 2, 3, 4)))
    outputs, sizes = Outputs(*(x.cuda() for x in outputs)), torch.tensor([[128, 128]]).cuda()
    locations = make_locations(128, 128, device="cuda")
    config = replace(CONFIG, location_spacing=spacing)

    def count():
        return our.suppress(*our.candidates(outputs, locations, sizes, config), config)[3]

    count()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = count()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == [1]


# --- checkpoints --------------------------------------------------------------------------------

def checkpoint_of(state, **changes):
    return {"format": our.CHECKPOINT_FORMAT, "step": 7, "model": state,
            "config": {"model": asdict(SMALL)},
            "categories": {"ids": [1, 2, 3], "names": ["a", "b", "c"]}} | changes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A detector and the bytes of its checkpoint."""
    torch.manual_seed(0)
    model, file = small_model(), tmp_path_factory.mktemp("saved") / "model.pt"
    our.atomic_write(file, lambda f: torch.save(checkpoint_of(model.state_dict()), f))
    return model, file.read_bytes()


def test_a_checkpoint_rebuilds_its_detector(saved, tmp_path):
    model, content = saved
    (tmp_path / "model.pt").write_bytes(content)
    checkpoint = our.load_checkpoint(tmp_path / "model.pt")
    rebuilt, images = our.build_model(checkpoint), torch.rand(1, 3, 64, 64) * 255
    assert rebuilt.config == model.config and checkpoint["step"] == 7
    assert all(torch.equal(a, b) for a, b in zip(rebuilt(images), model(images)))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(saved, tmp_path, capsys):
    (tmp_path / "checkpoint-0000007.pt").write_bytes(saved[1])
    (tmp_path / "checkpoint-0000009.pt").write_bytes(saved[1][:-1000])
    assert our.load_checkpoint(tmp_path)["step"] == 7
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "checkpoint-0000009.pt: damaged" in told
    (tmp_path / "checkpoint-0000007.pt").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint-0000007.pt: damaged"):
        our.load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no checkpoint-"):
        our.load_checkpoint(tmp_path.parent)


@pytest.mark.parametrize("changes, says", [
    (dict(format=2), "not a checkpoint of this version.*tools/import_weights.py"),
    (dict(model=None), "not a checkpoint of this version"),
    (dict(config={"model": asdict(SMALL) | {"warp": 1}}), r"does not know \(warp\)"),
    (dict(config={"model": asdict(SMALL) | {"num_classes": 4}}), "not a checkpoint of this"),
    (dict(config={}), "not a checkpoint of this version")])
def test_a_checkpoint_that_cannot_be_used_is_refused_in_a_sentence(tmp_path, changes, says):
    torch.save(checkpoint_of({}) | changes, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"model.pt: .*{says}"):
        our.load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_needs_pickle_is_refused_with_the_reason(tmp_path, zipped):
    torch.save({"model": {"a": torch.ones(1)}, "args": Namespace(lr=1)}, tmp_path / "run.pth",
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"run.pth: holds a Python object \(argparse.*any code"):
        our.read_archive(tmp_path / "run.pth")


def test_files_of_something_else_and_absent_ones_are_refused(tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    torch.save(torch.ones(1), tmp_path / "tensor.pth")
    for name, says in (("page", "damaged, or not a PyTorch file"), ("tensor", "holds a Tensor"),
                       ("absent", "no such file")):
        with pytest.raises(UserError, match=f"{name}.pth: {says}"):
            our.read_archive(tmp_path / f"{name}.pth")


def test_a_bit_that_flips_in_a_file_is_noticed_or_means_nothing(tmp_path):
    file, state = tmp_path / "model.pt", nn.Conv2d(2, 3, 3).state_dict()
    torch.save({"model": state}, file)
    content, noticed = file.read_bytes(), []
    flips = [(at, 1 << at % 8) for at in range(0, len(content), 5)]
    # A record marked as a folder would be read as empty.
    folders = [(match.start() + 38, 0x10) for match in re.finditer(b"PK\1\2", content)]
    for at, bit in flips + folders:
        mutated = bytearray(content)
        mutated[at] ^= bit
        file.write_bytes(mutated)
        try:
            loaded = our.read_archive(file)["model"]
            assert loaded.keys() == state.keys(), (at, bit)
            assert all(torch.equal(loaded[key], state[key]) for key in state), (at, bit)
            noticed.append(False)
        except UserError as error:
            assert str(error).startswith(f"{file}: damaged, or not a PyTorch file")
            noticed.append(True)
    assert sum(noticed) > 200 and folders and all(noticed[-len(folders):])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def full_disk(file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    (tmp_path / "model.pt").write_text("old")
    with pytest.raises(UserError, match="model.pt: cannot be written .*No space left.*free some"):
        our.atomic_write(tmp_path / "model.pt", full_disk)
    with pytest.raises(UserError, match="nowhere/model.pt: cannot be written"):
        our.atomic_write(tmp_path / "nowhere" / "model.pt", lambda file: None)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt", "old")]


# --- backbone weights ---------------------------------------------------------------------------

def test_backbone_weights_are_those_of_torchvision_s_classifier_or_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    file = str(tmp_path / "resnet18.pth")
    torch.save(state, file)
    body = our.Backbone(SMALL, file).body.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in body.items())
    with pytest.raises(UserError, match="resnet18.pth does not fit a resnet50") as error:
        our.Backbone(ModelConfig(), file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    for config in (ModelConfig(backbone="resnet10"), ModelConfig(backbone_norm="group")):
        with pytest.raises(UserError, match="no ImageNet weights .+ --backbone-weights none"):
            our.Backbone(config, "imagenet")


def test_without_network_imagenet_weights_say_what_to_do(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"https://\S+/resnet18-\S+.pth could not be downloaded "
                                        r"\(no network\); .*--backbone-weights FILE"):
        our.Backbone(SMALL, "imagenet")
