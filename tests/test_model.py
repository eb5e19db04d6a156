"""The network against torchvision's and against maskrcnn-benchmark's formulas; decoding by hand; weights from elsewhere."""

import copy
import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2.functional import resize

import model as our
from assign import STRIDES, make_locations
from model import (BACKBONES, FCOS, ConfigError, Detector, FrozenNormConv2d, ModelConfig, Outputs, convert, detect, evenly_spaced,
                   import_checkpoint, inference_copy, load_weights)

COCO_MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"
SMALL = ModelConfig(num_classes=3, backbone="resnet18", channels=32, tower_depth=1)


def randomize_norms(module):
    """Statistics of no special value, with variances so small that the eps matters."""
    for norm in module.modules():
        if isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            norm.running_var.uniform_(1e-4, 3e-4)
            norm.weight.data.uniform_(0.005, 0.015)
            norm.running_mean.normal_(0, 0.005)
            norm.bias.data.normal_(0, 0.1)


def small_model(**changes):
    """A small detector whose folded norms do something."""
    model = FCOS(replace(SMALL, **changes))
    for module in model.modules():
        if isinstance(module, FrozenNormConv2d):
            module.scale.uniform_(0.5, 1.5)
            module.shift.normal_(0, 0.1)
    return model


# --- the network ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_builds_with_the_channels_that_it_says(name):
    with torch.device("meta"):
        backbone = our.Backbone(ModelConfig(backbone=name))
        features = backbone(torch.empty(1, 3, 64, 96))
    assert [f.shape[1] for f in features] == backbone.out_channels
    assert [f.shape[2:] for f in features] == [(8, 12), (4, 6), (2, 3)]


def test_the_stride_moves_to_the_1x1_of_bottlenecks_and_blocks_without_one_stay():
    with torch.device("meta"):
        moved = FCOS(ModelConfig(stride_in_1x1=True)).backbone.resnet.layer2[0]
        basic = FCOS(replace(SMALL, stride_in_1x1=True)).backbone.resnet.layer2[0]
    assert (moved.conv1.stride, moved.conv2.stride) == ((2, 2), (1, 1))
    assert (basic.conv1.stride, basic.conv2.stride) == ((2, 2), (1, 1))


def test_a_folded_convolution_equals_convolution_and_frozen_norm_in_value_and_in_gradient():
    conv, norm = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False).double(), FrozenBatchNorm2d(8).double()
    for buffer in norm.buffers():
        buffer.uniform_(0.2, 2)
    folded = FrozenNormConv2d(copy.deepcopy(conv), norm)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    weights = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    (weights * norm(conv(x))).sum().backward()
    (weights * folded(x)).sum().backward()
    torch.testing.assert_close(folded(x), norm(conv(x)))
    torch.testing.assert_close(folded.weight.grad, conv.weight.grad)
    assert [name for name, _ in folded.named_parameters()] == ["weight"]


@pytest.mark.parametrize("stages", [0, 1, 2, 5])
def test_frozen_stages_have_no_gradient_and_all_else_has(stages):
    model = small_model(frozen_stages=stages)
    sum(part.float().sum() for part in model(torch.rand(1, 3, 128, 128) * 255)).backward()
    frozen = ("conv1.", "layer1.", "layer2.", "layer3.", "layer4.")[:stages]
    for name, parameter in model.named_parameters():
        expected = not name.removeprefix("backbone.resnet.").startswith(frozen or "none")
        assert parameter.requires_grad == expected == (parameter.grad is not None), name


def test_an_inference_copy_in_bf16_decodes_in_float32():
    folded = inference_copy(small_model(), torch.bfloat16)
    outputs = folded(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    assert [part.dtype for part in outputs] == [torch.bfloat16, torch.float32, torch.float32]
    assert folded.scales.dtype == torch.float32
    assert not any(isinstance(module, FrozenNormConv2d) for module in folded.modules())


def test_padding_is_exactly_zero_after_normalization():
    x = small_model().normalize(torch.full((2, 3, 8, 12), 200, dtype=torch.uint8), torch.tensor([[8, 12], [5, 7]]))
    assert (x[0] != 0).all() and (x[1, :, :5, :7] != 0).all()
    assert (x[1, :, 5:] == 0).all() and (x[1, :, :, 7:] == 0).all()
    torch.testing.assert_close(x[0, :, 0, 0], (200 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375]))


def test_p6_is_made_from_p5_and_p7_from_rectified_p6():
    model = small_model()
    c3, c4, c5 = model.backbone(torch.randn(1, 3, 128, 128))
    p3, p4, p5, p6, p7 = model.fpn({"p3": c3, "p4": c4, "p5": c5}).values()
    extra = model.fpn.extra_blocks
    torch.testing.assert_close(p6, F.conv2d(p5, extra.p6.weight, extra.p6.bias, stride=2, padding=1))
    torch.testing.assert_close(p7, F.conv2d(p6.relu(), extra.p7.weight, extra.p7.bias, stride=2, padding=1))


@pytest.mark.parametrize("unit", ["pixel", "stride"])
def test_each_level_has_its_own_scale(unit):
    model = small_model(box_unit=unit)
    images, levels = torch.rand(1, 3, 128, 128) * 255, [256, 64, 16, 4, 1]
    model.head.box_pred.bias.data.fill_(0.5)
    before = model(images).ltrb.split(levels, dim=1)
    model.scales.data[2] = 3.0
    after = model(images).ltrb.split(levels, dim=1)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, True, False, True, True]
    torch.testing.assert_close(after[2], before[2] ** 3 if unit == "pixel" else before[2] * 3)
    after[2].sum().backward()
    assert (model.scales.grad != 0).tolist() == [False, False, True, False, False]


def test_the_head_starts_with_std_001_bias_0_and_prior_001():
    head = our.Head(ModelConfig())
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            assert abs(module.weight.std().item() - 0.01) < 5e-4 and abs(module.weight.mean().item()) < 1e-3, name
            prior = torch.sigmoid(module.bias) if name == "cls_logits" else module.bias
            assert torch.allclose(prior, torch.full_like(prior, 0.01 if name == "cls_logits" else 0.0)), name
    assert [m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)] == [32] * 8


@pytest.mark.parametrize("on_box_tower", [False, True])
def test_centerness_comes_from_the_tower_that_the_configuration_says(on_box_tower):
    model = small_model(centerness_on_box_tower=on_box_tower)
    model(torch.rand(1, 3, 64, 64)).centerness.sum().backward()
    assert (model.head.box_tower[0].weight.grad is not None) == on_box_tower
    assert (model.head.cls_tower[0].weight.grad is None) == on_box_tower


@pytest.mark.parametrize("size", [(128, 256), (160, 224)])
def test_outputs_stand_in_the_order_of_the_locations(size):
    """With a pyramid of coordinates, and a head that hands them through, outputs are the locations."""
    class Coordinates(nn.Module):
        def forward(self, _):
            xs = [(torch.arange(math.ceil(size[1] / s)) + 0.5) * s for s in STRIDES]
            ys = [(torch.arange(math.ceil(size[0] / s)) + 0.5) * s for s in STRIDES]
            grids = [torch.stack(torch.meshgrid(x, y, indexing="xy"))[None] for x, y in zip(xs, ys)]  # (1, 2, H, W)
            return dict(enumerate(grids))

    class HandThrough(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_logits = nn.Conv2d(1, 1, 1)

        def forward(self, p):
            return p, torch.cat([p, p], 1) / 1e3, p[:, 1:]

    model = small_model()
    model.fpn, model.head = Coordinates(), HandThrough()
    outputs, locations = model(torch.zeros(1, 3, *size)), make_locations(*size)
    assert torch.equal(outputs.logits[0], locations.xy)
    assert torch.equal(outputs.centerness[0], locations.xy[:, 1])
    torch.testing.assert_close(outputs.ltrb[0].log() * 1e3, locations.xy.repeat(1, 2), rtol=1e-4, atol=1e-3)


# --- decoding ---------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(num_classes=3)


def logit(p):
    return math.log(p / (1 - p))


def outputs_with(*found, C=3, size=(128, 128), N=1):
    """Outputs of background, but for (image, level, row, column, label, class score, centerness, ltrb)."""
    locations = make_locations(*size)
    L = len(locations.xy)
    outputs = Outputs(torch.full((N, L, C), -20.0), torch.ones(N, L, 4), torch.zeros(N, L))
    for n, level, row, column, label, score, centerness, ltrb in found:
        place = sum(g.height * g.width for g in locations.levels[:level]) + row * locations.levels[level].width + column
        outputs.logits[n, place, label], outputs.centerness[n, place] = logit(score), logit(centerness)
        outputs.ltrb[n, place] = torch.tensor(ltrb, dtype=torch.float32)
    return outputs, locations


def detect_one(*found, config=CONFIG, size=(128, 128), image_size=None, C=3):
    outputs, locations = outputs_with(*found, C=C, size=size)
    (d,) = detect(outputs, locations, [image_size or size], config)
    assert d.boxes.shape == (len(d.scores), 4) and d.labels.dtype == torch.int64
    return d


def test_a_hand_worked_detection():
    d = detect_one((0, 0, 2, 3, 1, 0.8, 0.5, (1, 2, 3, 4)), (0, 2, 0, 1, 2, 0.9, 0.9, (8, 16, 32, 64)))
    assert d.boxes.tolist() == [[40, 0, 80, 80], [27, 18, 31, 24]]  # from (48, 16), its top at 0; from (28, 20)
    torch.testing.assert_close(d.scores, torch.tensor([0.81, 0.4]))
    assert d.labels.tolist() == [2, 1]


def test_boxes_are_clipped_to_each_image_not_to_the_padded_batch():
    outputs, locations = outputs_with((0, 1, 3, 3, 0, 0.9, 0.9, (90, 90, 90, 90)), (1, 1, 3, 3, 0, 0.9, 0.9, (90, 90, 90, 90)), N=2)
    a, b = detect(outputs, locations, torch.tensor([[128, 128], [60, 100]]), CONFIG)
    assert a.boxes.tolist() == [[0, 0, 128, 128]] and b.boxes.tolist() == [[0, 0, 100, 60]]  # x1 = w, y1 = h


def test_the_threshold_is_on_the_class_score_or_on_the_final_score():
    found = [(0, 0, 0, 0, 0, 0.06, 0.01, (1, 1, 1, 1)), (0, 0, 9, 9, 0, 0.04, 0.99, (1, 1, 1, 1))]
    assert detect_one(*found).scores.tolist() == pytest.approx([0.06 * 0.01])
    assert detect_one(*found, config=replace(CONFIG, threshold_on="final")).scores.tolist() == []
    both = replace(CONFIG, threshold_on="final", score_threshold=0.03, sqrt_score=True)
    assert detect_one(*found, config=both).scores.tolist() == pytest.approx([math.sqrt(0.04 * 0.99)])


def test_the_square_root_is_taken_after_the_threshold_on_the_class_score():
    found = [(0, 0, 0, 0, 0, 0.04, 0.9, (1, 1, 1, 1)), (0, 0, 9, 9, 0, 0.09, 0.25, (1, 1, 1, 1))]
    assert detect_one(*found, config=replace(CONFIG, sqrt_score=True)).scores.tolist() == pytest.approx([0.15])


def test_a_box_suppresses_the_poorer_ones_of_its_class_and_image_alone():
    near = (20, 20, 20, 20)
    found = [(0, 0, 5, 5, 0, 0.9, 0.9, near), (0, 0, 5, 6, 0, 0.8, 0.9, near), (0, 0, 6, 5, 1, 0.7, 0.9, near)]  # IoU 32/48
    assert detect_one(*found).labels.tolist() == [0, 1]
    assert detect_one(*found, config=replace(CONFIG, nms_iou=0.67)).labels.tolist() == [0, 0, 1]
    outputs, locations = outputs_with(found[0], (1, *found[1][1:]), N=2)
    assert [len(d.boxes) for d in detect(outputs, locations, [(128, 128)] * 2, CONFIG)] == [1, 1]


def test_the_best_100_of_an_image_remain():
    found = [(0, 0, i // 16, i % 16, 0, 0.1 + i / 256, 0.9, (2, 2, 2, 2)) for i in range(150)]
    d = detect_one(*found)
    torch.testing.assert_close(d.scores, torch.tensor([0.9 * (0.1 + i / 256) for i in range(149, 49, -1)]))


def test_top_k_is_taken_in_each_level():
    found = [(0, 0, i, 0, i % 2, 0.9 - i / 100, 0.9, (2, 2, 2, 2)) for i in range(5)] + [(0, 3, 0, 0, 0, 0.1, 0.9, (9, 9, 9, 9))]
    found += [(0, 0, 0, 0, 2, 0.895, 0.9, (2, 2, 2, 2))]  # a second class at the best location
    d = detect_one(*found, config=replace(CONFIG, candidates_per_level=2))
    assert d.scores.tolist() == pytest.approx([0.81, 0.8055, 0.09], abs=1e-5)


def test_no_detection_at_all_gives_empty_tensors():
    d = detect_one()
    assert (d.boxes.shape, d.scores.shape, d.labels.shape) == ((0, 4), (0,), (0,))


@pytest.mark.parametrize("N,C", [(1, 1), (2, 1), (2, 7)])
@pytest.mark.parametrize("most", [3, 50, 100_000])
def test_looking_only_at_the_best_locations_finds_what_looking_at_all_finds(N, C, most):
    config = ModelConfig(num_classes=C, candidates_per_level=most, score_threshold=0.4, max_detections=10_000)
    locations = make_locations(96, 160)
    L = len(locations.xy)
    outputs = Outputs(torch.randn(N, L, C), torch.rand(N, L, 4) * 0.1, torch.randn(N, L))  # boxes that do not overlap
    for n, d in enumerate(detect(outputs, locations, [(96, 160)] * N, config)):
        score = outputs.logits[n].sigmoid()
        final = torch.where(score > 0.4, score * outputs.centerness[n].sigmoid()[:, None], 0.0)
        levels = final.split([level.height * level.width for level in locations.levels])
        expected = torch.cat([level.flatten().sort(descending=True).values[:most] for level in levels])
        expected = expected[expected > 0].sort(descending=True).values
        torch.testing.assert_close(d.scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_does_not_wait_for_the_gpu():
    outputs, locations = outputs_with((0, 0, 2, 3, 1, 0.8, 0.5, (1, 2, 3, 4)))
    outputs, sizes = Outputs(*(x.cuda() for x in outputs)), torch.tensor([[128, 128]]).cuda()
    locations = make_locations(128, 128, device="cuda")
    for config in (CONFIG, replace(CONFIG, location_spacing="even")):
        our.suppress(*our.candidates(outputs, locations, sizes, config), config)  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            count = our.suppress(*our.candidates(outputs, locations, sizes, config), config)[3]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert count.tolist() == [1]


def assert_same_detections(found, expected, atol=0.0):
    for a, b in zip(found, expected, strict=True):
        assert len(a.scores) == len(b.scores) > 0 and a.labels.equal(b.labels.cpu())
        torch.testing.assert_close(a.scores, b.scores.cpu(), rtol=0, atol=atol)
        torch.testing.assert_close(a.boxes, b.boxes.cpu(), rtol=0, atol=atol * 100)


def detector_that_finds_things():
    model = small_model(score_threshold=1e-3).eval()
    nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    images, sizes = torch.randint(0, 256, (3, 3, 96, 128), dtype=torch.uint8), torch.tensor([[96, 128], [64, 128], [96, 50]])
    return model, images, sizes


def test_a_detector_finds_what_detect_finds_in_the_outputs_of_the_model():
    model, images, sizes = detector_that_finds_things()
    with torch.no_grad():
        expected = detect(model(images, sizes), make_locations(96, 128), sizes, model.config)
    assert_same_detections(Detector(model, torch.device("cpu"), "fp32")(images, sizes), expected, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_cuda_graphs_find_what_the_first_call_of_a_shape_found():
    model, images, sizes = detector_that_finds_things()
    detector = Detector(model.cuda(), torch.device("cuda"), "fp32")
    first = {shape: detector(images[:, :, :shape[0], :shape[1]], sizes.clamp(max=shape[0])) for shape in ((96, 128), (64, 96))}
    for _ in range(3):
        for shape, expected in first.items():
            assert_same_detections(detector(images[:, :, :shape[0], :shape[1]], sizes.clamp(max=shape[0])), expected, atol=1e-5)
    assert len(detector.graphs) == 2 and None not in detector.graphs.values()
    other = detector(images.flip(0), sizes.flip(0))  # what is replayed depends on the input, not on what was captured
    assert_same_detections(other, first[96, 128][::-1], atol=1e-4)


def test_an_exported_detector_runs_without_this_code_on_any_batch_and_finds_the_same(tmp_path):
    model, images, sizes = detector_that_finds_things()
    our.export(model, {"ids": [1, 2, 3], "names": ["a", "b", "c"]}, tmp_path / "model.pt2", 96, 128)
    torch.save((images, sizes), tmp_path / "input.pt")
    script = """import sys, json, torch, torchvision
extra = {"categories.json": ""}
module = torch.export.load("model.pt2", extra_files=extra).module()
images, sizes = torch.load("input.pt")
torch.save([module(images[:n], sizes[:n]) for n in (1, 3)], "output.pt")
assert json.loads(extra["categories.json"])["names"] == ["a", "b", "c"] and "model" not in sys.modules and "csrc" not in sys.modules"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    expected = Detector(model, torch.device("cpu"), "fp32")(images, sizes)
    for n, found in zip((1, 3), torch.load(tmp_path / "output.pt")):
        assert_same_detections(our.cut(*found), expected[:n], atol=1e-5)


def test_the_export_command_takes_the_checkpoint_beside_the_file(tmp_path, monkeypatch, capsys):
    model, *_ = detector_that_finds_things()
    torch.save({"format": our.CHECKPOINT_FORMAT, "step": 1, "model": model.state_dict(), "config": {"model": asdict(model.config), "data": "", "val_split": ""},
                "categories": {"ids": [1, 2, 3], "names": ["a", "b", "c"]}}, tmp_path / "checkpoint-0000001.pt")
    run_main(monkeypatch, "--export", tmp_path / "model.pt2", "--size", 64, 96)
    assert "images of 64 x 96, a, b, c" in capsys.readouterr().out
    boxes, scores, labels, count = torch.export.load(tmp_path / "model.pt2").module()(torch.zeros(1, 3, 64, 96, dtype=torch.uint8),
                                                                                    torch.tensor([[64, 96]]))
    assert boxes.shape[::2] == (1, 4) and scores.shape == labels.shape == boxes.shape[:2] and count.shape == (1,)


def test_an_onnx_export_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    model, *_ = detector_that_finds_things()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript"):
        our.export(model, {}, tmp_path / "model.onnx", 96, 128)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(32, 32), (224, 352), (800, 1216), (800, 1344), (1088, 800), (128, 256)])
def test_evenly_spaced_locations_are_the_centres_of_torchvision_s_anchors(size):
    features = [torch.zeros(1, 1, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in STRIDES]
    generator = AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * 5)
    (anchors,) = generator(ImageList(torch.zeros(1, 3, *size), [size]), features)
    locations = make_locations(*size, offset=0)
    assert torch.equal(evenly_spaced(locations), (anchors[:, :2] + anchors[:, 2:]) / 2)
    assert torch.equal(evenly_spaced(locations), locations.xy) == (size in [(32, 32), (128, 256)])


# --- torchvision's detector -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def theirs():
    """torchvision's FCOS with random weights and statistics, under which a few hundred candidates pass its threshold."""
    torch.manual_seed(1)
    detector = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    detector.transform.resize = lambda image, target: (image, target)  # both get pixels that are resized already
    randomize_norms(detector)
    classes, boxes = detector.head.classification_head, detector.head.regression_head
    nn.init.normal_(classes.cls_logits.weight, std=0.03)
    nn.init.constant_(classes.cls_logits.bias, -5.0)
    nn.init.normal_(boxes.bbox_reg.weight, std=0.02)
    nn.init.constant_(boxes.bbox_reg.bias, 2.0)
    nn.init.normal_(boxes.bbox_ctrness.weight, std=0.02)
    return detector.requires_grad_(False)


@pytest.fixture(scope="module")
def converted(theirs):
    config, state = convert(theirs.state_dict(), "torchvision")
    model = FCOS(config).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model


def padded(images):
    """uint8 images as a batch padded to 32, and their sizes."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = ((sizes.amax(0) + 31) // 32 * 32).tolist()
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for canvas, image in zip(batch, images):
        canvas[:, :image.shape[1], :image.shape[2]] = image
    return batch, sizes


def generated_images():
    """Coloured noise at several scales."""
    images = []
    for size in [(200, 288), (256, 230)]:
        noise = sum(F.interpolate(torch.rand(1, 3, k, k), size=size, mode="bilinear") for k in (4, 16, 64)) / 3
        images.append((noise[0] * 255).to(torch.uint8))
    return images


def real_images():
    files = sorted((COCO_MINI / "val2017").glob("*.jpg"))[:4]
    if not files:
        pytest.skip(f"no images in {COCO_MINI}")
    images = [decode_image(file, mode=ImageReadMode.RGB) for file in files]
    return [resize(image, [240], antialias=True, max_size=400) for image in images]


def test_head_outputs_equal_torchvision_s(theirs, converted):
    images = generated_images()
    batch, sizes = padded(images)
    features = theirs.backbone(theirs.transform([image.float() / 255 for image in images])[0].tensors)
    expected = theirs.head(list(features.values()))
    outputs = converted(batch, sizes)
    stride = make_locations(*batch.shape[2:]).stride[:, None]
    for ours, other in [(outputs.logits, expected["cls_logits"]), (outputs.ltrb / stride, expected["bbox_regression"]),
                        (outputs.centerness, expected["bbox_ctrness"].squeeze(-1))]:
        assert other.std(dim=1).mean() > 0.1  # over the image: the pixels matter
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("source,most", [(generated_images, 1000), (real_images, 100)])
def test_detections_equal_torchvision_s(theirs, converted, source, most, monkeypatch):
    monkeypatch.setattr(theirs, "detections_per_img", most)
    config, images = replace(converted.config, max_detections=most), source()
    for pair in zip(images[::2], images[1::2]):
        batch, sizes = padded(pair)
        locations = make_locations(*batch.shape[2:], offset=config.location_offset)
        outputs = converted(batch, sizes)
        candidates = (our.final_scores(outputs.logits, outputs.centerness[..., None], config) > 0).sum((1, 2))
        assert (candidates >= 200).all(), candidates
        expected = theirs([image.float() / 255 for image in pair])
        for ours, other in zip(detect(outputs, locations, sizes, config), expected):
            assert len(ours.boxes) == len(other["boxes"]) >= 100
            torch.testing.assert_close(ours.scores, other["scores"], rtol=0, atol=1e-5)
            # Two scores that differ by rounding alone may stand in either order, so each detection looks for its like.
            same = (ours.labels[:, None] == other["labels"]) & ((ours.scores[:, None] - other["scores"]).abs() < 1e-5) & \
                   ((ours.boxes[:, None] - other["boxes"]).abs().amax(-1) < 0.01)
            assert same.any(0).all() and same.any(1).all()


def test_keeping_the_80_named_classes_keeps_their_logits_and_gives_them_coco_s_ids(theirs, converted):
    checkpoint = import_checkpoint(theirs.state_dict(), "torchvision")
    ids, names = checkpoint["categories"]["ids"], checkpoint["categories"]["names"]
    assert len(ids) == 80 and ids[:12] == [*range(1, 12), 13] and ids[-1] == 90
    assert names[0] == "person" and names[-1] == "toothbrush" and "N/A" not in names
    config = ModelConfig(**checkpoint["config"]["model"])
    assert config == replace(converted.config, num_classes=80)
    assert torch.equal(checkpoint["model"]["head.cls_logits.weight"], converted.head.cls_logits.weight[ids])
    assert torch.equal(checkpoint["model"]["head.cls_logits.bias"], converted.head.cls_logits.bias[ids])
    FCOS(config).load_state_dict(checkpoint["model"])


@pytest.mark.skipif(not COCO_MINI.exists(), reason=f"{COCO_MINI} is absent")
def test_the_names_of_the_80_classes_are_those_of_the_coco_files():
    listed = json.loads((COCO_MINI / "annotations" / "instances_val2017.json").read_text())["categories"]
    assert our.COCO_CLASSES == {c["id"]: c["name"] for c in listed}


def test_names_from_before_torchvision_014_and_from_ddp_are_understood(theirs, converted):
    old = {"module." + re.sub(r"(_blocks\.\d)\.0\.", r"\1.", key): value for key, value in theirs.state_dict().items()}
    assert "module.backbone.fpn.inner_blocks.2.weight" in old
    config, state = convert(old, "torchvision")
    assert config == converted.config and all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())


def test_torchvision_detectors_of_another_depth_and_classes_are_recognized():
    with torch.device("meta"):
        body = resnet_fpn_backbone(backbone_name="resnet101", weights=None, returned_layers=[2, 3, 4],
                                   extra_blocks=LastLevelP6P7(256, 256))
        state = TorchvisionFCOS(body, num_classes=4).state_dict()
    config, _ = convert(state, "torchvision")
    assert (config.backbone, config.num_classes) == ("resnet101", 4)
    assert import_checkpoint({**state}, "torchvision")["categories"]["names"] == ["class 0", "class 1", "class 2", "class 3"]


def test_p6_from_c5_is_refused():
    with torch.device("meta"):
        body = resnet_fpn_backbone(backbone_name="resnet50", weights=None, returned_layers=[2, 3, 4],
                                   extra_blocks=LastLevelP6P7(2048, 256))
        state = TorchvisionFCOS(body, num_classes=4).state_dict()
    with pytest.raises(ConfigError, match=r"nearest, with resnet50.*p6.weight.*2048"):
        convert(state, "torchvision")


def test_without_network_the_published_weights_say_what_to_do(monkeypatch):
    def unreachable(*args, **options):
        raise URLError("no network")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ConfigError, match=r"https://\S+/fcos_resnet50_fpn_coco-99b0c9b7.pth could not be downloaded .*no network.*; copy "
                                          r"that file here and run: python model.py --convert fcos_resnet50_fpn_coco-99b0c9b7.pth "
                                          r"--form torchvision --out model.pt"):
        our.published_checkpoint()


def test_the_published_weights_are_taken_from_torchvision(monkeypatch, theirs):
    asked = []
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url",
                        lambda url, **options: asked.append((url, options)) or theirs.state_dict())
    checkpoint = our.published_checkpoint()
    assert len(checkpoint["categories"]["ids"]) == 80
    assert asked[0][1]["weights_only"] and asked[0][1]["check_hash"]


# --- FCOS's and FCOS_PLUS's own checkpoints ---------------------------------------------------------------------------

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def maskrcnn_weights(num_classes=80, backbone="resnet50"):
    """A checkpoint in maskrcnn-benchmark's names, with random weights and statistics."""
    w = {}

    def conv(name, out_channels, in_channels, kernel, bias=False):
        w[f"{name}.weight"] = torch.randn(out_channels, in_channels, kernel, kernel) * math.sqrt(2 / (in_channels * kernel ** 2))
        if bias:
            w[f"{name}.bias"] = torch.randn(out_channels) * 0.1

    def norm(name, channels, gain=1.0):
        w[f"{name}.running_var"] = 1e-4 * (1 + 2 * torch.rand(channels))  # small: an eps of 1e-5 would show
        w[f"{name}.weight"] = gain * (0.5 + torch.rand(channels))
        w[f"{name}.running_mean"] = 0.005 * torch.randn(channels)
        w[f"{name}.bias"] = 0.1 * torch.randn(channels)

    conv("backbone.body.stem.conv1", 64, 3, 7)
    w["backbone.body.stem.conv1.weight"] /= 6000  # pixels have a standard deviation of 60, and the norm divides by 0.01
    norm("backbone.body.stem.bn1", 64)
    channels = 64
    for layer, blocks in enumerate(BLOCKS[backbone], start=1):
        width = 32 * 2 ** layer
        for i in range(blocks):
            block = f"backbone.body.layer{layer}.{i}"
            for n, (a, b, k) in enumerate([(width, channels, 1), (width, width, 3), (4 * width, width, 1)], start=1):
                conv(f"{block}.conv{n}", a, b, k)
                w[f"{block}.conv{n}.weight"] /= 100
                norm(f"{block}.bn{n}", a, gain=0.3 if n == 3 else 1.0)
            if i == 0:
                conv(f"{block}.downsample.0", 4 * width, channels, 1)
                w[f"{block}.downsample.0.weight"] /= 100
                norm(f"{block}.downsample.1", 4 * width)
            channels = 4 * width
    for n, channels in (2, 512), (3, 1024), (4, 2048):
        conv(f"backbone.fpn.fpn_inner{n}", 256, channels, 1, bias=True)
        conv(f"backbone.fpn.fpn_layer{n}", 256, 256, 3, bias=True)
    conv("backbone.fpn.top_blocks.p6", 256, 256, 3, bias=True)
    conv("backbone.fpn.top_blocks.p7", 256, 256, 3, bias=True)
    for tower in "cls_tower", "bbox_tower":
        for i in range(4):
            conv(f"rpn.head.{tower}.{3 * i}", 256, 256, 3, bias=True)
            w[f"rpn.head.{tower}.{3 * i + 1}.weight"] = 0.5 + torch.rand(256)
            w[f"rpn.head.{tower}.{3 * i + 1}.bias"] = 0.1 * torch.randn(256)
    for name, channels in ("cls_logits", num_classes), ("bbox_pred", 4), ("centerness", 1):
        conv(f"rpn.head.{name}", channels, 256, 3, bias=True)
    for level in range(5):
        w[f"rpn.head.scales.{level}.scale"] = torch.tensor([0.8 + 0.1 * level])
    return w


def maskrcnn_forward(w, rgb, improved):
    """What maskrcnn-benchmark and FCOS compute with these weights, formula by formula: logits, ltrb, centerness of each level."""
    def conv(name, x, stride=1, padding=0):
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)

    def norm(name, x):
        gain, bias, mean, var = (w[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var"))
        return (x - mean) / var.sqrt() * gain + bias

    def tower(name, x):
        for i in range(4):
            x = conv(f"{name}.{3 * i}", x, padding=1)
            x = F.group_norm(x, 32, w[f"{name}.{3 * i + 1}.weight"], w[f"{name}.{3 * i + 1}.bias"]).relu()
        return x

    x = rgb.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717]).view(1, 3, 1, 1)
    x = norm("backbone.body.stem.bn1", conv("backbone.body.stem.conv1", x, 2, 3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for layer, blocks in enumerate(BLOCKS["resnet50"], start=1):
        for i in range(blocks):
            block = f"backbone.body.layer{layer}.{i}"
            stride = 2 if i == 0 and layer > 1 else 1
            y = norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride)).relu()
            y = norm(f"{block}.bn2", conv(f"{block}.conv2", y, 1, 1)).relu()
            y = norm(f"{block}.bn3", conv(f"{block}.conv3", y))
            x = (y + (norm(f"{block}.downsample.1", conv(f"{block}.downsample.0", x, stride)) if i == 0 else x)).relu()
        features.append(x)
    inner = conv("backbone.fpn.fpn_inner4", features[3])
    p5 = conv("backbone.fpn.fpn_layer4", inner, padding=1)
    inner = conv("backbone.fpn.fpn_inner3", features[2]) + F.interpolate(inner, size=features[2].shape[2:])
    p4 = conv("backbone.fpn.fpn_layer3", inner, padding=1)
    inner = conv("backbone.fpn.fpn_inner2", features[1]) + F.interpolate(inner, size=features[1].shape[2:])
    p3 = conv("backbone.fpn.fpn_layer2", inner, padding=1)
    p6 = conv("backbone.fpn.top_blocks.p6", p5, 2, 1)
    p7 = conv("backbone.fpn.top_blocks.p7", p6.relu(), 2, 1)
    levels = []
    for level, p in enumerate([p3, p4, p5, p6, p7]):
        classes, boxes = tower("rpn.head.cls_tower", p), tower("rpn.head.bbox_tower", p)
        x = w[f"rpn.head.scales.{level}.scale"] * conv("rpn.head.bbox_pred", boxes, padding=1)
        levels.append((conv("rpn.head.cls_logits", classes, padding=1), x.relu() * STRIDES[level] if improved else x.exp(),
                       conv("rpn.head.centerness", boxes if improved else classes, padding=1)))
    return [torch.cat([x.flatten(2).transpose(1, 2) for x in part], dim=1) for part in zip(*levels)]


@pytest.fixture(scope="module")
def maskrcnn():
    torch.manual_seed(2)
    return maskrcnn_weights()


@pytest.mark.parametrize("form", ["fcos_plus", "fcos_imprv"])
def test_a_maskrcnn_benchmark_checkpoint_computes_what_its_formulas_say(maskrcnn, form):
    config, state = convert({f"module.{key}": value for key, value in maskrcnn.items()}, form)
    model = FCOS(config).eval()
    model.load_state_dict(state)
    rgb = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8)
    with torch.no_grad():
        outputs, expected = model(rgb), maskrcnn_forward(maskrcnn, rgb.float(), improved=form == "fcos_imprv")
    for ours, other in zip((outputs.logits, outputs.ltrb, outputs.centerness[..., None]), expected):
        assert other.std(dim=1).mean() > 0.1  # over the image: the pixels matter
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_the_forms_of_fcos_differ_as_their_papers_do(maskrcnn):
    first, improved = (convert(maskrcnn, form)[0] for form in ("fcos_plus", "fcos_imprv"))
    assert (first.box_unit, first.centerness_on_box_tower, first.sqrt_score) == ("pixel", False, False)
    assert (improved.box_unit, improved.centerness_on_box_tower, improved.sqrt_score) == ("stride", True, True)
    assert (first.stride_in_1x1, first.location_offset, first.score_threshold, first.threshold_on) == (True, 0.5, 0.05, "class")
    assert first.pixel_mean == (122.7717, 115.9465, 102.9801) and first.pixel_std == (1, 1, 1)
    assert convert(maskrcnn, "fcos_plus", centerness_on_box_tower=True)[0] == replace(first, centerness_on_box_tower=True)


def test_the_depth_is_read_from_the_names_and_a_resnext_from_the_shapes():
    with torch.device("meta"):
        weights = maskrcnn_weights(20, "resnet101")
        config, _ = convert(weights, "fcos_plus")
        assert (config.backbone, config.num_classes, config.stride_in_1x1) == ("resnet101", 20, True)
        for key, value in weights.items():  # 32 groups of 8: twice the width, an eighth .. of it in a group
            if found := re.search(r"layer(\d)\.\d+\.(conv|bn)([123])\.", key):
                width = 128 * 2 ** int(found[1])
                if found[2] == "bn" and found[3] in "12":
                    weights[key] = torch.empty(width)
                elif found[2] == "conv":
                    out, inp, k, _ = value.shape
                    weights[key] = {"1": torch.empty(width, inp, 1, 1), "2": torch.empty(width, width // 32, 3, 3),
                                    "3": torch.empty(out, width, 1, 1)}[found[3]]
        config, _ = convert(weights, "fcos_plus")
    assert (config.backbone, config.stride_in_1x1) == ("resnext101_32x8d", False)


def test_classes_of_a_maskrcnn_benchmark_checkpoint_are_coco_s_or_the_file_s_or_numbers(maskrcnn, tmp_path):
    assert import_checkpoint(maskrcnn, "fcos_plus")["categories"]["ids"] == list(our.COCO_CLASSES)
    three = {**maskrcnn, "rpn.head.cls_logits.weight": torch.arange(3.0).view(3, 1, 1, 1).expand(3, 256, 3, 3),
             "rpn.head.cls_logits.bias": torch.arange(3.0)}
    assert import_checkpoint(three, "fcos_plus")["categories"] == {"ids": [1, 2, 3], "names": ["class 1", "class 2", "class 3"]}
    file = tmp_path / "instances.json"  # rows stand in the order of the file, ours in the order of the ids
    file.write_text(json.dumps({"categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "eel"}]}))
    checkpoint = import_checkpoint(three, "fcos_plus", file)
    assert checkpoint["categories"] == {"ids": [2, 5, 7], "names": ["dog", "eel", "cat"]}
    assert checkpoint["model"]["head.cls_logits.bias"].tolist() == [1, 2, 0]
    with pytest.raises(ConfigError, match="instances.json: its 3 categories do not fit the 80 class rows of the weights"):
        import_checkpoint(maskrcnn, "fcos_plus", file)
    file.write_text('{"images": []}')
    with pytest.raises(ConfigError, match="instances.json: no COCO categories can be read from it"):
        import_checkpoint(three, "fcos_plus", file)


# --- files ------------------------------------------------------------------------------------------------------------

def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["model.py", *map(str, arguments)])
    our.main()


def test_the_command_converts_a_file_into_a_checkpoint(maskrcnn, tmp_path, monkeypatch, capsys):
    torch.save({"model": {f"module.{key}": value for key, value in maskrcnn.items()}, "iteration": 90_000}, tmp_path / "FCOS.pth")
    run_main(monkeypatch, "--convert", tmp_path / "FCOS.pth", "--form", "fcos_plus", "--centerness-on-box-tower", "--out", tmp_path / "model.pt")
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    config = ModelConfig(**checkpoint["config"]["model"])
    FCOS(config).load_state_dict(checkpoint["model"])
    assert config.centerness_on_box_tower and checkpoint["step"] == 0 and asdict(config) == checkpoint["config"]["model"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["FCOS.pth", "model.pt"]
    assert "resnet50, 80 classes: person, bicycle" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_nothing(maskrcnn, tmp_path, monkeypatch):
    torch.save(maskrcnn, tmp_path / "FCOS.pth")
    for out, reason in ((tmp_path / "nowhere" / "model.pt", "No such file or directory"), (tmp_path / "folder", "directory")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=f"{out}: cannot be written .*{reason}.*; free some space, or name another file with --out"):
            run_main(monkeypatch, "--convert", tmp_path / "FCOS.pth", "--form", "fcos_plus", "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FCOS.pth", "folder"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_needs_pickle_is_refused_with_the_reason(tmp_path, legacy):
    file = tmp_path / "run.pth"
    torch.save({"model": {"a": torch.ones(1)}, "args": Namespace(lr=1)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError, match=r"run.pth: refused, since it holds a Python object \(argparse.Namespace\).*run any code.*save the "
                                          r"weights alone: torch.save"):
        load_weights(file)


def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path, monkeypatch, maskrcnn):
    with pytest.raises(ConfigError, match="absent.pth: no such file or folder"):
        load_weights(tmp_path / "absent.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ConfigError, match="page.pth: damaged, or not a file of PyTorch"):
        load_weights(tmp_path / "page.pth")
    torch.save(maskrcnn["rpn.head.centerness.bias"], tmp_path / "tensor.pth")
    with pytest.raises(ConfigError, match="tensor.pth: holds no state dict"):
        load_weights(tmp_path / "tensor.pth")
    whole = torch.nn.Conv2d(1, 1, 1).state_dict()
    torch.save(whole, tmp_path / "other.pth")
    assert load_weights(tmp_path / "other.pth").keys() == whole.keys()
    with pytest.raises(ConfigError, match=r"other.pth: not a detector of the form fcos_plus \(known: torchvision, fcos_plus, fcos_imprv\)"):
        run_main(monkeypatch, "--convert", tmp_path / "other.pth", "--form", "fcos_plus", "--out", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_a_bit_that_flips_in_a_file_is_noticed_or_means_nothing(tmp_path):
    file, state = tmp_path / "model.pt", nn.Conv2d(2, 3, 3).state_dict()
    torch.save({"model": state}, file)
    content, outcomes = file.read_bytes(), []
    flips = [(at, 1 << at % 8) for at in range(0, len(content), 3)]  # in data, names, sizes, checksums and padding
    marked_as_folder = [(m.start() + 38, 0x10) for m in re.finditer(b"PK\1\2", content)]  # PyTorch would read such a record as empty
    for at, bit in flips + marked_as_folder:
        mutated = bytearray(content)
        mutated[at] ^= bit
        file.write_bytes(mutated)
        try:
            loaded = load_weights(file)
            assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state), (at, bit)
            outcomes.append("nothing")
        except ConfigError as error:
            assert str(error).startswith(f"{file}: damaged, or not a file of PyTorch")
            outcomes.append("noticed")
    assert outcomes.count("noticed") > 300 and set(outcomes[-len(marked_as_folder):]) == {"noticed"}


@pytest.mark.parametrize("form,other", [("torchvision", "fcos_plus"), ("fcos_plus", "torchvision")])
def test_weights_of_one_form_are_refused_as_another(theirs, maskrcnn, form, other):
    weights = theirs.state_dict() if form == "torchvision" else maskrcnn
    with pytest.raises(ConfigError, match=f"not a detector of the form {other}.*nearest, with resnet50"):
        convert(weights, other)


@pytest.mark.parametrize("key, value", [
    ("backbone.body.stem.bn1.running_mean", None), ("backbone.body.stem.bn1.bias", torch.ones(3)),
    ("backbone.body.stem.conv1.weight", torch.ones(2)), ("rpn.head.cls_logits.bias", torch.ones(())),
    ("rpn.head.scales.0.scale", torch.ones(3))])
def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(maskrcnn, key, value):
    assert key in maskrcnn
    weights = {name: v for name, v in (maskrcnn | {key: value}).items() if v is not None}
    with pytest.raises(ConfigError, match="not a detector of the form fcos_plus .* names or shapes differ: "):
        convert(weights, "fcos_plus")


def test_backbone_weights_of_another_network_are_refused_by_name_and_shape(tmp_path):
    state = torchvision.models.resnet34().state_dict()
    torch.save(state, tmp_path / "resnet34.pth")
    our.Backbone(ModelConfig(backbone="resnet34"), str(tmp_path / "resnet34.pth"))
    with pytest.raises(ConfigError, match=r"resnet34.pth: not the weights of a resnet18; .*: 'layer1.2.bn1.bias' \(expected nothing, found \(64,\)\)"):
        our.Backbone(ModelConfig(backbone="resnet18"), str(tmp_path / "resnet34.pth"))
    with pytest.raises(ConfigError, match=r"resnet34.pth: not the weights of a resnet50; .*: 'layer1.0.bn3.bias' \(expected \(256,\), found nothing\)"):
        our.Backbone(ModelConfig(), str(tmp_path / "resnet34.pth"))  # another shape under the same name, too
    torch.save({0: torch.ones(1)}, tmp_path / "numbers.pth")
    with pytest.raises(ConfigError, match="numbers.pth: holds no state dict"):
        load_weights(tmp_path / "numbers.pth")


# --- what it costs ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [("0", "64"), ("64", "-1")])
def test_a_size_without_pixels_is_refused(size, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--size", *size)
    assert "--size must be >= 1" in capsys.readouterr().err


def test_the_description_counts_what_can_be_counted_by_hand():
    text = our.describe(ModelConfig(), 128, 256)
    assert re.search(r"P3 +8 +16 x 32 +0 \.\. 64\n", text) and re.search(r"P7 +128 +1 x 2 +512 \.\. inf\n", text)
    L, model = 512 + 128 + 32 + 8 + 2, FCOS(ModelConfig())
    head = 2 * 9 * 256 * (8 * 256 + 80 + 4 + 1) * L / 1e9
    numbers = {line.split()[0]: line for line in text.splitlines() if line.startswith(("head", "all"))}
    assert f" {head:.1f}" in numbers["head"]
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" in numbers["all"]
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M" in numbers["all"]
    assert f"logits (1, {L}, 80)\n" in text
