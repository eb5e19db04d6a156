"""loss.py: what does a prediction cost?  (FCOS, arXiv:1904.01355, Sec. 3.1 and Eq. 2; linear IoU and GIoU: FCOS_PLUS)

Three losses, summed. With P positive locations and N images, both counted over the *whole* global batch (all
processes, all accumulation steps), and w the centerness target of a positive location:

    cls         focal loss over all locations and classes           / (P + N)
    box         w * one of the losses below, over positives         / sum of w
    centerness  binary cross-entropy to w, over positives           / P

    box losses, with I the intersection and U the union of prediction and target in pixels squared, and A the area
    of the smallest box around both:

    iou = (I + 1) / (U + 1)         "iou"  -log(iou)        "linear_iou"  1 - iou
    giou = iou - (A - U) / A        "giou"  1 - giou

The 1 keeps the logarithm finite. Eq. 2 itself divides by P alone and weights no box; the rest is as the authors' code
has it. Improved FCOS compares in strides instead of pixels, see `fcos_loss`.

The denominators need no prediction, only targets, so that they are known before the forward pass: `totals` computes
them for some images, the training loop adds them up over everything, and the split of a batch changes nothing.

Sums run over all locations, with background masked out, rather than over a gathered list of positives: its length
would be unknown to the host, which would wait for the device once a step.

    python loss.py      what some predictions of a box cost, where the gradients pull them, and the curves of all losses

Letters: N images, L locations, C classes, K rows.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from assign import Targets
from csrc import focal_loss  # its formula stands beside its kernel

BOX_LOSSES = ("iou", "linear_iou", "giou")


class Totals(NamedTuple):
    """The denominators of the losses, each () float32, of some images or of a global batch."""
    num_pos: Tensor      # positive locations
    num_images: Tensor
    centerness: Tensor   # sum of the centerness targets of the positive locations


def box_loss(pred_ltrb: Tensor, target_ltrb: Tensor, kind: str) -> Tensor:
    """IoU loss of each predicted box against its target, both seen from the same location.

    Args:
        pred_ltrb, target_ltrb: (K, 4) distances >= 0, both in pixels or both in strides.
        kind: "iou" (UnitBox, arXiv:1608.01471), "linear_iou" or "giou" (arXiv:1902.09630).
    Returns: (K,).
    """
    if kind not in BOX_LOSSES:
        raise ValueError(f"box loss {kind!r} is unknown; choose one of {', '.join(BOX_LOSSES)}")
    # Both boxes contain the location, so that they overlap by the smaller of each pair of distances.
    inner, outer = torch.minimum(pred_ltrb, target_ltrb), torch.maximum(pred_ltrb, target_ltrb)
    intersection = _area(inner)
    union = _area(pred_ltrb) + _area(target_ltrb) - intersection
    iou = (intersection + 1) / (union + 1)
    if kind == "iou":
        return -iou.log()
    if kind == "linear_iou":
        return 1 - iou
    enclosing = _area(outer) + 1e-7
    return 1 - (iou - (enclosing - union) / enclosing)


def _area(ltrb):
    l, t, r, b = ltrb.unbind(-1)
    return (l + r) * (t + b)


def centerness_target(ltrb: Tensor) -> Tensor:
    """How central a location is in its box: 1 in the centre, 0 on an edge (Eq. 3), NaN for ltrb 0.  (..., 4) -> (...,)"""
    l, t, r, b = ltrb.unbind(-1)
    return (torch.minimum(l, r) / torch.maximum(l, r) * (torch.minimum(t, b) / torch.maximum(t, b))).sqrt()


def _weights(targets):
    positive = targets.labels >= 0                                              # (N, L)
    return positive, torch.where(positive, centerness_target(targets.ltrb), 0.0)


def totals(targets: Targets) -> Totals:
    """The share of these images in the denominators of the losses."""
    positive, weight = _weights(targets)
    return Totals(positive.sum().float(), weight.new_full((), len(weight)), weight.sum())


def fcos_loss(outputs, targets: Targets, kind: str = "iou", over: Totals | None = None,
              stride: Tensor | None = None) -> dict[str, Tensor]:
    """The three losses of some images, as their share in the losses of the global batch.

    Args:
        outputs: logits (N, L, C), ltrb (N, L, 4) pixels, centerness (N, L) logits; `model.Outputs`.
        targets: labels (N, L), ltrb (N, L, 4); from `assign.assign_targets`.
        kind: box loss, see `box_loss`.
        over: denominators of the global batch; default: of these images alone.
        stride: (L,) pixels. Given, the box loss compares distances in strides (arXiv:2006.09214) instead of pixels.
    Returns: {"cls", "box", "centerness"}, each (). Every output takes part, so that every parameter has a gradient
        even where no image has a box.
    """
    over = totals(targets) if over is None else over
    positive, weight = _weights(targets)                                        # (N, L) each

    # A background location has no box: there, target stands for prediction, which costs 0 and has gradient 0.
    pred_ltrb = torch.where(positive[..., None], outputs.ltrb, targets.ltrb)    # (N, L, 4)
    target_ltrb = targets.ltrb
    if stride is not None:
        pred_ltrb, target_ltrb = pred_ltrb / stride[:, None], target_ltrb / stride[:, None]
    box = box_loss(pred_ltrb.reshape(-1, 4), target_ltrb.reshape(-1, 4), kind)  # (N*L,)
    centerness = F.binary_cross_entropy_with_logits(outputs.centerness, weight, reduction="none")  # (N, L)
    return {
        "cls": focal_loss(outputs.logits.flatten(0, 1), targets.labels.flatten(), scale=1 / (over.num_pos + over.num_images)),
        "box": (box * weight.flatten()).sum() / over.centerness.clamp(min=1e-6),
        "centerness": torch.where(positive, centerness, 0.0).sum() / over.num_pos.clamp(min=1),
    }


# --- what it looks like -----------------------------------------------------------------------------------------------

# Colour and width of the curves; where two coincide, both are seen.
CURVES = (("crimson", 6), ("royalblue", 12), ("darkorange", 6), ("seagreen", 4))


def with_gradient(loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (K,) of the rows of x, and its gradient, of the shape of x."""
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def plot(pen, left, top, title, highest, across, ticks, curves: dict[str, Tensor]):
    """Curves of samples at equal distances, in a frame of 520 x 400 pixels with five ticks on either axis."""
    font = ImageFont.load_default(28)
    pen.text((left, top - 64), title, "black", font, "ls")
    pen.text((left + 260, top + 482), across, "black", font, "ms")
    for i, tick in enumerate(ticks):
        x, y = left + 130 * i, top + 400 - 100 * i
        pen.line([(left, y), (left + 520, y)], "gainsboro", 2)
        pen.line([(x, top), (x, top + 400)], "gainsboro", 2)
        pen.text((left - 10, y), f"{highest * i / 4:g}", "black", font, "rm")
        pen.text((x, top + 410), tick, "black", font, "ma")
    for i, (name, curve) in enumerate(curves.items()):
        colour, width = CURVES[i % len(CURVES)]
        pen.text((left + 170 * i, top - 22), name, colour, font, "ls")
        pen.line([(left + 520 * (k + 0.5) / len(curve), top + 400 - 400 * value / highest)
                  for k, value in enumerate(curve.tolist()) if value <= highest], colour, width, joint="curve")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Show the losses and their gradients on a worked example.")
    parser.add_argument("--out", type=Path, default="runs/loss.png", metavar="FILE", help="default: runs/loss.png")
    args = parser.parse_args(argv)
    target = torch.tensor([[20.0, 20, 20, 20]])
    box = {kind: lambda pred, kind=kind: box_loss(pred, target, kind) for kind in BOX_LOSSES}
    print("target ltrb (20, 20, 20, 20); where d loss < 0, the side should be farther away")
    for name, *ltrb in (("too small", 10, 10, 10, 10), ("too large", 40, 40, 40, 40), ("wide and flat", 40, 10, 40, 10),
                        ("shifted", 10, 10, 30, 30), ("shifted to the end", 0, 0, 40, 40), ("exact", 20, 20, 20, 20)):
        pred = torch.tensor([ltrb]).float()                                                 # (1, 4)
        print(f"\n{name} {ltrb}: IoU {1 - box['linear_iou'](pred).item():.3f}, GIoU {1 - box['giou'](pred).item():.3f}")
        for kind, loss in box.items():
            value, gradient = with_gradient(loss, pred)
            numbers = [round(v, 4) + 0.0 for v in (value.item(), *gradient[0].tolist())]    # + 0.0 makes 0 of -0
            print("  {:<10} {:8.4f}    d loss / d ltrb {:8.4f} {:8.4f} {:8.4f} {:8.4f}".format(kind, *numbers))

    u = (torch.arange(128)[:, None] + 0.5) / 128  # (128, 1) in 0 .. 1: no sample lies on a kink of a curve
    focal = {f"gamma {gamma}": lambda logits, gamma=gamma: torch.stack(
        [focal_loss(logit[None], torch.tensor([0]), 1, gamma) for logit in logits]) for gamma in (0, 1, 2)}
    picture = Image.new("RGB", (1920, 1240), "white")  # reduced to half at the end, for smooth lines
    for column, (title, by, x, losses, tops, across, ticks) in enumerate((
            ("box loss", "ltrb", target * 4 ** (2 * u - 1), box, (2.8, 0.2),
             "size / size of the target", "1/4 1/2 1 2 4"),
            ("box loss", "ltrb", target + 20 * u * torch.tensor([-1, -1, 1, 1]), box, (2.8, 0.2),
             "shift in x and in y, pixels", "0 5 10 15 20"),
            ("focal loss, alpha 1", "logit", u.logit(), focal, (2.8, 1.2),
             "p_t, the probability of the right answer", "0 1/4 1/2 3/4 1"))):
        curves = {name: with_gradient(loss, x) for name, loss in losses.items()}
        pen, left = ImageDraw.Draw(picture), 90 + 630 * column
        plot(pen, left, 100, title, tops[0], across, ticks.split(), {name: loss for name, (loss, _) in curves.items()})
        plot(pen, left, 720, f"|d loss / d {by}|", tops[1], across, ticks.split(),
             {name: gradient.norm(dim=1) for name, (_, gradient) in curves.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.reduce(2).save(args.out)
    print(f"\n{args.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
