"""loss.py: what does a prediction cost?  (FCOS, arXiv:1904.01355, Sec. 3.1 and Eq. 2; linear IoU and GIoU: FCOS_PLUS)

Three losses, summed. With P positive locations and N images, both counted over the *whole* global batch (all
processes, all accumulation steps), and w the centerness target of a positive location:

    cls         focal loss over all locations and classes           / (P + N)
    box         w * one of the three losses below, over positives   / sum of w
    centerness  binary cross-entropy to w, over positives           / P

    box losses, with I the intersection and U the union of prediction and target in pixels squared, and A the area
    of the smallest box around both:

    iou = (I + 1) / (U + 1)         "iou"  -log(iou)        "linear_iou"  1 - iou
    giou = iou - (A - U) / A        "giou"  1 - giou

The denominators need no prediction, only targets, so that they are known before the forward pass: `totals` computes
them for some images, the training loop adds them up over everything, and the split of a batch changes nothing.

Sums run over all locations, with background masked out, rather than over a gathered list of positives: its length
would be unknown to the host, which would wait for the device once a step.

Letters: N images, L locations, C classes, K rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
        pred_ltrb, target_ltrb: (K, 4) distances >= 0 in pixels.
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
    """How central a location is in its box: 1 in the centre, 0 on an edge (Eq. 3).  (..., 4) -> (...,)"""
    l, t, r, b = ltrb.unbind(-1)
    return (torch.minimum(l, r) / torch.maximum(l, r) * (torch.minimum(t, b) / torch.maximum(t, b))).sqrt()


def totals(targets: Targets) -> Totals:
    """The share of these images in the denominators of the losses."""
    positive = targets.labels >= 0                                              # (N, L)
    weight = torch.where(positive, centerness_target(targets.ltrb), 0.0)        # (N, L)
    return Totals(positive.sum().float(), weight.new_full((), len(weight)), weight.sum())


def fcos_loss(outputs, targets: Targets, kind: str = "iou", over: Totals | None = None, stride: Tensor | None = None,
              alpha: float = 0.25, gamma: float = 2.0) -> dict[str, Tensor]:
    """The three losses of some images, as their share in the losses of the global batch.

    Args:
        outputs: logits (N, L, C), ltrb (N, L, 4) pixels, centerness (N, L) logits; `model.Outputs`.
        targets: labels (N, L), ltrb (N, L, 4); from `assign.assign_targets`.
        kind: box loss, see `box_loss`.
        over: denominators of the global batch; default: of these images alone.
        stride: (L,) pixels. Given, the box loss compares distances in strides (arXiv:2006.09214) instead of pixels.
        alpha, gamma: of the focal loss.
    Returns: {"cls", "box", "centerness"}, each (). Every output takes part, so that every parameter has a gradient
        even where no image has a box.
    """
    over = totals(targets) if over is None else over
    positive = targets.labels >= 0                                              # (N, L)
    weight = torch.where(positive, centerness_target(targets.ltrb), 0.0)        # (N, L)

    # A background location has no box: there, target stands for prediction, which costs 0 and has gradient 0.
    pred_ltrb = torch.where(positive[..., None], outputs.ltrb, targets.ltrb)    # (N, L, 4)
    target_ltrb = targets.ltrb
    if stride is not None:
        pred_ltrb, target_ltrb = pred_ltrb / stride[:, None], target_ltrb / stride[:, None]
    box = box_loss(pred_ltrb.reshape(-1, 4), target_ltrb.reshape(-1, 4), kind)  # (N*L,)
    centerness = F.binary_cross_entropy_with_logits(outputs.centerness, weight, reduction="none")  # (N, L)
    return {
        "cls": focal_loss(outputs.logits.flatten(0, 1), targets.labels.flatten(), alpha, gamma,
                          scale=1 / (over.num_pos + over.num_images)),
        "box": (box * weight.flatten()).sum() / over.centerness.clamp(min=1e-6),
        "centerness": torch.where(positive, centerness, 0.0).sum() / over.num_pos.clamp(min=1),
    }
