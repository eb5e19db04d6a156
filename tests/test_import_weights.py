"""Imported weights against torchvision's detector and maskrcnn-benchmark's formulas."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

import import_weights
from assign import STRIDES, make_locations
from data import UserError
from import_weights import COCO_CLASSES
from model import FCOS, build_model, detect, load_checkpoint


def padded(images):
    sizes = torch.tensor([image.shape[1:] for image in images])
    batch = torch.zeros(len(images), 3, *((sizes.amax(0) + 31) // 32 * 32).tolist())
    for canvas, image in zip(batch, images):
        canvas[:, :image.shape[1], :image.shape[2]] = image
    return batch.to(torch.uint8), sizes


# --- torchvision --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def theirs():
    """torchvision's FCOS with random weights, under which hundreds of candidates pass."""
    torch.manual_seed(1)
    detector = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).eval()
    detector.transform.resize = lambda image, target: (image, target)  # both get the same pixels
    for norm in detector.modules():
        if isinstance(norm, FrozenBatchNorm2d):  # small variances: the eps matters
            norm.running_var.uniform_(1e-4, 3e-4)
            norm.weight.uniform_(0.005, 0.015)
            norm.running_mean.normal_(0, 0.005)
            norm.bias.normal_(0, 0.1)
    classes, boxes = detector.head.classification_head, detector.head.regression_head
    nn.init.normal_(classes.cls_logits.weight, std=0.03)
    nn.init.constant_(classes.cls_logits.bias, -5.0)
    nn.init.normal_(boxes.bbox_reg.weight, std=0.02)
    nn.init.constant_(boxes.bbox_reg.bias, 2.0)
    nn.init.normal_(boxes.bbox_ctrness.weight, std=0.02)
    return detector.requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs):
    """The same detector, with all 91 class rows."""
    config, state = import_weights.convert(theirs.state_dict(), "torchvision", "weights")
    model = FCOS(config).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model


def test_outputs_and_detections_equal_torchvision_s(theirs, ours):
    images = [(sum(F.interpolate(torch.rand(1, 3, k, k), size=size, mode="bilinear")
                   for k in (4, 16, 64))[0] * 85).to(torch.uint8)
              for size in [(200, 288), (256, 230)]]
    batch, sizes = padded(images)
    pixels = [image.float() / 255 for image in images]
    outputs = ours(batch, sizes)
    locations = make_locations(*batch.shape[2:], offset=ours.config.location_offset)

    features = theirs.backbone(theirs.transform(pixels)[0].tensors)
    head = theirs.head(list(features.values()))
    for a, b in [(outputs.logits, head["cls_logits"]),
                 (outputs.ltrb / locations.stride[:, None], head["bbox_regression"]),
                 (outputs.centerness, head["bbox_ctrness"].squeeze(-1))]:
        assert b.std(dim=1).mean() > 0.1  # the pixels matter
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

    for a, b in zip(detect(outputs, locations, sizes, ours.config), theirs(pixels)):
        assert len(a.boxes) == len(b["boxes"]) > 40
        torch.testing.assert_close(a.scores, b["scores"], rtol=0, atol=1e-5)
        # Scores that differ by rounding alone may be in either order: each looks for its like.
        same = ((a.labels[:, None] == b["labels"])
                & ((a.scores[:, None] - b["scores"]).abs() < 1e-5)
                & ((a.boxes[:, None] - b["boxes"]).abs().amax(-1) < 0.01))
        assert same.any(0).all() and same.any(1).all()


def test_the_published_weights_keep_the_80_named_classes_under_coco_s_ids(
        theirs, ours, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url",
                        lambda url, **options: theirs.state_dict())
    import_weights.main(["torchvision", "--out", str(tmp_path / "model.pt")])
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    ids, names = checkpoint["categories"]["ids"], checkpoint["categories"]["names"]
    assert len(ids) == 80 and ids[:12] == [*range(1, 12), 13] and ids[-1] == 90
    assert (names[0], names[-1]) == ("person", "toothbrush")
    model = build_model(checkpoint)
    assert model.head.cls_logits.bias.equal(ours.head.cls_logits.bias[ids])
    assert model.head.cls_logits.weight.equal(ours.head.cls_logits.weight[ids])


def test_names_from_ddp_and_from_before_torchvision_014_are_understood(theirs, ours):
    old = {"module." + re.sub(r"(_blocks\.\d)\.0\.", r"\1.", name): value
           for name, value in theirs.state_dict().items()}
    assert "module.backbone.fpn.inner_blocks.2.weight" in old
    config, state = import_weights.convert(old, "torchvision", "weights")
    assert config == ours.config
    assert all(value.equal(state[name]) for name, value in ours.state_dict().items())


# --- maskrcnn-benchmark: FCOS and FCOS_PLUS -----------------------------------------------------

def maskrcnn_forward(w, rgb, improved=False):
    """What maskrcnn-benchmark computes with the weights `w`: logits, ltrb, centerness.

    Weights and statistics that `w` lacks are drawn at random and put there.
    """
    def parameter(name, low, high, *shape):
        if name not in w:
            w[name] = low + (high - low) * torch.rand(shape)
        return w[name]

    def conv(name, x, out, kernel, stride=1, bias=True, gain=1.0):
        channels = x.shape[1]
        limit = gain * math.sqrt(6 / (channels * kernel**2))
        weight = parameter(f"{name}.weight", -limit, limit, out, channels, kernel, kernel)
        bias = parameter(f"{name}.bias", -0.2, 0.2, out) if bias else None
        return F.conv2d(x, weight, bias, stride, kernel // 2)

    def conv_norm(conv_name, norm_name, x, out, kernel, stride=1, gain=1.0, scale=0.01):
        x = conv(conv_name, x, out, kernel, stride, bias=False, gain=scale)
        var = parameter(f"{norm_name}.running_var", 1e-4, 3e-4, out)  # an eps would show
        mean = parameter(f"{norm_name}.running_mean", -0.01, 0.01, out)
        weight = parameter(f"{norm_name}.weight", 0.5 * gain, 1.5 * gain, out)
        bias = parameter(f"{norm_name}.bias", -0.2, 0.2, out)
        mean, var, weight, bias = (v.view(1, -1, 1, 1) for v in (mean, var, weight, bias))
        return (x - mean) / var.sqrt() * weight + bias

    def tower(name, x):
        for i in range(0, 12, 3):
            x = conv(f"{name}.{i}", x, 256, 3)
            weight = parameter(f"{name}.{i + 1}.weight", 0.5, 1.5, 256)
            bias = parameter(f"{name}.{i + 1}.bias", -0.2, 0.2, 256)
            x = F.group_norm(x, 32, weight, bias).relu()
        return x

    body, fpn, head = "backbone.body", "backbone.fpn", "rpn.head"
    x = rgb.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717]).view(1, 3, 1, 1)
    x = conv_norm(f"{body}.stem.conv1", f"{body}.stem.bn1", x, 64, 7, 2, scale=1 / 6000).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):  # of a ResNet-50
        width = 32 * 2**layer
        for i in range(blocks):
            block = f"{body}.layer{layer}.{i}"
            stride = 2 if i == 0 and layer > 1 else 1
            y = conv_norm(f"{block}.conv1", f"{block}.bn1", x, width, 1, stride).relu()
            y = conv_norm(f"{block}.conv2", f"{block}.bn2", y, width, 3).relu()
            y = conv_norm(f"{block}.conv3", f"{block}.bn3", y, 4 * width, 1, gain=0.3)
            if i == 0:
                down = f"{block}.downsample"
                x = conv_norm(f"{down}.0", f"{down}.1", x, 4 * width, 1, stride)
            x = (x + y).relu()
        features.append(x)
    inner, pyramid = 0, []
    for n, feature in zip((4, 3, 2), features[:0:-1]):
        inner = conv(f"{fpn}.fpn_inner{n}", feature, 256, 1) + inner
        pyramid.insert(0, conv(f"{fpn}.fpn_layer{n}", inner, 256, 3))
        inner = F.interpolate(inner, scale_factor=2)
    pyramid.append(conv(f"{fpn}.top_blocks.p6", pyramid[-1], 256, 3, 2))
    pyramid.append(conv(f"{fpn}.top_blocks.p7", pyramid[-1].relu(), 256, 3, 2))
    levels = []
    for level, (p, stride) in enumerate(zip(pyramid, STRIDES)):
        classes, boxes = tower(f"{head}.cls_tower", p), tower(f"{head}.bbox_tower", p)
        scale = parameter(f"{head}.scales.{level}.scale", 0.8, 1.2, 1)
        x = scale * conv(f"{head}.bbox_pred", boxes, 4, 3)
        levels.append((conv(f"{head}.cls_logits", classes, 80, 3),
                       x.relu() * stride if improved else x.exp(),
                       conv(f"{head}.centerness", boxes if improved else classes, 1, 3)))
    return [torch.cat([x.flatten(2).transpose(1, 2) for x in part], 1) for part in zip(*levels)]


@pytest.fixture(scope="module")
def maskrcnn():
    """A checkpoint in maskrcnn-benchmark's names."""
    torch.manual_seed(2)
    weights = {}
    maskrcnn_forward(weights, torch.zeros(1, 3, 128, 128))
    return weights


@pytest.mark.parametrize("form", ["fcos_plus", "fcos_imprv"])
def test_a_maskrcnn_benchmark_checkpoint_computes_what_its_formulas_say(maskrcnn, form, tmp_path):
    torch.save({"model": {f"module.{name}": value for name, value in maskrcnn.items()},
                "iteration": 90_000}, tmp_path / "FCOS.pth")
    import_weights.main([str(tmp_path / "FCOS.pth"), "--form", form,
                         "--out", str(tmp_path / "model.pt")])
    model = build_model(load_checkpoint(tmp_path / "model.pt")).eval()
    assert model.config.inclusive_boxes
    rgb = torch.randint(0, 256, (1, 3, 128, 160), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model(rgb)
        expected = maskrcnn_forward(maskrcnn, rgb.float(), improved=form == "fcos_imprv")
    for a, b in zip((outputs.logits, outputs.ltrb, outputs.centerness[..., None]), expected):
        assert b.std(dim=1).mean() > 0.1  # the pixels matter
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_classes_are_coco_s_or_the_file_s_or_numbers(maskrcnn, tmp_path):
    def categories(weights, file=None):
        checkpoint = import_weights.import_weights(weights, "fcos_plus", "weights", file)
        return checkpoint["categories"], checkpoint["model"]["head.cls_logits.bias"].tolist()

    assert categories(maskrcnn)[0] == {"ids": list(COCO_CLASSES), "names": [*COCO_CLASSES.values()]}
    three = {**maskrcnn, "rpn.head.cls_logits.weight": torch.zeros(3, 256, 3, 3),
             "rpn.head.cls_logits.bias": torch.arange(3.0)}
    assert categories(three)[0] == {"ids": [1, 2, 3], "names": ["class 1", "class 2", "class 3"]}

    file = tmp_path / "instances.json"  # rows are in the order of the file, ours in that of the ids
    file.write_text(json.dumps({"categories": [
        {"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "eel"}]}),
        encoding="utf-8-sig")
    assert categories(three, file) == (
        {"ids": [2, 5, 7], "names": ["dog", "eel", "cat"]}, [1, 2, 0])
    with pytest.raises(UserError, match="instances.json: its 3 categories do not fit the 80 class"):
        categories(maskrcnn, file)
    file.write_text('{"images": []}')
    with pytest.raises(UserError, match="instances.json: no COCO categories can be read from it"):
        categories(three, file)


# --- refusals -----------------------------------------------------------------------------------

def test_weights_of_another_form_are_refused(theirs, monkeypatch):
    monkeypatch.setattr(import_weights, "BACKBONES", ("resnet18", "resnet50"))
    with pytest.raises(UserError, match="not a detector of the form fcos_plus.*with resnet50, the "
                                        "nearest backbone, .* names or shapes differ"):
        import_weights.convert(theirs.state_dict(), "fcos_plus", "weights")


def test_a_file_without_a_detector_is_refused(tmp_path):
    torch.save({"model": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: holds no state dict"):
        import_weights.main([str(tmp_path / "other.pth"), "--form", "fcos_plus",
                             "--out", str(tmp_path / "model.pt")])
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("out", [".", "", "/"])
def test_out_must_be_the_name_of_a_file(out):
    with pytest.raises(UserError, match="is no name of a file; name one with --out"):
        import_weights.main([__file__, "--form", "fcos_plus", "--out", out])
