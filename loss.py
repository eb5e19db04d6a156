"""loss.py: what does a prediction cost?  (FCOS, arXiv:1904.01355, Sec. 3.1 and Eq. 2)

Three losses, summed. P positive locations and N images are counted over the *whole* global batch
(all processes, all microbatches); w is the centerness target of a positive location:

    cls         focal loss over all locations and classes           / (P + N)
    box         w * one of the losses below, over positives         / sum of w
    centerness  binary cross-entropy with target w, over positives  / P

Box losses (linear IoU and GIoU: FCOS_PLUS), with I and U the areas of intersection and union of
prediction and target in pixels squared, and A the area of the smallest box that encloses both:

    iou = (I + 1) / (U + 1)         "iou"  -log(iou)        "linear_iou"  1 - iou
    giou = iou - (A - U) / A        "giou"  1 - giou

The 1 keeps the logarithm finite. Eq. 2 itself divides by P alone and does not weight the boxes;
the rest follows the authors' code. The improved FCOS (arXiv:2006.09214) measures boxes in strides.

The denominators depend on targets, not on predictions, so they are known before the forward pass:
`normalizers` computes them for some images, the training loop sums them over everything, and how
the batch is split changes nothing.

Sums run over all locations with background masked out. Gathering the positives would give a tensor
whose length the host does not know: one host-device sync a step.

Letters: N images, L locations, C classes, K boxes, R = N * L rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import csrc
from assign import Targets

BOX_LOSSES = ("iou", "linear_iou", "giou")


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0,
               scale: Tensor | None = None) -> Tensor:
    """The focal loss of every logit, summed (arXiv:1708.02002, Eq. 5): () float32.

        FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t)

    Each logit is a binary question: is this location an object of class c? p_t is the probability
    given to the right answer. (1 - p_t)^gamma all but removes the many easy background locations.

    Args:
        logits: (R, C); the arithmetic is float32.
        labels: (R,) int64; any label outside [0, C) is background.
        scale: () float32 factor of the sum, held constant. The CUDA kernel computes the gradient
            during the forward pass; a normalizer given here saves it a second pass.
    """
    if logits.is_cuda and csrc.available():
        return csrc.focal_loss(logits, labels, alpha, gamma, scale)
    target = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)  # (R, C)
    z = torch.where(target, logits.float(), -logits.float())    # p_t = sigmoid(z)
    alpha_t = torch.where(target, alpha, 1 - alpha)
    power = torch.exp(-gamma * F.softplus(z))                   # (1 - p_t)^gamma, stable
    loss = (alpha_t * power * F.softplus(-z)).sum()
    return loss if scale is None else loss * scale


def box_loss(pred_ltrb: Tensor, target_ltrb: Tensor, kind: str) -> Tensor:
    """The loss of each predicted box against its target, both seen from the same location.

    Args:
        pred_ltrb, target_ltrb: (..., 4) distances >= 0, both in pixels or both in strides.
        kind: "iou" (arXiv:1608.01471), "linear_iou" or "giou" (arXiv:1902.09630).
    Returns: (...,).
    """
    # Both boxes contain the location, so they overlap by the smaller of each pair of distances.
    intersection = _area(torch.minimum(pred_ltrb, target_ltrb))
    union = _area(pred_ltrb) + _area(target_ltrb) - intersection
    iou = (intersection + 1) / (union + 1)
    if kind == "iou":
        return -iou.log()
    if kind == "linear_iou":
        return 1 - iou
    if kind == "giou":
        enclosing = _area(torch.maximum(pred_ltrb, target_ltrb)) + 1e-7
        return 1 - (iou - (enclosing - union) / enclosing)
    raise ValueError(f"box loss {kind!r} is unknown; choose one of {', '.join(BOX_LOSSES)}")


def _area(ltrb):
    l, t, r, b = ltrb.unbind(-1)
    return (l + r) * (t + b)


def normalizers(targets: Targets) -> Tensor:
    """What these images contribute to the denominators of the losses, (3,) float32: positives,
    images, sum of centerness targets."""
    num_images = targets.centerness.new_full((), len(targets.labels))
    return torch.stack([(targets.labels >= 0).sum(), num_images, targets.centerness.sum()])


def fcos_loss(outputs, targets: Targets, kind: str = "iou", norm: Tensor | None = None,
              stride: Tensor | None = None) -> dict[str, Tensor]:
    """The three losses of some images, as their part of the losses of the global batch.

    Args:
        outputs: logits (N, L, C), ltrb (N, L, 4) pixels, centerness (N, L); `model.Outputs`.
        targets: from `assign.assign_targets`.
        kind: box loss, see `box_loss`.
        norm: (3,) `normalizers` of the global batch; default: of these images alone.
        stride: (L,) pixels. If given, the box loss measures in strides instead of pixels.
    Returns: {"cls", "box", "centerness"}, each (). Every output takes part, so every parameter has
        a gradient even where no image has a box, and DDP does not hang.
    """
    num_pos, num_images, centerness_sum = normalizers(targets) if norm is None else norm
    positive = targets.labels >= 0                                              # (N, L)

    # At background the target stands in for the prediction: finite, no gradient, and weight 0.
    pred_ltrb = torch.where(positive[..., None], outputs.ltrb, targets.ltrb)    # (N, L, 4)
    unit = 1.0 if stride is None else stride[:, None]                           # pixels
    box = box_loss(pred_ltrb / unit, targets.ltrb / unit, kind)                 # (N, L)
    centerness = F.binary_cross_entropy_with_logits(
        outputs.centerness, targets.centerness, reduction="none")               # (N, L)
    return {
        "cls": focal_loss(outputs.logits.flatten(0, 1), targets.labels.flatten(),
                          scale=1 / (num_pos + num_images)),
        "box": (box * targets.centerness).sum() / centerness_sum.clamp(min=1e-6),
        "centerness": torch.where(positive, centerness, 0.0).sum() / num_pos.clamp(min=1),
    }
