"""What a prediction costs: closed forms in float64, derivatives, and normalisers that do not see how a batch is split."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import loss as our
from assign import Targets
from loss import BOX_LOSSES, box_loss, centerness_target, fcos_loss, totals


def closed_form(pred, target, kind):
    """The loss of one box, from corners, in Python's double precision."""
    (l, t, r, b), (L, T, R, B) = pred, target
    width, height = min(r, R) + min(l, L), min(b, B) + min(t, T)
    intersection = width * height
    union = (l + r) * (t + b) + (L + R) * (T + B) - intersection
    iou = (intersection + 1) / (union + 1)
    enclosing = (max(r, R) + max(l, L)) * (max(b, B) + max(t, T)) + 1e-7
    return {"iou": -math.log(iou), "linear_iou": 1 - iou, "giou": 1 - (iou - (enclosing - union) / enclosing)}[kind]


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_losses_equal_their_closed_forms(kind):
    pred, target = torch.rand(200, 4, dtype=torch.float64) * 90, torch.rand(200, 4, dtype=torch.float64) * 90
    expected = torch.tensor([closed_form(p, t, kind) for p, t in zip(pred.tolist(), target.tolist())], dtype=torch.float64)
    torch.testing.assert_close(box_loss(pred, target, kind), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(box_loss(pred.float(), target.float(), kind).double(), expected, rtol=1e-4, atol=1e-5)


def test_box_losses_of_a_hand_worked_case():
    # 4 x 4 inside 4 x 8: I = 16, U = 32, iou = 17 / 33, and the enclosing box is the larger one.
    pred, target = torch.tensor([[2.0, 2, 2, 2]]), torch.tensor([[2.0, 2, 2, 6]])
    assert box_loss(pred, target, "iou").item() == pytest.approx(math.log(33 / 17), rel=1e-5)
    assert box_loss(pred, target, "linear_iou").item() == pytest.approx(16 / 33, rel=1e-5)
    assert box_loss(pred, target, "giou").item() == pytest.approx(16 / 33, rel=1e-5)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_a_perfect_box_costs_nothing(kind):
    ltrb = torch.rand(50, 4) * 100
    torch.testing.assert_close(box_loss(ltrb, ltrb, kind), torch.zeros(50), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_losses_have_the_gradient_of_their_value(kind):
    pred = (torch.rand(20, 4, dtype=torch.float64) * 50 + 1).requires_grad_()
    target = torch.rand(20, 4, dtype=torch.float64) * 50 + 1
    assert torch.autograd.gradcheck(lambda p: box_loss(p, target, kind), pred)


def test_an_unknown_box_loss_is_refused_by_name():
    with pytest.raises(ValueError, match="'nonsense' is unknown; choose one of iou, linear_iou, giou"):
        box_loss(torch.ones(1, 4), torch.ones(1, 4), "nonsense")


def test_no_box_costs_nothing():
    assert box_loss(torch.zeros(0, 4), torch.zeros(0, 4), "giou").shape == (0,)


def test_centerness_is_one_in_the_centre_and_falls_to_the_edges():
    ltrb = torch.tensor([[5.0, 5, 5, 5], [1, 4, 4, 4], [1, 1, 4, 4]])
    torch.testing.assert_close(centerness_target(ltrb), torch.tensor([1.0, 0.5, 0.25]))


def some_case(n=3, locations=20, classes=4, seed=0):
    torch.manual_seed(seed)
    labels = torch.randint(-1, classes, (n, locations))
    labels[torch.rand(n, locations) < 0.6] = -1
    ltrb = torch.rand(n, locations, 4) * 60 + 1
    outputs = SimpleNamespace(logits=torch.randn(n, locations, classes).requires_grad_(),
                              ltrb=(torch.rand(n, locations, 4) * 60).requires_grad_(),
                              centerness=torch.randn(n, locations).requires_grad_())
    return outputs, Targets(labels, torch.where(labels[..., None] >= 0, ltrb, 0.0))


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_fcos_loss_is_the_formula_of_the_paper(kind):
    outputs, targets = some_case()
    positive = targets.labels >= 0
    weight = centerness_target(targets.ltrb[positive]).double()
    cls = 0.0
    for logits, label in zip(outputs.logits.flatten(0, 1).tolist(), targets.labels.flatten().tolist()):
        for c, logit in enumerate(logits):
            p = 1 / (1 + math.exp(-logit))
            cls -= 0.25 * (1 - p) ** 2 * math.log(p) if c == label else 0.75 * p ** 2 * math.log(1 - p)
    boxes = torch.tensor([closed_form(p, t, kind) for p, t in zip(outputs.ltrb[positive].tolist(), targets.ltrb[positive].tolist())],
                         dtype=torch.float64)
    p = outputs.centerness[positive].double().sigmoid()
    bce = -(weight * p.log() + (1 - weight) * (1 - p).log())
    losses = fcos_loss(outputs, targets, kind)
    assert losses["cls"].item() == pytest.approx(cls / (positive.sum().item() + 3), rel=1e-4)
    assert losses["box"].item() == pytest.approx(((boxes * weight).sum() / weight.sum()).item(), rel=1e-4)
    assert losses["centerness"].item() == pytest.approx(bce.mean().item(), rel=1e-4)


def test_losses_and_gradients_of_the_parts_of_a_batch_add_up_to_those_of_the_whole():
    outputs, targets = some_case(n=4)
    targets.labels[3] = -1  # a part without boxes
    targets.ltrb[3] = 0
    whole = fcos_loss(outputs, targets, "giou")
    gradients = torch.autograd.grad(sum(whole.values()), list(vars(outputs).values()))
    over = totals(targets)
    sums = dict.fromkeys(whole, 0.0)
    parts = [[], [], []]
    for n in range(4):
        one = SimpleNamespace(**{k: v[n:n + 1].detach().requires_grad_() for k, v in vars(outputs).items()})
        losses = fcos_loss(one, Targets(targets.labels[n:n + 1], targets.ltrb[n:n + 1]), "giou", over=over)
        for part, gradient in zip(parts, torch.autograd.grad(sum(losses.values()), list(vars(one).values()))):
            part.append(gradient)
        sums = {k: sums[k] + losses[k].item() for k in sums}
    for k in whole:
        assert sums[k] == pytest.approx(whole[k].item(), rel=1e-6)
    for gradient, part in zip(gradients, parts):
        torch.testing.assert_close(torch.cat(part), gradient, rtol=1e-5, atol=1e-8)


def test_images_without_boxes_give_every_output_a_finite_gradient():
    outputs, targets = some_case()
    targets.labels.fill_(-1)
    targets.ltrb.zero_()
    losses = fcos_loss(outputs, targets, "iou")
    assert losses["box"] == 0 and losses["centerness"] == 0 and losses["cls"] > 0
    for gradient in torch.autograd.grad(sum(losses.values()), list(vars(outputs).values())):
        assert gradient.isfinite().all()


def test_background_boxes_that_overflow_do_no_harm():
    outputs, targets = some_case()
    with torch.no_grad():
        outputs.ltrb[targets.labels < 0] = math.inf
    losses = fcos_loss(outputs, targets, "iou")
    (gradient,) = torch.autograd.grad(losses["box"], outputs.ltrb)
    assert losses["box"].isfinite() and gradient.isfinite().all()


def test_box_loss_in_strides_divides_both_boxes():
    outputs, targets = some_case()
    stride = torch.full((20,), 8.0)
    in_strides = SimpleNamespace(logits=outputs.logits, ltrb=outputs.ltrb / 8, centerness=outputs.centerness)
    expected = fcos_loss(in_strides, Targets(targets.labels, targets.ltrb / 8), "giou")["box"]
    torch.testing.assert_close(fcos_loss(outputs, targets, "giou", stride=stride)["box"], expected)


def test_the_demo_prints_closed_forms_with_their_slopes_and_draws_them(tmp_path, capsys):
    our.main(["--out", str(tmp_path / "new" / "loss.png")])
    target, examples = (20.0,) * 4, capsys.readouterr().out.split("\n\n")[1:-1]
    assert len(examples) == 6
    for head, *lines in (example.splitlines() for example in examples):
        pred = [float(v) for v in re.search(r"\[(.*)\]", head)[1].split(",")]
        overlaps = [f"{1 - closed_form(pred, target, kind):.3f}" for kind in ("linear_iou", "giou")]
        assert re.findall(r"IoU (\S+\d)", head) == overlaps
        for kind, line in zip(BOX_LOSSES, lines, strict=True):
            value, *slopes = map(float, re.findall(r"-?\d+\.\d+", line))
            assert line.startswith(f"  {kind} ") and len(slopes) == 4
            assert value == pytest.approx(closed_form(pred, target, kind), abs=1e-4)
            for i, slope in enumerate(slopes):
                low, high = ([v + step * (i == k) for k, v in enumerate(pred)] for step in (-1e-4, 1e-4))
                central = (closed_form(high, target, kind) - closed_form(low, target, kind)) / 2e-4
                assert slope == pytest.approx(central, abs=1e-4)
    with Image.open(tmp_path / "new" / "loss.png") as picture:
        assert picture.size == (960, 620)
