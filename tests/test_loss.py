"""What a prediction costs: closed forms in float64, derivatives, and normalizers."""

import math

import pytest
import torch
import torch.nn.functional as F

from assign import Targets, centerness_target
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


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_a_perfect_box_costs_nothing_and_neither_does_no_box(kind):
    ltrb = torch.rand(50, 4) * 100
    torch.testing.assert_close(box_loss(ltrb, ltrb, kind), torch.zeros(50), atol=1e-5, rtol=0)
    assert box_loss(ltrb[:0], ltrb[:0], kind).shape == (0,)


def test_an_unknown_box_loss_is_refused_by_name():
    with pytest.raises(ValueError, match="'nonsense' is unknown.* iou, linear_iou, giou"):
        box_loss(torch.ones(1, 4), torch.ones(1, 4), "nonsense")


# --- focal loss ---------------------------------------------------------------------------------

def focal_closed_form(logits, labels, alpha, gamma):
    cost = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        for c, logit in enumerate(row):
            p = 1 / (1 + math.exp(-logit))
            p_t, alpha_t = (p, alpha) if c == label else (1 - p, 1 - alpha)
            cost -= alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    return cost


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.4, 1.5), (0.5, 0.0)])
def test_the_focal_loss_equals_its_closed_form(alpha, gamma):
    logits, labels = torch.randn(40, 5) * 4, torch.randint(-1, 6, (40,))  # 5: also background
    expected = focal_closed_form(logits, labels, alpha, gamma)
    assert focal_loss(logits, labels, alpha, gamma).item() == pytest.approx(expected, rel=1e-5)
    scaled = focal_loss(logits, labels, alpha, gamma, scale=torch.tensor(0.125))
    assert scaled.item() == pytest.approx(expected / 8, rel=1e-5)


def test_with_gamma_0_and_alpha_one_half_the_focal_loss_is_half_the_cross_entropy():
    logits, labels = torch.randn(30, 4, requires_grad=True), torch.randint(-1, 4, (30,))
    entropy = F.binary_cross_entropy_with_logits(
        logits, F.one_hot(labels + 1, 5)[:, 1:].float(), reduction="sum") / 2
    loss = focal_loss(logits, labels, 0.5, 0.0)
    torch.testing.assert_close(loss, entropy)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, entropy)))


def test_the_gradient_of_the_focal_loss_is_the_slope_of_its_closed_form():
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, -1, 1, -1])
    gradient = torch.autograd.grad(focal_loss(logits, labels), logits)[0]
    for i in range(6):
        for c in range(3):
            low, high = logits.detach().double(), logits.detach().double()
            low[i, c] -= 1e-5
            high[i, c] += 1e-5
            slope = (focal_closed_form(high, labels, 0.25, 2.0)
                     - focal_closed_form(low, labels, 0.25, 2.0)) / 2e-5
            assert gradient[i, c].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


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
    cls = focal_closed_form(outputs.logits.flatten(0, 1), targets.labels.flatten(), 0.25, 2.0)
    boxes = torch.tensor([closed_form(p, t, kind) for p, t in zip(
        outputs.ltrb[positive].tolist(), targets.ltrb[positive].tolist())])
    p = outputs.centerness[positive].double().sigmoid()
    entropy = -(weight * p.log() + (1 - weight) * (1 - p).log())
    losses = {name: loss.item() for name, loss in fcos_loss(outputs, targets, kind).items()}
    assert losses == pytest.approx({
        "cls": cls / (positive.sum().item() + 3),
        "box": ((boxes * weight).sum() / weight.sum()).item(),
        "centerness": entropy.mean().item()}, rel=1e-4)


def test_losses_and_gradients_of_microbatches_add_up_to_those_of_the_global_batch():
    outputs, targets = some_case(n=4)
    for x, background in zip(targets, (-1, 0, 0)):
        x[3] = background  # a microbatch without boxes
    whole = fcos_loss(outputs, targets, "giou")
    gradients = torch.autograd.grad(sum(whole.values()), outputs)
    sums, parts = dict.fromkeys(whole, 0.0), []
    for n in range(4):
        one = Outputs(*(x[n:n + 1].detach().requires_grad_() for x in outputs))
        losses = fcos_loss(one, Targets(*(x[n:n + 1] for x in targets)), "giou",
                           norm=normalizers(targets))
        parts.append(torch.autograd.grad(sum(losses.values()), one))
        sums = {name: sums[name] + losses[name].item() for name in sums}
    assert sums == pytest.approx({name: loss.item() for name, loss in whole.items()}, rel=1e-6)
    for gradient, part in zip(gradients, zip(*parts)):
        torch.testing.assert_close(torch.cat(part), gradient, rtol=1e-5, atol=1e-8)


def test_normalizers_of_microbatches_add_up_to_those_of_the_global_batch():
    _, targets = some_case(n=4)
    halves = [normalizers(Targets(*(x[half] for x in targets))) for half in (slice(2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(halves).sum(0), normalizers(targets))


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
