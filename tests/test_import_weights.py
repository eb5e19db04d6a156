"""Imported weights against torchvision's detector and maskrcnn-benchmark's formulas."""

import json
import math
import re
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

import evaluate
import import_weights
from assign import STRIDES, make_locations
from data import UserError
from import_weights import COCO_CLASSES
from model import FCOS, ModelConfig, build_model, detect, load_checkpoint

BLOCKS = (3, 4, 6, 3)  # of a ResNet-50


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


def test_a_failed_download_names_the_file_and_the_command(monkeypatch, tmp_path):
    def unreachable(*args, **options):
        raise URLError("no network")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"^https://\S+/fcos_resnet50_fpn_coco-99b0c9b7.pth could "
                       r"not be downloaded .*no network.*; copy that file .*import_weights.py "
                       "fcos_resnet50_fpn_coco-99b0c9b7.pth --form torchvision --out"):
        import_weights.main(["torchvision", "--out", str(tmp_path / "model.pt")])


def test_names_from_ddp_and_from_before_torchvision_014_are_understood(theirs, ours):
    old = {"module." + re.sub(r"(_blocks\.\d)\.0\.", r"\1.", name): value
           for name, value in theirs.state_dict().items()}
    assert "module.backbone.fpn.inner_blocks.2.weight" in old
    config, state = import_weights.convert(old, "torchvision", "weights")
    assert config == ours.config
    assert all(value.equal(state[name]) for name, value in ours.state_dict().items())


# --- maskrcnn-benchmark: FCOS and FCOS_PLUS -----------------------------------------------------

def maskrcnn_weights():
    """A checkpoint in maskrcnn-benchmark's names, with random weights and statistics."""
    w = {}

    def conv(name, out, channels, kernel, bias=True, gain=1.0):
        std = gain * math.sqrt(2 / (channels * kernel**2))
        w[f"{name}.weight"] = torch.randn(out, channels, kernel, kernel) * std
        if bias:
            w[f"{name}.bias"] = torch.randn(out) * 0.1

    def conv_norm(conv_name, norm_name, out, channels, kernel, gain=1.0, scale=0.01):
        conv(conv_name, out, channels, kernel, bias=False, gain=scale)
        w[f"{norm_name}.running_var"] = 1e-4 * (1 + 2 * torch.rand(out))  # an eps would show
        w[f"{norm_name}.weight"] = gain * (0.5 + torch.rand(out))
        w[f"{norm_name}.running_mean"] = 0.005 * torch.randn(out)
        w[f"{norm_name}.bias"] = 0.1 * torch.randn(out)

    body, fpn, head = "backbone.body", "backbone.fpn", "rpn.head"
    conv_norm(f"{body}.stem.conv1", f"{body}.stem.bn1", 64, 3, 7, scale=1 / 6000)  # of pixels
    channels = 64
    for layer, blocks in enumerate(BLOCKS, start=1):
        width = 32 * 2**layer
        for i in range(blocks):
            block = f"{body}.layer{layer}.{i}"
            conv_norm(f"{block}.conv1", f"{block}.bn1", width, channels, 1)
            conv_norm(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            conv_norm(f"{block}.conv3", f"{block}.bn3", 4 * width, width, 1, gain=0.3)
            if i == 0:
                conv_norm(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    for n, channels in (2, 512), (3, 1024), (4, 2048):
        conv(f"{fpn}.fpn_inner{n}", 256, channels, 1)
        conv(f"{fpn}.fpn_layer{n}", 256, 256, 3)
    conv(f"{fpn}.top_blocks.p6", 256, 256, 3)
    conv(f"{fpn}.top_blocks.p7", 256, 256, 3)
    for tower in "cls_tower", "bbox_tower":
        for i in range(0, 12, 3):
            conv(f"{head}.{tower}.{i}", 256, 256, 3)
            w[f"{head}.{tower}.{i + 1}.weight"] = 0.5 + torch.rand(256)
            w[f"{head}.{tower}.{i + 1}.bias"] = 0.1 * torch.randn(256)
    for name, channels in ("cls_logits", 80), ("bbox_pred", 4), ("centerness", 1):
        conv(f"{head}.{name}", channels, 256, 3)
    for level in range(5):
        w[f"{head}.scales.{level}.scale"] = torch.tensor([0.8 + 0.1 * level])
    return w


def maskrcnn_forward(w, rgb, improved):
    """What maskrcnn-benchmark computes with these weights: logits, ltrb, centerness."""
    def conv(name, x, stride=1, padding=0):
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)

    def norm(name, x):
        weight, bias, mean, var = (w[f"{name}.{part}"].view(1, -1, 1, 1) for part in
                                   ("weight", "bias", "running_mean", "running_var"))
        return (x - mean) / var.sqrt() * weight + bias

    def tower(name, x):
        for i in range(0, 12, 3):
            x = conv(f"{name}.{i}", x, padding=1)
            weight, bias = w[f"{name}.{i + 1}.weight"], w[f"{name}.{i + 1}.bias"]
            x = F.group_norm(x, 32, weight, bias).relu()
        return x

    body, fpn, head = "backbone.body", "backbone.fpn", "rpn.head"
    x = rgb.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717]).view(1, 3, 1, 1)
    x = norm(f"{body}.stem.bn1", conv(f"{body}.stem.conv1", x, 2, 3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for layer, blocks in enumerate(BLOCKS, start=1):
        for i in range(blocks):
            block = f"{body}.layer{layer}.{i}"
            stride = 2 if i == 0 and layer > 1 else 1
            y = norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride)).relu()
            y = norm(f"{block}.bn2", conv(f"{block}.conv2", y, 1, 1)).relu()
            y = norm(f"{block}.bn3", conv(f"{block}.conv3", y))
            if i == 0:
                x = norm(f"{block}.downsample.1", conv(f"{block}.downsample.0", x, stride))
            x = (x + y).relu()
        features.append(x)
    inner, pyramid = 0, []
    for n, feature in zip((4, 3, 2), features[:0:-1]):
        inner = conv(f"{fpn}.fpn_inner{n}", feature) + inner
        pyramid.insert(0, conv(f"{fpn}.fpn_layer{n}", inner, padding=1))
        inner = F.interpolate(inner, scale_factor=2)
    pyramid.append(conv(f"{fpn}.top_blocks.p6", pyramid[-1], 2, 1))
    pyramid.append(conv(f"{fpn}.top_blocks.p7", pyramid[-1].relu(), 2, 1))
    levels = []
    for level, (p, stride) in enumerate(zip(pyramid, STRIDES)):
        classes, boxes = tower(f"{head}.cls_tower", p), tower(f"{head}.bbox_tower", p)
        x = w[f"{head}.scales.{level}.scale"] * conv(f"{head}.bbox_pred", boxes, padding=1)
        levels.append((conv(f"{head}.cls_logits", classes, padding=1),
                       x.relu() * stride if improved else x.exp(),
                       conv(f"{head}.centerness", boxes if improved else classes, padding=1)))
    return [torch.cat([x.flatten(2).transpose(1, 2) for x in part], 1) for part in zip(*levels)]


@pytest.fixture(scope="module")
def maskrcnn():
    torch.manual_seed(2)
    return maskrcnn_weights()


@pytest.mark.parametrize("form", ["fcos_plus", "fcos_imprv"])
def test_a_maskrcnn_benchmark_checkpoint_computes_what_its_formulas_say(maskrcnn, form, tmp_path):
    torch.save({"model": {f"module.{name}": value for name, value in maskrcnn.items()},
                "iteration": 90_000}, tmp_path / "FCOS.pth")
    import_weights.main([str(tmp_path / "FCOS.pth"), "--form", form,
                         "--out", str(tmp_path / "model.pt")])
    model = build_model(load_checkpoint(tmp_path / "model.pt")).eval()
    rgb = torch.randint(0, 256, (1, 3, 128, 160), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model(rgb)
        expected = maskrcnn_forward(maskrcnn, rgb.float(), improved=form == "fcos_imprv")
    for a, b in zip((outputs.logits, outputs.ltrb, outputs.centerness[..., None]), expected):
        assert b.std(dim=1).mean() > 0.1  # the pixels matter
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_norm_without_eps_is_exact_for_the_smallest_variances():
    norm, var = FrozenBatchNorm2d(3), torch.tensor([1e-8, 1e-6, 1.0])
    state = {"bn1.weight": torch.full((3,), 0.5), "bn1.running_var": var}
    import_weights.remove_eps(state, "bn1.")
    norm.weight, norm.running_var = state["bn1.weight"], state["bn1.running_var"]
    found = norm(torch.ones(1, 3, 1, 1)).flatten().double()
    torch.testing.assert_close(found, 0.5 / var.double().sqrt(), rtol=1e-6, atol=0)


def test_boxes_of_maskrcnn_benchmark_end_one_pixel_later_but_inside_the_image():
    small = dict(num_classes=1, backbone="resnet18", channels=8, tower_depth=1)
    form = import_weights.FORMS["fcos_plus"]
    detector = evaluate.Detector(FCOS(ModelConfig(**form | small)), ["a"], "cpu", "fp32")
    # An image of 100 x 200 pixels was resized to 50 x 100: first to its own pixels, then + 1.
    boxes = detector.to_image(torch.tensor([[10.0, 5, 20, 30], [0, 0, 100, 50]]), (50, 100),
                              (100, 200))
    assert boxes.tolist() == [[20, 10, 41, 61], [0, 0, 200, 100]]


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
        {"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "eel"}]}))
    assert categories(three, file) == (
        {"ids": [2, 5, 7], "names": ["dog", "eel", "cat"]}, [1, 2, 0])
    with pytest.raises(UserError, match="instances.json: its 3 categories do not fit the 80 class"):
        categories(maskrcnn, file)
    file.write_text('{"images": []}')
    with pytest.raises(UserError, match="instances.json: no COCO categories can be read from it"):
        categories(three, file)


# --- refusals -----------------------------------------------------------------------------------

@pytest.fixture
def few_backbones(monkeypatch):
    monkeypatch.setattr(import_weights, "BACKBONES", ("resnet18", "resnet50"))


@pytest.mark.parametrize("form", ["torchvision", "fcos_plus"])
def test_weights_of_one_form_are_refused_as_another(theirs, maskrcnn, form, few_backbones):
    weights = maskrcnn if form == "torchvision" else theirs.state_dict()
    with pytest.raises(UserError, match=f"not a detector of the form {form}.*with resnet50, the "
                                        "nearest backbone, .* names or shapes differ"):
        import_weights.convert(weights, form, "weights")


@pytest.mark.parametrize("name, value", [
    ("backbone.body.stem.bn1.running_mean", None), ("backbone.body.stem.bn1.bias", torch.ones(3)),
    ("backbone.body.stem.bn1.weight", None), ("backbone.body.stem.conv1.weight", torch.ones(2)),
    ("rpn.head.cls_logits.bias", torch.ones(())), ("rpn.head.scales.0.scale", torch.ones(3))])
def test_a_missing_tensor_or_one_of_another_shape_is_refused(maskrcnn, name, value, few_backbones):
    assert name in maskrcnn
    weights = {n: v for n, v in (maskrcnn | {name: value}).items() if v is not None}
    with pytest.raises(UserError, match="not a detector of the form fcos_plus.* differ: "):
        import_weights.convert(weights, "fcos_plus", "weights")


@pytest.mark.parametrize("content", [{"model": torch.ones(1)}, {"a": 1}, {}])
def test_a_file_without_a_detector_is_refused(tmp_path, content, few_backbones):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: (holds no state dict|not a detector)"):
        import_weights.main([str(tmp_path / "other.pth"), "--form", "fcos_plus",
                             "--out", str(tmp_path / "model.pt")])
    assert not (tmp_path / "model.pt").exists()
