"""What a prediction costs: closed forms in float64, derivatives, and normalizers."""

import math

import pytest
import torch

from assign import Targets, centerness_target
from conftest import exact_focal_loss
from loss import BOX_LOSSES, box_loss, fcos_loss, focal_loss, normalizers
from model import Outputs


# --- box losses ---------------------------------------------------------------------------------

def closed_form(pred, target, kind):
    """The loss of one box, in Python's double precision."""
    (l, t, r, b), (L, T, R, B) = pred, target
    intersection = (min(r, R) + min(l, L)) * (min(b, B) + min(t, T))
    union = (l + r) * (t + b) + (L + R) * (T + B) - intersection
    iou = (intersection + 1) / (union + 1)
    enclosing = (max(r, R) + max(l, L)) * (max(b, B) + max(t, T)) + 1e-7
    giou = iou - (enclosing - union) / enclosing
    return {"iou": -math.log(iou), "linear_iou": 1 - iou, "giou": 1 - giou}[kind]


def test_box_losses_of_a_hand_worked_case():
    # 4 x 4 inside 4 x 8: I = 16, U = 32, iou = 17 / 33; the larger one is the enclosing box.
    pred, target = torch.tensor([[2.0, 2, 2, 2]]), torch.tensor([[2.0, 2, 2, 6]])
    for kind, cost in (("iou", math.log(33 / 17)), ("linear_iou", 16 / 33), ("giou", 16 / 33)):
        assert box_loss(pred, target, kind).item() == pytest.approx(cost, rel=1e-5)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_losses_equal_their_closed_forms_and_have_their_gradients(kind):
    pred, target = torch.rand(2, 200, 4, dtype=torch.float64) * 90
    expected = [closed_form(p, t, kind) for p, t in zip(pred.tolist(), target.tolist())]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(box_loss(pred, target, kind), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(box_loss(pred.float(), target.float(), kind).double(), expected,
                               rtol=1e-4, atol=1e-5)
    pred, target = pred[:20].requires_grad_(), target[:20]
    assert torch.autograd.gradcheck(lambda p: box_loss(p, target, kind), pred)


def test_an_unknown_box_loss_is_refused_by_name():
    with pytest.raises(ValueError, match="'nonsense' is unknown.* iou, linear_iou, giou"):
        box_loss(torch.ones(1, 4), torch.ones(1, 4), "nonsense")


# --- focal loss ---------------------------------------------------------------------------------

def test_the_focal_loss_of_a_hand_worked_case():
    loss = focal_loss(torch.tensor([[0.0], [math.log(3)]]), torch.tensor([0, -1]))
    # p_t = 1/2 of an object, 1/4 of a background
    assert loss.item() == pytest.approx(0.25 / 4 * math.log(2) + 0.75 * 9 / 16 * math.log(4))


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.4, 1.5), (0.5, 0.0)])
def test_the_focal_loss_and_its_gradient_equal_their_definition(alpha, gamma):
    logits = (torch.randn(40, 5) * 4).requires_grad_()
    labels = torch.randint(-1, 6, (40,))  # 5: also background
    loss = focal_loss(logits, labels, alpha, gamma, scale=torch.tensor(0.125))
    expected, slope = exact_focal_loss(logits, labels, alpha, gamma, scale=0.125)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradient = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 0.5])
def test_extreme_logits_have_a_finite_loss_and_gradient(gamma):
    logits = torch.tensor([[-1e4, 1e4, 0.0, 120.0, -120.0]] * 5, requires_grad=True)
    loss = focal_loss(logits, torch.arange(5), gamma=gamma)
    assert loss.isfinite() and loss > 0
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


# --- the three losses of images -----------------------------------------------------------------

def some_case(n=3, locations=20, classes=4):
    labels = torch.randint(-classes, classes, (n, locations)).clamp(min=-1)
    ltrb = torch.rand(n, locations, 4) * 60 + 1
    outputs = Outputs(torch.randn(n, locations, classes).requires_grad_(),
                      (torch.rand(n, locations, 4) * 60).requires_grad_(),
                      torch.randn(n, locations).requires_grad_())
    positive = labels >= 0
    return outputs, Targets(labels, ltrb * positive[..., None], centerness_target(ltrb) * positive)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_fcos_loss_is_the_formula_of_the_paper(kind):
    outputs, targets = some_case()
    positive = targets.labels >= 0
    weight = targets.centerness[positive].double()
    cls, _ = exact_focal_loss(outputs.logits.flatten(0, 1), targets.labels.flatten())
    boxes = torch.tensor([closed_form(p, t, kind) for p, t in zip(
        outputs.ltrb[positive].tolist(), targets.ltrb[positive].tolist())])
    p = outputs.centerness[positive].double().sigmoid()
    entropy = -(weight * p.log() + (1 - weight) * (1 - p).log())
    losses = {name: loss.item() for name, loss in fcos_loss(outputs, targets, kind).items()}
    assert losses == pytest.approx({
        "cls": cls.item() / (positive.sum().item() + 3),
        "box": ((boxes * weight).sum() / weight.sum()).item(),
        "centerness": entropy.mean().item()}, rel=1e-4)


def test_losses_and_gradients_of_microbatches_add_up_to_those_of_the_global_batch():
    outputs, targets = some_case(n=4)
    for x, background in zip(targets, (-1, 0, 0)):
        x[3] = background  # a microbatch without boxes
    whole = fcos_loss(outputs, targets, "giou")
    gradients = torch.autograd.grad(sum(whole.values()), outputs)
    sums, parts = dict.fromkeys(whole, 0.0), []
    each = [Targets(*(x[n:n + 1] for x in targets)) for n in range(4)]
    for n, target in enumerate(each):
        one = Outputs(*(x[n:n + 1].detach().requires_grad_() for x in outputs))
        losses = fcos_loss(one, target, "giou", norm=sum(map(normalizers, each)))
        parts.append(torch.autograd.grad(sum(losses.values()), one))
        sums = {name: sums[name] + losses[name].item() for name in sums}
    assert sums == pytest.approx({name: loss.item() for name, loss in whole.items()}, rel=1e-6)
    for gradient, part in zip(gradients, zip(*parts)):
        torch.testing.assert_close(torch.cat(part), gradient, rtol=1e-5, atol=1e-8)


def test_images_without_boxes_give_every_output_a_finite_gradient():
    outputs, targets = some_case()
    targets = Targets(*(torch.full_like(x, b) for x, b in zip(targets, (-1, 0, 0))))
    losses = fcos_loss(outputs, targets, "iou")
    assert losses["box"] == 0 and losses["centerness"] == 0 and losses["cls"] > 0
    for gradient in torch.autograd.grad(sum(losses.values()), outputs):
        assert gradient.isfinite().all()


def test_background_boxes_that_overflow_do_no_harm():
    outputs, targets = some_case()
    with torch.no_grad():
        outputs.ltrb[targets.labels < 0] = math.inf
    loss = fcos_loss(outputs, targets, "iou")["box"]
    assert loss.isfinite() and torch.autograd.grad(loss, outputs.ltrb)[0].isfinite().all()


def test_a_box_loss_in_strides_divides_both_boxes():
    outputs, targets = some_case()
    expected = fcos_loss(outputs._replace(ltrb=outputs.ltrb / 8),
                         targets._replace(ltrb=targets.ltrb / 8), "giou")["box"]
    in_strides = fcos_loss(outputs, targets, "giou", stride=torch.full((20,), 8.0))["box"]
    torch.testing.assert_close(in_strides, expected)
