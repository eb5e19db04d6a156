"""model.py: from pixels to detections.  (FCOS, arXiv:1904.01355, Sec. 3; "improved": arXiv:2006.09214)

    images (N, 3, H, W)
      -> ResNet: C3, C4, C5 of stride 8, 16, 32
      -> feature pyramid (arXiv:1612.03144): P3 .. P5 from C3 .. C5; P6 = conv3x3/2 of P5, P7 = conv3x3/2 of relu(P6)
      -> one head, shared by all levels: two towers of conv3x3 + GroupNorm + ReLU, then at each location
           logits      C class scores
           ltrb        distances to the four sides of the box: exp(s * x) in pixels, or improved relu(s * x) strides,
                       with a learned scale s per level
           centerness  how central the location is in its box, which lowers the score of poor boxes
      -> detect: scores, top k of each level, boxes, NMS inside each class, best 100

The ResNet and the pyramid are torchvision's. A frozen BatchNorm is folded into the convolution before it, exactly
and also in training, which saves reading and writing every activation once more.

Letters: N images, L locations over all levels (ordered as in assign.py), C classes, K candidates.
"""

import os
GS=int(os.environ.get("GS","16")); HS=int(os.environ.get("HS","8"))
import copy
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

import csrc
from assign import STRIDES, Locations, make_locations

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
             "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")


class ConfigError(ValueError):
    """A configuration that cannot be built; the message is one sentence with the remedy."""


def option(default, help, choices=None):
    """A field of a configuration that `train.py --help` documents."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """All that a checkpoint needs to be rebuilt and run. Defaults: FCOS as first published."""
    num_classes: int = 80
    backbone: str = option("resnet50", "a torchvision ResNet, ResNeXt or Wide ResNet", BACKBONES)
    backbone_norm: str = option("frozen_batch", "frozen_batch: pretrained; group: learned from scratch", ("frozen_batch", "group"))
    stride_in_1x1: bool = option(False, "whether a bottleneck halves the image in its first 1x1 convolution (Caffe ResNets)")
    frozen_stages: int = option(2, "backbone stages that do not learn: 0 none, 1 the stem, 2 stem and layer1, ...")
    channels: int = option(256, "channels of the pyramid and the head")
    tower_depth: int = option(4, "convolutions in each tower of the head")
    centerness_on_box_tower: bool = option(False, "centerness from the box tower (improved), not the classification tower")
    box_unit: str = option("pixel", "pixel: ltrb = exp(s * x); stride (improved): relu(s * x) * stride", ("pixel", "stride"))
    location_offset: float = option(0.5, "place of a location in its cell, in strides (torchvision: 0)")
    pixel_mean: tuple[float, float, float] = option((123.675, 116.28, 103.53), "RGB, 0..255")
    pixel_std: tuple[float, float, float] = option((58.395, 57.12, 57.375), "RGB, 0..255")
    short_side: int = option(800, "pixels, of a test image after resizing")
    long_side: int = option(1333, "pixels, at most, though the short side gets shorter")
    enlarge: bool = option(True, "whether smaller images are enlarged to that size")
    score_threshold: float = option(0.05, "lowest score of a candidate")
    threshold_on: str = option("class", "score that it is compared with: class, or final (torchvision)", ("class", "final"))
    sqrt_score: bool = option(False, "final score: square root of class * centerness (improved), not the product")
    candidates_per_level: int = option(1000, "best ones that enter NMS")
    nms_iou: float = option(0.6, "a box that overlaps a better one of its class by more is dropped")
    max_detections: int = option(100, "per image")


class Outputs(NamedTuple):
    """What the network says at every location."""
    logits: Tensor      # (N, L, C)
    ltrb: Tensor        # (N, L, 4) float32 pixels
    centerness: Tensor  # (N, L) float32 logits


class Detections(NamedTuple):
    """The objects found in one image, best first."""
    boxes: Tensor   # (K, 4) xyxy pixels of the resized image
    scores: Tensor  # (K,)
    labels: Tensor  # (K,) int64 in [0, C)


# --- backbone ---------------------------------------------------------------------------------------------------------

class FrozenNormConv2d(nn.Conv2d):
    """A convolution with the frozen BatchNorm behind it folded in: conv(x, weight * scale) + shift.

    Linear in its weight, it learns exactly as the pair would. `scale` and `shift` are fixed.
    """

    def __init__(self, conv: nn.Conv2d, norm: torchvision.ops.FrozenBatchNorm2d):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                         conv.dilation, conv.groups, bias=False)
        self.weight = conv.weight
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale)                                         # (out_channels,)
        self.register_buffer("shift", norm.bias - norm.running_mean * scale)         # (out_channels,)

    def folded_weight(self) -> Tensor:
        return self.weight * self.scale.view(-1, 1, 1, 1)

    def forward(self, x):
        return F.conv2d(x, self.folded_weight(), self.shift.to(x.dtype), self.stride, self.padding, self.dilation,
                        self.groups)


class Backbone(nn.Module):
    """A torchvision ResNet up to C3, C4, C5 (stride 8, 16, 32)."""

    def __init__(self, config: ModelConfig, weights: str = "none"):
        super().__init__()
        if config.backbone not in BACKBONES:
            raise ConfigError(f"backbone {config.backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
        frozen_norm = config.backbone_norm == "frozen_batch"
        norm_layer = torchvision.ops.FrozenBatchNorm2d if frozen_norm else lambda channels: nn.GroupNorm(channels // GS, channels)
        resnet = torchvision.models.get_model(config.backbone, norm_layer=norm_layer)
        self.out_channels = [resnet.fc.in_features // 4, resnet.fc.in_features // 2, resnet.fc.in_features]
        load_backbone_weights(resnet, config.backbone, weights)
        del resnet.fc, resnet.avgpool
        if config.stride_in_1x1:
            for block in (resnet.layer2[0], resnet.layer3[0], resnet.layer4[0]):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        if frozen_norm:
            fold_frozen_norms(resnet)
        self.resnet = resnet
        stages = [(resnet.conv1, resnet.bn1), (resnet.layer1,), (resnet.layer2,), (resnet.layer3,), (resnet.layer4,)]
        for stage in stages[:config.frozen_stages]:
            for module in stage:
                module.requires_grad_(False)

    def forward(self, x):
        r = self.resnet
        x = r.maxpool(r.relu(r.bn1(r.conv1(x))))  # stride 4
        c3 = r.layer2(r.layer1(x))                # stride 8
        c4 = r.layer3(c3)                         # stride 16
        return c3, c4, r.layer4(c4)               # stride 32


def fold_frozen_norms(resnet):
    """Replace every convolution and the frozen BatchNorm behind it by one FrozenNormConv2d, in place."""
    for module in list(resnet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                norm_name = "1" if name == "0" else name.replace("conv", "bn")  # downsample.0 -> downsample.1
                setattr(module, name, FrozenNormConv2d(child, getattr(module, norm_name)))
                setattr(module, norm_name, nn.Identity())


def load_backbone_weights(resnet, name: str, weights: str):
    """Fill a torchvision ResNet. `weights`: "none", "imagenet" (downloaded once by torchvision), or a state dict file."""
    if weights == "none":
        return
    if weights == "imagenet":
        entry = torchvision.models.get_model_weights(name).IMAGENET1K_V1 \
            if "IMAGENET1K_V1" in torchvision.models.get_model_weights(name).__members__ \
            else torchvision.models.get_model_weights(name).DEFAULT
        try:
            state = entry.get_state_dict(progress=False, check_hash=True)
        except OSError as error:  # URLError among them
            raise ConfigError(f"the ImageNet weights of {name} could not be downloaded from {entry.url} ({error}); copy "
                             "that file here and give --backbone-weights FILE, or train from random ones with "
                             "--backbone-weights none") from None
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    missing, unexpected = resnet.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith("fc.")]
    unexpected = [key for key in unexpected if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ConfigError(f"{weights}: not the weights of a {name}; missing {missing[:3]}, unexpected {unexpected[:3]}")


# --- head and detector ------------------------------------------------------------------------------------------------

class Head(nn.Module):
    """What is predicted at every location of one level; the same weights for all levels (Sec. 3.2, Fig. 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.centerness_on_box_tower = config.centerness_on_box_tower
        channels = config.channels

        def tower():
            layers = []
            for _ in range(config.tower_depth):
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(channels // HS, channels), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.cls_tower, self.box_tower = tower(), tower()
        self.cls_logits = nn.Conv2d(channels, config.num_classes, 3, padding=1)
        self.box_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        # Every location starts as background with probability 0.99 (arXiv:1708.02002, Sec. 4.1).
        prior = 0.01
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior) / prior))

    def forward(self, p):
        cls_feature, box_feature = self.cls_tower(p), self.box_tower(p)
        centerness = self.centerness(box_feature if self.centerness_on_box_tower else cls_feature)
        return self.cls_logits(cls_feature), self.box_pred(box_feature), centerness


class FCOS(nn.Module):
    """The detector. `backbone_weights`: "none", "imagenet" or a file, see `load_backbone_weights`."""

    def __init__(self, config: ModelConfig, backbone_weights: str = "none"):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, backbone_weights)
        self.fpn = FeaturePyramidNetwork(self.backbone.out_channels, config.channels,
                                         extra_blocks=LastLevelP6P7(config.channels, config.channels))
        self.head = Head(config)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> Outputs:
        """
        Args:
            images: (N, 3, H, W) RGB, uint8 or float 0..255, padded at the right and at the bottom.
            image_sizes: (N, 2) height and width without the padding, which becomes exactly zero; default: no padding.
        """
        x = self.normalize(images, image_sizes)                            # (N, 3, H, W)
        c3, c4, c5 = self.backbone(x)
        pyramid = self.fpn({"p3": c3, "p4": c4, "p5": c5}).values()        # 5 x (N, channels, H/s, W/s)
        logits, ltrb, centerness = [], [], []
        for level, stride in enumerate(STRIDES):
            level_logits, level_box, level_centerness = self.head(list(pyramid)[level])
            level_box = level_box.float() * self.scales[level].float()
            in_pixels = level_box.exp() if self.config.box_unit == "pixel" else level_box.relu() * stride
            logits.append(_by_location(level_logits))
            ltrb.append(_by_location(in_pixels))
            centerness.append(_by_location(level_centerness.float()))
        return Outputs(torch.cat(logits, dim=1), torch.cat(ltrb, dim=1), torch.cat(centerness, dim=1).squeeze(-1))

    def normalize(self, images, image_sizes):
        x = (images.float() - self.pixel_mean) / self.pixel_std
        if image_sizes is not None:
            rows = torch.arange(x.shape[2], device=x.device) < image_sizes[:, :1]   # (N, H)
            columns = torch.arange(x.shape[3], device=x.device) < image_sizes[:, 1:]  # (N, W)
            x = x * (rows[:, None, :, None] & columns[:, None, None, :])
        return x.to(self.head.cls_logits.weight.dtype, memory_format=torch.channels_last)


def _by_location(x):
    return x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, C, H, W) -> (N, H*W, C)


# --- decoding ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def postprocess(outputs: Outputs, locations: Locations, image_sizes: Tensor, config: ModelConfig):
    """Detections of a batch in tensors of fixed size, without waiting for the device (so that a CUDA graph can hold it).

    Args:
        image_sizes: (N, 2) height and width in pixels, to which boxes are clipped.
    Returns: boxes (N, D, 4), scores (N, D) best first, labels (N, D) and the number of detections (N,); what lies
        beyond that number is filling.
    """
    N, L, C = outputs.logits.shape
    scores, labels, chosen = [], [], []
    first = 0
    for level in locations.levels:
        last = first + level.height * level.width
        score = outputs.logits[:, first:last].float().sigmoid()                     # (N, H*W, C)
        final = score * outputs.centerness[:, first:last, None].sigmoid()
        if config.sqrt_score:
            final = final.sqrt()
        judged = score if config.threshold_on == "class" else final
        final = torch.where(judged > config.score_threshold, final, 0.0).flatten(1)  # (N, H*W*C)
        final, index = final.topk(min(config.candidates_per_level, final.shape[1]))  # (N, K)
        scores.append(final)
        labels.append(index % C)
        chosen.append(first + index // C)
        first = last
    scores, labels, chosen = torch.cat(scores, 1), torch.cat(labels, 1), torch.cat(chosen, 1)  # (N, K)

    ltrb = outputs.ltrb.gather(1, chosen[..., None].expand(-1, -1, 4))              # (N, K, 4)
    xy = locations.xy[chosen]                                                       # (N, K, 2)
    boxes = torch.cat([xy - ltrb[..., :2], xy + ltrb[..., 2:]], dim=-1)
    limit = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)               # (N, 1, 4): w, h, w, h
    boxes = torch.minimum(boxes.clamp(min=0), limit)

    image = torch.arange(N, device=labels.device)[:, None]
    group = torch.where(scores > 0, image * C + labels, -1)                         # -1: below the threshold
    keep = csrc.nms_mask(boxes.flatten(0, 1), scores.flatten(), group.flatten(), config.nms_iou).view(scores.shape)
    best, index = torch.where(keep, scores, 0.0).topk(min(config.max_detections, scores.shape[1]))  # (N, D)
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), best, labels.gather(1, index), (best > 0).sum(1)


def detect(outputs: Outputs, locations: Locations, image_sizes, config: ModelConfig) -> list[Detections]:
    """The objects in each image: `postprocess` with the filling cut off.  `image_sizes`: (N, 2) tensor or N (h, w)."""
    image_sizes = torch.as_tensor(image_sizes, device=outputs.logits.device)
    boxes, scores, labels, count = postprocess(outputs, locations, image_sizes, config)
    return [Detections(boxes[n, :k], scores[n, :k], labels[n, :k]) for n, k in enumerate(count.tolist())]


def inference_copy(model: FCOS, dtype=None) -> FCOS:
    """A copy for inference alone: every frozen BatchNorm multiplied into its convolution, weights in `dtype`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FrozenNormConv2d):
                conv = nn.Conv2d(child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding,
                                 child.dilation, child.groups, device=child.weight.device)
                conv.weight = nn.Parameter(child.folded_weight(), requires_grad=False)
                conv.bias = nn.Parameter(child.shift, requires_grad=False)
                setattr(module, name, conv)
    for part in (model.backbone, model.fpn, model.head):
        part.to(dtype=dtype)
    return model.to(memory_format=torch.channels_last)
