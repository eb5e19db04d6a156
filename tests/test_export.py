"""The exported detector finds what the eager one finds; the cost report counts right."""

import importlib.util
import json
import re
from dataclasses import asdict

import pytest
import torch
from torch import nn

import cost
import export
from assign import make_locations
from data import UserError
from model import (CHECKPOINT_FORMAT, FCOS, ModelConfig, candidates, detect, nms_mask, suppress,
                   unpad)

CANVASES = [(1, 32, 32), (3, 128, 96), (1, 224, 352), (2, 416, 256)]  # N, H, W


def small_model(**changes):
    """Random weights under which many locations have a class."""
    model = FCOS(ModelConfig(num_classes=3, backbone="resnet18", channels=32, tower_depth=1,
                             score_threshold=1e-3, **changes)).eval().requires_grad_(False)
    nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    nn.init.constant_(model.head.box_pred.bias, 3.0)
    return model


def random_batch(N, H, W):
    sizes = torch.tensor([(H - 5 * n, W - 7 * n) for n in range(N)])
    return torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8), sizes


@pytest.mark.parametrize("form", [{}, dict(location_offset=0.0, location_spacing="even")])
def test_an_exported_detector_finds_the_same_on_every_canvas_and_batch(form, tmp_path):
    model, file = small_model(**form), tmp_path / "detector.pt2"
    categories = {"ids": [1, 2, 3], "names": ["a", "b", "c"]}
    torch.save({"format": CHECKPOINT_FORMAT, "step": 0, "model": model.state_dict(),
                "config": {"model": asdict(model.config)}, "categories": categories},
               tmp_path / "model.pt")
    export.main([str(tmp_path / "model.pt"), "--out", str(file)])
    extra_files = {"categories.json": ""}
    detector = torch.export.load(file, extra_files=extra_files).module(check_guards=False)
    assert json.loads(extra_files["categories.json"]) == categories
    for N, H, W in CANVASES:
        images, sizes = random_batch(N, H, W)
        locations = make_locations(H, W, offset=model.config.location_offset)
        expected = detect(model(images, sizes), locations, sizes, model.config)
        for a, b in zip(unpad(*detector(images, sizes)), expected, strict=True):
            assert len(b.scores) > 5 and a.labels.equal(b.labels)
            torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)
            torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=1e-3)


def test_an_exported_detector_may_find_nothing_or_one_object():
    model = small_model(candidates_per_level=1)
    detector = export.export(model).module(check_guards=False)
    images, sizes = random_batch(1, 32, 32)
    counts = set()
    for bias in torch.linspace(-20, 0, 41):
        nn.init.constant_(detector.model.head.cls_logits.bias, bias)
        counts.add(int(detector(images, sizes)[3]))
    assert counts >= {0, 1}


@pytest.mark.parametrize("C", [3, 1203])
def test_the_float32_nms_of_onnx_keeps_what_the_model_s_keeps(C):
    corner, side = torch.rand(3000, 2) * 900, torch.rand(3000, 2) * 400
    boxes, groups = torch.cat([corner, corner + side], dim=1), torch.randint(-1, C, (3000,))
    scores = torch.rand(3000)
    kept = nms_mask(boxes, scores, groups, 0.3)
    assert kept.equal(nms_mask(boxes, scores, groups, 0.3, torch.float32))
    assert 0 < kept.sum() < (groups >= 0).sum()
    assert not nms_mask(boxes, scores, torch.full_like(groups, -1), 0.3, torch.float32).any()


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
                    reason="onnx, onnxscript and onnxruntime are not installed")
def test_an_onnx_file_finds_the_same_on_every_canvas_and_batch(tmp_path):
    import onnxruntime

    model, file = small_model(), tmp_path / "detector.onnx"
    export.save(export.export(model, torch.float32), file, {})
    session = onnxruntime.InferenceSession(file)
    for N, H, W in CANVASES:
        images, sizes = random_batch(N, H, W)
        found = session.run(None, {"images": images.numpy(), "image_sizes": sizes.numpy()})
        before_nms = candidates(model(images, sizes), make_locations(H, W), sizes, model.config)
        boxes, scores, labels, count = suppress(*before_nms, model.config)
        assert count.tolist() == found[3].tolist()
        torch.testing.assert_close(torch.from_numpy(found[1]), scores, rtol=0, atol=1e-4)


def test_an_onnx_export_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    def unavailable(*args, **options):
        raise ImportError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", unavailable)
    with pytest.raises(UserError, match="detector.onnx: .*onnxscript.*; pip install onnx onnxscr"):
        export.save(None, tmp_path / "detector.onnx", {})
    assert not list(tmp_path.iterdir())


def test_an_unknown_file_type_is_refused(capsys):
    with pytest.raises(SystemExit):
        export.main(["runs/demo", "--out", "detector.pt"])
    assert "--out must end in .pt2 or .onnx" in capsys.readouterr().err


def test_the_cost_report_counts_what_can_be_counted_by_hand(capsys):
    cost.main(["fcos_R_50_FPN_1x", "--size", "128", "256"])
    text = capsys.readouterr().out
    assert re.search(r"P3 +8 +16 x 32 +0 \.\. 64\n", text)
    assert re.search(r"P7 +128 +1 x 2 +512 \.\. inf\n", text)
    L, model = 512 + 128 + 32 + 8 + 2, FCOS(ModelConfig())
    assert f"logits (1, {L}, 80)\n" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line[:4] in ("head", "all ")}
    assert f" {2 * 9 * 256 * (8 * 256 + 80 + 4 + 1) * L / 1e9:.1f}" in lines["head"]
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" in lines["all"]
    assert f"{learned / 1e6:.2f} M" in lines["all"]
    assert make_locations(128, 256).xy.device.type == "cpu"  # the cache holds no meta tensors
