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

    python model.py --backbone resnet101 --size 800 1216                    levels, parameters, FLOPs, training memory
    python model.py --export RUN/model.pt2                                  a detector that runs without this code
    python model.py --convert FILE --form fcos_plus --out model.pt          weights of another codebase

Letters: N images, L locations over all levels (ordered as in assign.py), C classes, M locations of a level that are looked
at, K candidates, D detections.
"""

import argparse
import copy
import json
import math
import os
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

import csrc
from assign import STRIDES, Locations, make_locations

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
             "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")


class ConfigError(ValueError):
    """A configuration that cannot be built; the message is one sentence with the remedy."""


def option(default, help, valid=">= 0"):
    """A field of a configuration that `train.py --help` documents. `valid`: of a number a key of LIMITS, of a text the choices."""
    return field(default=default, metadata={"help": help, "valid": valid})


LIMITS = {  # what the numbers of an option must be: in words -> test
    ">= 0": lambda *numbers: min(numbers) >= 0,
    "> 0": lambda *numbers: min(numbers) > 0,
    ">= 1": lambda *numbers: min(numbers) >= 1,
    "in [0, 1]": lambda number: 0 <= number <= 1,
    "in [0, 5]": lambda number: 0 <= number <= 5,
    "a multiple of 8": lambda number: number > 0 and number % 8 == 0,
    ">= 1, lower first": lambda low, high: 1 <= low <= high,
}


def check(config):
    """A ConfigError for the first value that cannot be meant, be it from the command line, from a checkpoint or from code."""
    for f in fields(config):
        value, valid = getattr(config, f.name), f.metadata.get("valid")
        numbers = [v for v in (value if type(value) is tuple else [value]) if type(v) in (int, float)]
        finite = all(abs(v) < 2**32 if type(v) is int else math.isfinite(v) for v in numbers)
        if not same_type(value, f.default):
            must = f"be of type {f.type.__name__}"
        elif type(valid) is tuple and value not in valid:
            must = f"be one of {', '.join(valid)}"
        elif numbers and not (finite and LIMITS[valid](*numbers)):
            must = f"be {valid}" + ", finite, and if whole below 2 ** 32" * (not finite)
        else:
            continue
        raise ConfigError(f"--{f.name.replace('_', '-')} {value!r:.80}: must {must} ({f.metadata.get('help')})")


def same_type(value, default) -> bool:
    """Whether a value is of the type of a field's default; a whole number is a number, too."""
    if type(value) is tuple is type(default):
        return len(value) == len(default) and all(map(same_type, value, default))
    return type(value) is type(default) or (type(value), type(default)) == (int, float)


@dataclass(frozen=True)
class ModelConfig:
    """All that a checkpoint needs to be rebuilt and run. Defaults: FCOS as first published."""
    num_classes: int = option(80, "as many as the data set has", ">= 1")
    backbone: str = option("resnet50", "a torchvision ResNet, ResNeXt or Wide ResNet", BACKBONES)
    backbone_norm: str = option("frozen_batch", "frozen_batch: pretrained; group: learned from scratch", ("frozen_batch", "group"))
    stride_in_1x1: bool = option(False, "whether a bottleneck halves the image in its first 1x1 convolution (Caffe ResNets)")
    frozen_stages: int = option(2, "backbone stages that do not learn: 0 none, 1 the stem, 2 stem and layer1, ...", "in [0, 5]")
    channels: int = option(256, "channels of the pyramid and the head", "a multiple of 8")
    tower_depth: int = option(4, "convolutions in each tower of the head")
    centerness_on_box_tower: bool = option(False, "centerness from the box tower (improved), not the classification tower")
    box_unit: str = option("pixel", "pixel: ltrb = exp(s * x); stride (improved): relu(s * x) * stride", ("pixel", "stride"))
    location_offset: float = option(0.5, "place of a location in its cell, in strides (torchvision: 0)", "in [0, 1]")
    location_spacing: str = option("stride", "of detections; even: as torchvision's, see `evenly_spaced`", ("stride", "even"))
    pixel_mean: tuple[float, float, float] = option((123.675, 116.28, 103.53), "RGB, 0..255")
    pixel_std: tuple[float, float, float] = option((58.395, 57.12, 57.375), "RGB, 0..255", "> 0")
    short_side: int = option(800, "pixels, of a test image after resizing", ">= 1")
    long_side: int = option(1333, "pixels, at most, though the short side gets shorter; of training images, too", ">= 1")
    enlarge: bool = option(True, "whether smaller images are enlarged to that size; training images, too")
    score_threshold: float = option(0.05, "lowest score of a candidate", "in [0, 1]")
    threshold_on: str = option("class", "score that it is compared with: class, or final (torchvision)", ("class", "final"))
    sqrt_score: bool = option(False, "final score: square root of class * centerness (improved), not the product")
    candidates_per_level: int = option(1000, "best ones that enter NMS", ">= 1")
    nms_iou: float = option(0.6, "a box that overlaps a better one of its class by more is dropped", "in [0, 1]")
    max_detections: int = option(100, "per image", ">= 1")

    def __post_init__(self):
        check(self)


IMPROVED = dict(box_unit="stride", centerness_on_box_tower=True, sqrt_score=True)  # of the second paper


class Outputs(NamedTuple):
    """What the network says at every location."""
    logits: Tensor      # (N, L, C)
    ltrb: Tensor        # (N, L, 4) float32 pixels
    centerness: Tensor  # (N, L) float32 logits


class Detections(NamedTuple):
    """The objects found in one image, best first."""
    boxes: Tensor   # (D, 4) xyxy pixels of the resized image
    scores: Tensor  # (D,)
    labels: Tensor  # (D,) int64 in [0, C)


# --- backbone ---------------------------------------------------------------------------------------------------------

class FrozenNormConv2d(nn.Conv2d):
    """A convolution with the frozen BatchNorm behind it folded in: conv(x, weight * scale) + shift, linear in its weight."""

    def __init__(self, conv: nn.Conv2d, norm: torchvision.ops.FrozenBatchNorm2d):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                         conv.dilation, conv.groups, bias=False)
        self.weight = conv.weight
        scale, shift = scale_and_shift(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
        self.register_buffer("scale", scale)  # (out_channels,)
        self.register_buffer("shift", shift)  # (out_channels,)

    def folded_weight(self) -> Tensor:
        return self.weight * self.scale.view(-1, 1, 1, 1)

    def forward(self, x):
        return F.conv2d(x, self.folded_weight(), self.shift.to(x.dtype), self.stride, self.padding, self.dilation,
                        self.groups)


def scale_and_shift(weight, bias, mean, var, eps):
    """A frozen BatchNorm, weight * (x - mean) / sqrt(var + eps) + bias, as scale * x + shift; all (channels,)."""
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale


class Backbone(nn.Module):
    """A torchvision ResNet up to C3, C4, C5 (stride 8, 16, 32)."""

    def __init__(self, config: ModelConfig, weights: str = "none"):
        super().__init__()
        frozen_norm = config.backbone_norm == "frozen_batch"
        # Groups of 16 channels (arXiv:1803.08494, Sec. 4.1): on a CPU, smaller ones make the backward pass several times slower.
        norm_layer = torchvision.ops.FrozenBatchNorm2d if frozen_norm else lambda channels: nn.GroupNorm(channels // 16, channels)
        resnet = torchvision.models.get_model(config.backbone, norm_layer=norm_layer)
        self.out_channels = [resnet.fc.in_features // 4, resnet.fc.in_features // 2, resnet.fc.in_features]
        del resnet.fc, resnet.avgpool
        load_backbone_weights(resnet, config.backbone, weights)
        if config.stride_in_1x1:
            for block in (resnet.layer2[0], resnet.layer3[0], resnet.layer4[0]):
                if hasattr(block, "conv3"):  # a bottleneck; the blocks of ResNet-18 and 34 have no 1x1 convolution
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        if frozen_norm:
            fold_frozen_norms(resnet)
        self.resnet = resnet
        stem = nn.ModuleList([resnet.conv1, resnet.bn1])
        for stage in (stem, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)[:config.frozen_stages]:
            stage.requires_grad_(False)

    def forward(self, x):
        r = self.resnet
        x = r.maxpool(r.relu(r.bn1(r.conv1(x))))  # stride 4
        c3 = r.layer2(r.layer1(x))                # stride 8
        c4 = r.layer3(c3)                         # stride 16
        return c3, c4, r.layer4(c4)               # stride 32


def fold_frozen_norms(resnet):
    """Replace every convolution and the frozen BatchNorm behind it by one FrozenNormConv2d, in place."""
    for name, norm in list(resnet.named_modules()):
        if isinstance(norm, torchvision.ops.FrozenBatchNorm2d):
            conv = conv_before(name)
            resnet.set_submodule(conv, FrozenNormConv2d(resnet.get_submodule(conv), norm))
            resnet.set_submodule(name, nn.Identity())


def conv_before(norm: str) -> str:
    """The name of the convolution before a norm in a ResNet: conv1 before bn1, downsample.0 before downsample.1."""
    return re.sub(r"bn(\d)$", r"conv\1", norm).replace("downsample.1", "downsample.0")


def load_backbone_weights(resnet, name: str, weights: str):
    """Fill a torchvision ResNet. `weights`: "none", "imagenet", or a state dict file."""
    if weights == "none":
        return
    if weights == "imagenet":
        state = download(torchvision.models.get_model_weights(name).IMAGENET1K_V1,
                         "give --backbone-weights FILE, or train from random weights with --backbone-weights none")
    else:
        state = load_weights(weights)
    state = {key: value for key, value in state.items() if not key.startswith("fc.") and not key.endswith("num_batches_tracked")}
    if wrong := misfits(resnet, state):
        raise ConfigError(f"{weights}: not the weights of a {name}; {len(wrong)} names or shapes differ: {', '.join(wrong[:3])}")
    resnet.load_state_dict(state)


def download(entry, remedy: str) -> dict[str, Tensor]:
    """Published weights, by torchvision, once."""
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:  # URLError among them
        raise ConfigError(f"{entry.url} could not be downloaded ({error}); copy that file here and {remedy}") from None


def misfits(model: nn.Module, state: dict) -> list[str]:
    """The names under which a state dict has not what the model expects, with both shapes."""
    def shapes(entries):
        return {str(key): tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else "no weight"
                for key, value in entries.items()}

    expected, found = shapes(model.state_dict()), shapes(state)
    return [f"{key!r:.80} (expected {expected.get(key, 'nothing')}, found {found.get(key, 'nothing')})"
            for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]


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
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(channels // 8, channels),
                           nn.ReLU(inplace=True)]
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
        pyramid = self.fpn({"p3": c3, "p4": c4, "p5": c5}).values()        # 5 x (N, channels, ceil(H/s), ceil(W/s))
        logits, ltrb, centerness = [], [], []
        for p, stride, scale in zip(pyramid, STRIDES, self.scales):
            level_logits, level_box, level_centerness = self.head(p)
            level_box = level_box.float() * scale.float()
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
def candidates(outputs: Outputs, locations: Locations, image_sizes: Tensor, config: ModelConfig):
    """The best boxes of each level, before NMS: boxes (N, K, 4), scores (N, K), 0 for filling, and labels (N, K).

    Every shape is known beforehand, and nothing waits for the device. `image_sizes` (N, 2): height and width in
    pixels, to which boxes are clipped.
    """
    C, most = outputs.logits.shape[2], config.candidates_per_level
    scores, labels, chosen = [], [], []
    first = 0
    for level in locations.levels:
        last = first + level.height * level.width
        logits, centerness = outputs.logits[:, first:last], outputs.centerness[:, first:last, None]
        # The `most` best of H*W*C scores are found at the `most` locations whose best class is best: look only there.
        best = final_scores(logits.amax(-1, keepdim=True), centerness, config).squeeze(-1)   # (N, H*W)
        cell = best.topk(min(most, last - first)).indices[..., None]                         # (N, M, 1)
        logits, centerness = logits.gather(1, cell.expand(-1, -1, C)), centerness.gather(1, cell)
        score = final_scores(logits, centerness, config).flatten(1)                          # (N, M*C)
        score, index = score.topk(min(most, score.shape[1]))                                 # (N, K)
        scores.append(score)
        labels.append(index % C)
        chosen.append(first + cell.squeeze(-1).gather(1, index // C))
        first = last
    scores, labels, chosen = torch.cat(scores, 1), torch.cat(labels, 1), torch.cat(chosen, 1)  # (N, K)

    ltrb = outputs.ltrb.gather(1, chosen[..., None].expand(-1, -1, 4))              # (N, K, 4)
    xy = (locations.xy if config.location_spacing == "stride" else evenly_spaced(locations))[chosen]  # (N, K, 2)
    boxes = torch.cat([xy - ltrb[..., :2], xy + ltrb[..., 2:]], dim=-1)
    limit = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)               # (N, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limit), scores, labels


@torch.no_grad()
def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, config: ModelConfig, nms_mask=csrc.nms_mask):
    """NMS inside each class of each image, and the best of what it leaves.

    Returns: boxes (N, D, 4), scores (N, D) best first, labels (N, D) and the number of detections (N,); what lies
        beyond that number is filling. Without waiting for the device, so that a CUDA graph can hold it.
    """
    image = torch.arange(scores.shape[0], device=scores.device)[:, None]            # not len: it would fix N in an export
    group = torch.where(scores > 0, image * config.num_classes + labels, -1)        # -1: filling
    keep = nms_mask(boxes.flatten(0, 1), scores.flatten(), group.flatten(), config.nms_iou).view(scores.shape)
    best, index = torch.where(keep, scores, 0.0).topk(min(config.max_detections, scores.shape[1]))  # (N, D)
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), best, labels.gather(1, index), (best > 0).sum(1)


def final_scores(logits, centerness, config: ModelConfig):
    """Scores that rank candidates, 0 below the threshold. logits (N, M, C), centerness (N, M, 1) -> (N, M, C)."""
    score = logits.float().sigmoid()
    final = score * centerness.sigmoid()
    if config.sqrt_score:
        final = final.sqrt()
    judged = score if config.threshold_on == "class" else final
    return torch.where(judged > config.score_threshold, final, 0.0)


def evenly_spaced(locations: Locations) -> Tensor:
    """Where torchvision's detector puts locations: (L, 2).

    Its rows are H // (number of rows) pixels apart. That is less than a stride where the stride does not divide the
    padded height: P7 has 7 rows in 800 pixels, 114 apart instead of 128. Columns likewise.
    """
    stride, rows, columns = locations.levels[0]
    of_levels = locations.xy.split([level.height * level.width for level in locations.levels])
    return torch.cat([torch.stack([xy[:, 0] / level.stride * (stride * columns // level.width),
                                   xy[:, 1] / level.stride * (stride * rows // level.height)], dim=1)
                      for xy, level in zip(of_levels, locations.levels)])


def detect(outputs: Outputs, locations: Locations, image_sizes, config: ModelConfig) -> list[Detections]:
    """The objects in each image.  `image_sizes`: (N, 2) tensor or N (h, w), pixels."""
    image_sizes = torch.as_tensor(image_sizes, device=outputs.logits.device)
    return cut(*suppress(*candidates(outputs, locations, image_sizes, config), config))


def cut(boxes, scores, labels, count) -> list[Detections]:
    """What `suppress` returns, without the filling."""
    return [Detections(boxes[n, :k], scores[n, :k], labels[n, :k]) for n, k in enumerate(count.tolist())]


# --- a detector ready for use -----------------------------------------------------------------------------------------

def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 (without instructions for it, a CPU is slower than in float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """What the network computes in. `precision`: "bf16", "fp32", or "auto"."""
    bf16 = precision == "bf16" or precision == "auto" and bf16_is_fast(device)
    return torch.bfloat16 if bf16 else torch.float32


class Detector:
    """A model made fast for inference: frozen norms multiplied in, weights in the precision, and on a GPU a CUDA graph
    of everything from pixels to final boxes for every shape of input that comes a second time."""

    def __init__(self, model: FCOS, device: torch.device, precision: str = "auto"):
        self.config, self.device = model.config, device
        self.model = inference_copy(model, dtype_of(precision, device)).to(device)
        self.graphs = {}  # shape of images -> None where it was seen once, then the graph, its inputs and its outputs
        self.pool = None  # of memory, one for all graphs: results are copied away before another one runs

    @torch.inference_mode()
    def __call__(self, images: Tensor, image_sizes: Tensor) -> list[Detections]:
        """Detections on the CPU. images (N, 3, H, W) uint8 and image_sizes (N, 2), on any device."""
        shape = tuple(images.shape)
        if self.device.type == "cuda" and shape in self.graphs and csrc.available():
            found = self._replay(shape, images, image_sizes)
        else:
            found = suppress(*self.candidates(images, image_sizes), self.config)
            self.graphs[shape] = None
        return cut(*(x.cpu() for x in found))

    @torch.inference_mode()
    def candidates(self, images, image_sizes):
        """What the function `candidates` finds in images, on the device."""
        images, image_sizes = images.to(self.device, non_blocking=True), image_sizes.to(self.device, non_blocking=True)
        locations = make_locations(*images.shape[2:], offset=self.config.location_offset, device=self.device)
        return candidates(self.model(images, image_sizes), locations, image_sizes, self.config)

    def _replay(self, shape, *inputs):
        if self.graphs[shape] is None:
            held, graph = [torch.empty_like(x, device=self.device) for x in inputs], torch.cuda.CUDAGraph()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # the loader pins memory meanwhile
                found = suppress(*self.candidates(*held), self.config)
            self.graphs[shape] = graph, held, found
        graph, held, found = self.graphs[shape]
        for place, new in zip(held, inputs):
            place.copy_(new, non_blocking=True)
        graph.replay()
        return found


def inference_copy(model: FCOS, dtype: torch.dtype) -> FCOS:
    """A copy for inference alone: every frozen BatchNorm multiplied into its convolution, weights in `dtype`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, folded in list(model.named_modules()):
        if isinstance(folded, FrozenNormConv2d):
            conv = nn.Conv2d(folded.in_channels, folded.out_channels, folded.kernel_size, folded.stride, folded.padding,
                             folded.dilation, folded.groups, device=folded.weight.device)
            conv.weight = nn.Parameter(folded.folded_weight(), requires_grad=False)
            conv.bias = nn.Parameter(folded.shift, requires_grad=False)
            model.set_submodule(name, conv)
    for part in (model.backbone, model.fpn, model.head):
        part.to(dtype=dtype)
    return model.to(memory_format=torch.channels_last)


class ExportedDetector(nn.Module):
    """From pixels to detections on a canvas of one size, in operators that PyTorch and torchvision bring: what
    `export` writes runs without this code."""

    def __init__(self, model: FCOS, height: int, width: int, nms_dtype: torch.dtype):
        super().__init__()
        self.model = inference_copy(model, torch.float32).to(memory_format=torch.contiguous_format)  # else a warning on saving
        self.locations = make_locations(height, width, offset=model.config.location_offset)
        self.nms_dtype, self.apart = nms_dtype, max(height, width) + 1

    def forward(self, images, image_sizes):
        config = self.model.config
        found = candidates(self.model(images, image_sizes), self.locations, image_sizes, config)
        return suppress(*found, config, self.nms_mask)

    def nms_mask(self, boxes, scores, groups, iou_threshold):
        """One NMS for all groups, moved so far apart that they do not meet; float64 still tells them to 1e-9 pixels."""
        boxes = boxes.to(self.nms_dtype) + groups[:, None] * self.apart
        kept = torchvision.ops.nms(boxes, scores.to(self.nms_dtype), iou_threshold)
        return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True) & (groups >= 0)


def export(model: FCOS, categories: dict, path, height: int, width: int):
    """Write a detector that runs without this code, on the CPU: .pt2 by torch.export for any batch, .onnx for one image.
    (torch.export.passes.move_to_device_pass takes a .pt2 to a GPU.)

    Inputs: images (N, 3, height, width) uint8 RGB, padded at the right and at the bottom, image_sizes (N, 2) int64.
    Outputs: boxes (N, D, 4) xyxy pixels of the canvas, scores (N, D), labels (N, D), and how many of the D are meant (N,).
    """
    onnx = Path(path).suffix == ".onnx"
    module = ExportedDetector(model, height, width, torch.float32 if onnx else torch.float64).eval()
    N = 1 if onnx else 2  # an example; a batch of 1 would be taken for a constant
    example = torch.zeros(N, 3, height, width, dtype=torch.uint8), torch.tensor([[height, width]] * N)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=None if onnx else ({0: batch}, {0: batch}))
    if onnx:
        try:
            program = torch.onnx.export(program, input_names=("images", "image_sizes"), dynamo=True, verbose=False,
                                        output_names=("boxes", "scores", "labels", "count"))
        except ImportError as error:
            raise ConfigError(f"{path}: an ONNX file needs packages that are not here ({error}); pip install onnx onnxscript, "
                              "or export to .pt2") from None

    def write(file):
        if onnx:
            file.write(program.model_proto.SerializeToString())
        else:
            torch.export.save(program, file, extra_files={"categories.json": json.dumps(categories)})

    write_whole(path, write, "free some space, or name another file with --export")


# --- checkpoints ------------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = 2


def write_whole(path, write, remedy):
    """`write`(file) under another name, to the disk, then rename: a kill at any moment leaves a whole file or none."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error}); {remedy}") from None


def checkpoints_of(run) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted(Path(run).glob("checkpoint-*.pt"), reverse=True)


def load_checkpoint(path) -> dict:
    """A checkpoint: from a file, the newest undamaged one of a run folder, or "torchvision", its published detector."""
    if str(path) == "torchvision":
        return published_checkpoint()
    files = checkpoints_of(path) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise ConfigError(f"{path}: no checkpoint-*.pt here; train first, or name another run or file")
    for file in files:
        try:
            checkpoint = load_file(file)
            break
        except ConfigError as error:
            if file is files[-1]:
                raise ConfigError(f"{error}; name another run or file") from None
            print(f"{error}; passed over", file=sys.stderr, flush=True)
    check_checkpoint(checkpoint, file)
    return checkpoint


def load_file(path):
    """torch.load, of nothing that can be executed, after what it leaves out: the CRC-32 of every record in the archive.

    Without that a bit that flipped on a disk is another weight, without a word. (Files of before PyTorch 1.6 have no checksums.)
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                with zipfile.ZipFile(file) as archive:
                    # Of a record with the mark of a folder, which no checksum covers, PyTorch reads nothing and keeps
                    # what the memory held.
                    if archive.testzip() or any(record.external_attr & 0x10 for record in archive.infolist()):
                        raise zipfile.BadZipFile("a record is not as it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file or folder") from None
    except Exception as error:  # whatever a damaged file makes torch raise
        if held := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConfigError(f"{path}: refused, since it holds a Python object ({held[1]}), and loading one can run any code; if "
                              "you trust its author, save the weights alone: "
                              'torch.save(torch.load(FILE, weights_only=False)["model"], NEW)') from None
        raise ConfigError(f"{path}: damaged, or not a file of PyTorch ({type(error).__name__})") from None


def rebuilt(Config, values: dict, source, remedy="use the version of the code that wrote it"):
    """The configuration in a checkpoint. It has every field and no other: none takes today's default without a word."""
    differ = sorted(map(str, values.keys() ^ {f.name for f in fields(Config)}))
    try:
        if not differ:
            return Config(**values)
        reason = f"{len(differ)} fields are missing or unknown: {', '.join(differ[:5])}"
    except ConfigError as error:
        reason = str(error)
    raise ConfigError(f"{source}: its {Config.__name__} is not one of this version of the code ({reason}); {remedy}")


def check_checkpoint(checkpoint, file):
    """See that a checkpoint has what this code writes, and the very weights that its configuration asks for."""
    def demand(good, what):
        if not good:
            raise ConfigError(f"{file}: {what}; use the version of the code that wrote it, or, for weights of another codebase, "
                            "python model.py --convert")

    version = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    demand(type(version) is int and version == CHECKPOINT_FORMAT,
           f"not a checkpoint of this version of the code (format {version!r:.80}, not {CHECKPOINT_FORMAT})")
    for key, kind in {"step": int, "model": dict, "config": dict, "categories": dict}.items():
        demand(isinstance(checkpoint.get(key), kind), f"its {key!r} is missing or of another type")
    trained, categories = checkpoint["config"], checkpoint["categories"]
    for key, kind in {"model": dict, "data": str, "val_split": str}.items():
        demand(isinstance(trained.get(key), kind), f"its configuration's {key!r} is missing or of another type")
    config = rebuilt(ModelConfig, trained["model"], file)
    with torch.device("meta"):
        wrong = misfits(FCOS(config), checkpoint["model"])
    demand(not wrong, f"its weights are not its configuration's; {len(wrong)} names or shapes differ: {', '.join(wrong[:3])}")
    for key, kind in {"ids": int, "names": str}.items():
        column = categories.get(key)
        demand(isinstance(column, list) and len(column) == config.num_classes and all(type(v) is kind for v in column),
               f"its categories have not {config.num_classes} {key}")


def build_detector(checkpoint: dict) -> FCOS:
    """The model of a checkpoint, with its weights."""
    model = FCOS(ModelConfig(**checkpoint["config"]["model"]))
    model.load_state_dict(checkpoint["model"])
    return model


# --- weights from elsewhere -------------------------------------------------------------------------------------------

COCO_CLASSES = {i: name for i, name in enumerate(FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
        if name not in ("__background__", "N/A")}  # category id -> name; 80 of 1 .. 90
CAFFE = dict(stride_in_1x1=True, pixel_mean=(122.7717, 115.9465, 102.9801), pixel_std=(1.0, 1.0, 1.0))
FORMS = {  # what the weights of a codebase mean, beyond their names and shapes
    "torchvision": IMPROVED | dict(location_offset=0.0, location_spacing="even", score_threshold=0.2, threshold_on="final"),
    "fcos_plus": CAFFE,              # FCOS_PLUS, and FCOS as first published (maskrcnn-benchmark)
    "fcos_imprv": CAFFE | IMPROVED,  # FCOS with NORM_REG_TARGETS and CENTERNESS_ON_REG
}
RENAMES = (  # applied in this order
    (r"^module\.", ""),                                                                      # DDP
    (r"^backbone\.body\.(stem\.)?", "backbone.resnet."),
    (r"^backbone\.fpn\.(fpn_)?", "fpn."),
    (r"^fpn\.top_blocks\.", "fpn.extra_blocks."),
    (r"^fpn\.(inner|layer)([234])\.", lambda m: f"fpn.{m[1]}_blocks.{int(m[2]) - 2}.0."),    # maskrcnn-benchmark
    (r"^fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)$", r"fpn.\1_blocks.\2.0.\3"),       # torchvision before 0.14
    (r"^rpn\.head\.", "head."),
    (r"^head\.scales\.(\d)\.scale$", r"scales.\1"),
    (r"^head\.(bbox_tower|regression_head\.conv)\.", "head.box_tower."),
    (r"^head\.(bbox_pred|regression_head\.bbox_reg)\.", "head.box_pred."),
    (r"^head\.regression_head\.bbox_ctrness\.", "head.centerness."),
    (r"^head\.classification_head\.conv\.", "head.cls_tower."),
    (r"^head\.classification_head\.", "head."),
)


def load_weights(path) -> dict[str, Tensor]:
    """The state dict in a file, alone or under "model"."""
    loaded = load_file(path)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ConfigError(f'{path}: holds no state dict (names and tensors), neither alone nor under "model"')
    return state


def convert(weights: dict[str, Tensor], form: str, source="the weights", **changes) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Weights of another codebase in our names, with all their class rows, and the configuration that gives them their meaning.

    The backbone is the one whose names and shapes fit. `changes`: fields that neither the names nor the form tell.
    """
    state = {}
    for key, value in weights.items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        if not key.endswith("num_batches_tracked"):
            state[key] = value.float()
    for norm in [key.removesuffix(".running_var") for key in state if key.endswith(".running_var")]:
        names = [f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        if len({state[name].shape if name in state else None for name in names}) > 1:
            continue  # not a whole norm: what is left of it fits no model below
        statistics = [state.pop(name) for name in names]
        conv, eps = conv_before(norm), 1e-5 if form == "torchvision" else 0.0
        state[f"{conv}.scale"], state[f"{conv}.shift"] = scale_and_shift(*statistics, eps)
    if form == "torchvision":
        state["scales"] = torch.ones(len(STRIDES))
    elif scales := [state.pop(key) for key in sorted(state) if key.startswith("scales.")]:
        state["scales"] = torch.cat([scale.flatten() for scale in scales])
        if (stem := "backbone.resnet.conv1.weight") in state and state[stem].ndim == 4:
            state[stem] = state[stem].flip(1)  # BGR -> RGB

    config = ModelConfig(num_classes=max(1, state.get("head.cls_logits.bias", torch.empty(0)).numel()), **FORMS[form] | changes)
    tried = {}  # backbone -> what does not fit it
    for backbone in BACKBONES:
        in_1x1 = config.stride_in_1x1 and not backbone.startswith("resnext")  # their ResNeXts halve in the 3x3
        fitting = replace(config, backbone=backbone, stride_in_1x1=in_1x1)
        with torch.device("meta"):
            tried[backbone] = misfits(FCOS(fitting), state)
        if not tried[backbone]:
            return fitting, state
    nearest = min(tried, key=lambda backbone: len(tried[backbone]))
    raise ConfigError(f"{source}: not a detector of the form {form} (known: {', '.join(FORMS)}); of the nearest, with {nearest}, "
                      f"{len(tried[nearest])} names or shapes differ: {', '.join(tried[nearest][:3])}")


def import_checkpoint(weights: dict[str, Tensor], form: str, categories_file=None, source="the weights", **changes) -> dict:
    """A checkpoint of this codebase from the weights of another: its classes are named, in the order of their ids.

    In torchvision's form the row of a class is its category id. Of COCO's 91 rows the 80 that have a name are kept.
    """
    config, state = convert(weights, form, source, **changes)
    C, row_is_id = config.num_classes, form == "torchvision"
    first = 0 if row_is_id else 1
    listed = COCO_CLASSES if C == (91 if row_is_id else 80) else {i: f"class {i}" for i in range(first, first + C)}
    if categories_file:
        try:
            listed = {c["id"]: c["name"] for c in json.loads(Path(categories_file).read_text())["categories"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{categories_file}: no COCO categories can be read from it ({error!r})") from None
    row = {i: i if row_is_id else place for place, i in enumerate(listed)}
    ids = sorted(row)
    fits = ids and 0 <= ids[0] and ids[-1] < C if row_is_id else len(ids) == C
    if not fits:
        raise ConfigError(f"{categories_file}: its {len(ids)} categories do not fit the {C} class rows of {source}" +
                          (", where a class is in the row of its category id" if row_is_id else ""))
    for part in ("head.cls_logits.weight", "head.cls_logits.bias"):
        state[part] = state[part][[row[i] for i in ids]]
    return {"format": CHECKPOINT_FORMAT, "step": 0, "model": state,
            "config": {"model": asdict(replace(config, num_classes=len(ids))), "data": "", "val_split": ""},
            "categories": {"ids": ids, "names": [listed[i] for i in ids]}}


def published_checkpoint() -> dict:
    """torchvision's detector trained on COCO."""
    entry = FCOS_ResNet50_FPN_Weights.COCO_V1
    weights = download(entry, f"run: python model.py --convert {Path(entry.url).name} --form torchvision --out model.pt")
    return import_checkpoint(weights, "torchvision", source=entry.url)


# --- what a detector costs --------------------------------------------------------------------------------------------

def describe(config: ModelConfig, height: int, width: int) -> str:
    """Levels, parameters, FLOPs and training memory for one image; on the meta device, where tensors are shapes alone."""
    with torch.device("meta"):
        model, images = FCOS(config), torch.empty(1, 3, height, width)
    saved = {}  # storage -> what autograd keeps for the backward pass

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(images)
    # Of what is kept, weights and their folded copies do not begin with the dimension of the one image.
    activations = sum(tensor.untyped_storage().nbytes() for tensor in saved.values() if tensor.shape[:1] == (1,)) / 2**20

    lines = [f"{config.backbone}, {config.num_classes} classes, one image of {height} x {width}",
             *(f"{name} {tuple(x.shape)}" for name, x in outputs._asdict().items()), "",
             "level  stride  cells (h x w)  max(l, t, r, b) of its boxes"]
    locations = make_locations(height, width)
    for number, level in enumerate(locations.levels, start=3):
        lowest, highest = locations.size_range[locations.stride == level.stride][0].clamp(min=0).tolist()
        lines.append(f"P{number}     {level.stride:6}  {f'{level.height} x {level.width}':<13}  {lowest:.0f} .. {highest:.0f}")
    lines += ["", "part       parameters   learned   GFLOPs (2 per multiply-add)"]
    for name, part in {"backbone": model.backbone, "fpn": model.fpn, "head": model.head, "all": model}.items():
        total = sum(p.numel() for p in part.parameters())
        learned = sum(p.numel() for p in part.parameters() if p.requires_grad)
        flops = sum(counter.get_flop_counts()["FCOS" if part is model else f"FCOS.{name}"].values())
        lines.append(f"{name:<10} {total / 1e6:8.2f} M {learned / 1e6:7.2f} M {flops / 1e9:8.1f}")
    lines += ["", f"training in float32, MiB: weights {4 * total / 2**20:.0f}, gradients and momentum {4 * learned / 2**20:.0f} each;",
              f"for each image {activations:.0f} kept for the backward pass (without losses and workspace)"]
    return "\n".join(lines)


# --- configurations on the command line -------------------------------------------------------------------------------

def add_options(parser, config, without=None):
    """Give argparse an option for every field of a configuration. `given` reads them."""
    for f in fields(config):
        if f.metadata and f.name != without:
            if type(f.default) is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif type(f.metadata["valid"]) is tuple:
                kind = {"choices": f.metadata["valid"]}
            elif type(f.default) is tuple:
                kind = {"nargs": len(f.default), "type": type(f.default[0]), "metavar": "X"}
            else:
                kind = {"type": type(f.default), "metavar": "X"}
            default = getattr(config, f.name)
            text = f"{f.metadata['help']}{'' if default == '' else f' (default: {default})'}".replace("%", "%%")
            parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **kind)


def given(args, config) -> dict:
    """The fields of a configuration that were given on the command line."""
    found = {f.name: getattr(args, f.name) for f in fields(config) if hasattr(args, f.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


# --- command line -----------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="What a detector costs, --export of a trained one, or --convert of another codebase's.")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="pixels (default: 800 1216; to export, a square that holds every test image)")
    parser.add_argument("--export", metavar="FILE", help=".pt2 or .onnx to write, from the newest checkpoint beside it")
    parser.add_argument("--weights", metavar="FILE", help="to export from this checkpoint instead")
    parser.add_argument("--convert", metavar="FILE", help="weights of another codebase")
    parser.add_argument("--form", choices=FORMS, help="where they come from; fcos_plus: FCOS as first published, too")
    parser.add_argument("--out", metavar="FILE", help="checkpoint to write")
    parser.add_argument("--categories", metavar="JSON", help="COCO annotations that name the classes (default: COCO's, else numbers)")
    add_options(parser.add_argument_group("detector"), ModelConfig())
    args = parser.parse_args()
    changes = given(args, ModelConfig())
    if args.size and min(args.size) < 1:
        parser.error("--size must be >= 1")
    if args.export:
        if changes:
            parser.error(f"--export takes the configuration of the checkpoint; leave out {', '.join(changes)}")
        checkpoint = load_checkpoint(args.weights or Path(args.export).parent)
        model = build_detector(checkpoint)
        size = args.size or [-(-model.config.long_side // 32) * 32] * 2
        export(model, checkpoint["categories"], args.export, *size)
        print(f"{args.export}: images of {size[0]} x {size[1]}, {', '.join(checkpoint['categories']['names'])}")
    elif args.convert:
        if not args.form or not args.out:
            parser.error("--convert needs --form and --out")
        if found := changes.keys() & {"backbone", "num_classes"}:
            parser.error(f"--convert finds these in the weights; leave out {', '.join(sorted(found))}")
        checkpoint = import_checkpoint(load_weights(args.convert), args.form, args.categories, args.convert, **changes)
        write_whole(args.out, lambda file: torch.save(checkpoint, file), "free some space, or name another file with --out")
        names = checkpoint["categories"]["names"]
        print(f"{args.out}: {checkpoint['config']['model']['backbone']}, {len(names)} classes: {', '.join(names)}")
    else:
        print(describe(ModelConfig(**changes), *args.size or (800, 1216)))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
