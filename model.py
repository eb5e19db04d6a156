"""model.py: from pixels to boxes.  (FCOS, arXiv:1904.01355, Sec. 3; "improved": arXiv:2006.09214)

    images (N, 3, H, W)
      -> backbone: C3, C4, C5 of stride 8, 16, 32
      -> FPN (arXiv:1612.03144): P3 .. P5 from C3 .. C5; P6 = conv3x3/2 of P5, P7 = conv3x3/2 of
         relu(P6)
      -> one head, shared by all levels: two towers of conv3x3 + GroupNorm + ReLU, then at each
         location
           logits      C class scores
           ltrb        distances to the four sides of the box: exp(s * x) pixels, or (improved)
                       relu(s * x) strides, with a learned scale s per level
           centerness  how central the location is in its box; lowers the score of poor boxes
      -> detect: scores, top k of each level, boxes, NMS inside each class, best 100

Letters: N images, L locations over all levels (in the order of assign.py), C classes, S levels,
K candidates of an image, D detections of an image.
"""

import math
import os
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

import csrc
from assign import STRIDES, Locations
from data import UserError

BACKBONES = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
             "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2",
             "wide_resnet101_2")


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to rebuild a detector and run it. Defaults: FCOS as first published."""
    num_classes: int = 80                    # as many as the data set has
    # network
    backbone: Literal[BACKBONES] = "resnet50"   # a ResNet; resnet10: one block a stage
    backbone_norm: Literal["frozen_batch", "group"] = "frozen_batch"  # group: without pretraining
    stride_in_1x1: bool = False              # bottlenecks downsample in their 1x1 conv (Caffe)
    frozen_stages: int = 2                   # 0: none, 1: stem, 2: stem and layer1, ...
    channels: int = 256                      # of the FPN and the head; a multiple of 8
    tower_depth: int = 4                     # convolutions in each tower of the head
    centerness_on_box_tower: bool = False    # improved FCOS: True
    box_unit: Literal["pixel", "stride"] = "pixel"  # exp(s * x), or relu(s * x) * stride
    location_offset: float = 0.5             # of a location in its cell, in strides
    location_spacing: Literal["stride", "even"] = "stride"  # even: as torchvision's detector
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, 0..255
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)     # RGB, 0..255
    # inference
    short_side: int = 800                    # pixels of an image's short side after resizing
    long_side: int = 1333                    # pixels, upper bound of the long side; training, too
    enlarge: bool = True                     # enlarge images that are smaller; training, too
    score_threshold: float = 0.05            # lowest score of a candidate
    threshold_on: Literal["class", "final"] = "class"  # compare this score with the threshold
    sqrt_score: bool = False                 # final score: sqrt(class * centerness) (improved)
    candidates_per_level: int = 1000         # top candidates of a level that enter NMS
    nms_iou: float = 0.6                     # suppress boxes that overlap a better one by more
    inclusive_boxes: bool = False            # boxes end at x + w - 1 (maskrcnn-benchmark): add 1
    max_detections: int = 100                # per image

    def __post_init__(self):
        validate(self, at_least=dict(num_classes=1, channels=8, short_side=1, long_side=1,
                                     pixel_std=1e-6, candidates_per_level=1, max_detections=1),
                 at_most=dict(frozen_stages=5, location_offset=1, score_threshold=1, nms_iou=1))
        if self.channels % 8:
            raise UserError(f"--channels {self.channels}: must be a multiple of 8")


IMPROVED = dict(box_unit="stride", centerness_on_box_tower=True, sqrt_score=True)


def validate(config, at_least: dict, at_most: dict):
    """Raise for the first field of a wrong type or outside its range (default: 0 to 2**31)."""
    for f in fields(config):
        value, default = getattr(config, f.name), f.default
        option = f"--{f.name.replace('_', '-')} {value!r:.80}"
        if get_origin(f.type) is Literal:
            if value not in get_args(f.type):
                raise UserError(f"{option}: must be one of {', '.join(get_args(f.type))}")
            continue
        values, like = (x if type(default) is tuple else (x,) for x in (value, default))
        if type(values) is not tuple or len(values) != len(like) or any(
                type(v) is not type(d) and (type(v), type(d)) != (int, float)
                for v, d in zip(values, like)):
            raise UserError(f"{option}: must be of the type of {default!r}")
        low, high = at_least.get(f.name, 0), at_most.get(f.name, 2**31)
        if any(type(v) in (int, float) and not low <= v <= high for v in values):
            raise UserError(f"{option}: must be at least {low:.10g} and at most {high:.10g}")


def config_from_dict(Config, values: dict, source):
    """Rebuild a configuration; fields added since it was saved take their defaults, and say so."""
    known = {f.name: f.default for f in fields(Config)}
    if unknown := sorted(map(str, values.keys() - known.keys())):
        raise UserError(f"{source}: its {Config.__name__} has fields this code does not know "
                        f"({', '.join(unknown)[:200]}); use the version of the code that wrote it")
    if missing := sorted(known.keys() - values.keys()):
        print(f"{source}: saved before {Config.__name__} had these fields, which take their "
              f"defaults: {', '.join(f'{name} = {known[name]!r}' for name in missing)}", flush=True)
    try:
        return Config(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


# --- network ------------------------------------------------------------------------------------

class Outputs(NamedTuple):
    """What the network predicts at every location."""
    logits: Tensor      # (N, L, C)
    ltrb: Tensor        # (N, L, 4) float32 pixels
    centerness: Tensor  # (N, L) float32 logits


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's frozen BatchNorm, in place: the backward pass of a convolution does not need
    its output. Overwriting it saves a copy for each norm, and keeps bfloat16 under autocast."""

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x.mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1))


class GroupNorm(nn.GroupNorm):
    """In the dtype of its input; autocast on a GPU would return float32, at twice the memory."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


def group_norm(channels: int) -> GroupNorm:
    """For the backbone: groups of 16 channels (arXiv:1803.08494, Sec. 4.1)."""
    return GroupNorm(channels // 16, channels)


class Backbone(nn.Module):
    """A torchvision ResNet up to C3, C4, C5 (stride 8, 16, 32)."""

    def __init__(self, config: ModelConfig, weights: str = "none"):
        super().__init__()
        norm_layer = FrozenNorm if config.backbone_norm == "frozen_batch" else group_norm
        if config.backbone == "resnet10":  # a block in each stage; torchvision begins with 18
            body = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        else:
            body = torchvision.models.get_model(config.backbone, norm_layer=norm_layer)
        self.channels = [body.fc.in_features // n for n in (4, 2, 1)]  # of C3, C4, C5
        del body.fc, body.avgpool
        load_backbone_weights(body, config, weights)
        if config.stride_in_1x1:
            for block in (body.layer2[0], body.layer3[0], body.layer4[0]):
                if hasattr(block, "conv3"):  # small ResNets have no bottlenecks
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        stem = nn.ModuleList([body.conv1, body.bn1])
        stages = (stem, body.layer1, body.layer2, body.layer3, body.layer4)
        for stage in stages[:config.frozen_stages]:
            stage.requires_grad_(False)
        self.body = body

    def forward(self, x):
        b = self.body
        x = b.maxpool(b.relu(b.bn1(b.conv1(x))))  # stride 4
        c3 = b.layer2(b.layer1(x))                # stride 8
        c4 = b.layer3(c3)                         # stride 16
        return c3, c4, b.layer4(c4)               # stride 32


def load_backbone_weights(body: nn.Module, config: ModelConfig, weights: str):
    """Load a classifier's weights. `weights`: "none", "imagenet", or a state dict file."""
    if weights == "none":
        return
    name = config.backbone
    if weights == "imagenet":
        if name == "resnet10" or config.backbone_norm == "group":
            raise UserError(f"no ImageNet weights are published of a {name} with "
                            f"{config.backbone_norm} norms; use --backbone-weights none")
        state = download(torchvision.models.get_model_weights(name).IMAGENET1K_V1,
                         "pass it with --backbone-weights FILE, or train with --backbone-weights "
                         "none")
    else:
        state = read_archive(weights)
    state = {key: value for key, value in state.items() if not str(key).startswith("fc.")}
    load_weights(body, state, f"{weights} does not fit a {name}")


def download(entry, remedy: str) -> dict[str, Tensor]:
    """Published weights, from torchvision's cache or its server."""
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError; a wrong hash
        raise UserError(f"{entry.url} could not be downloaded ({error}); copy that file to this "
                        f"machine and {remedy}") from None


class FPN(FeaturePyramidNetwork):
    """torchvision's feature pyramid, with P6 and P7 from P5. (arXiv:1612.03144)

    The forward pass is written out, because torch.compile turns the backward pass of
    `F.interpolate` into a scatter-add, in no fixed order; that of `upsample` sums four gradients.
    """

    def __init__(self, in_channels: list[int], channels: int):
        super().__init__(in_channels, channels, LastLevelP6P7(channels, channels))

    def forward(self, c3, c4, c5):
        p3, p4, p5 = (lateral(c) for lateral, c in zip(self.inner_blocks, (c3, c4, c5)))
        p4 = p4 + upsample(p5, p4.shape)
        p3 = p3 + upsample(p4, p3.shape)
        p3, p4, p5 = (smooth(p) for smooth, p in zip(self.layer_blocks, (p3, p4, p5)))
        p6 = self.extra_blocks.p6(p5)
        p7 = self.extra_blocks.p7(p6.relu())
        return p3, p4, p5, p6, p7  # each (N, channels, ceil(H / stride), ceil(W / stride))


def upsample(x: Tensor, shape) -> Tensor:
    """Twice as high and wide by repeating pixels, cut to the height and width of `shape`."""
    N, C, H, W = x.shape
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(N, C, 2 * H, 2 * W)
    return x[:, :, :shape[2], :shape[3]]


class Head(nn.Module):
    """What is predicted at every location; shared by all levels (Sec. 3.2, Fig. 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.channels

        def tower():
            layers = []
            for _ in range(config.tower_depth):
                layers += [nn.Conv2d(channels, channels, 3, padding=1),
                           GroupNorm(channels // 8, channels), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.centerness_on_box_tower = config.centerness_on_box_tower
        self.cls_tower, self.box_tower = tower(), tower()
        self.cls_logits = nn.Conv2d(channels, config.num_classes, 3, padding=1)
        self.box_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        # Every location starts as background with probability 0.99 (arXiv:1708.02002, Sec. 4.1).
        nn.init.constant_(self.cls_logits.bias, -math.log(0.99 / 0.01))

    def forward(self, pyramid):
        """S x (N, channels, H, W) -> logits (N, L, C), box (N, L, 4), centerness (N, L)."""
        C, on_box = self.cls_logits.out_channels, self.centerness_on_box_tower
        cls_convs, box_convs = [self.cls_logits], [self.box_pred]
        (box_convs if on_box else cls_convs).append(self.centerness)
        cls = run_tower(pyramid, self.cls_tower, cls_convs)           # (N, L, C or more)
        box = run_tower(pyramid, self.box_tower, box_convs)           # (N, L, 8)
        return cls[..., :C], box[..., :4], box[..., 4] if on_box else cls[..., C]


def run_tower(pyramid, tower, convs):
    """The outputs of 3 x 3 convolutions after a tower, side by side: (N, L, channels).

    They run as one, padded to a multiple of 8 channels: with fewer, cuDNN has no channels_last
    kernel, and copies every input.
    """
    weight = torch.cat([conv.weight for conv in convs])
    bias = torch.cat([conv.bias for conv in convs])
    padding = -len(bias) % 8
    weight = nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, padding))
    bias = nn.functional.pad(bias, (0, padding))
    outputs = [nn.functional.conv2d(tower(p), weight, bias, padding=1) for p in pyramid]
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in outputs], dim=1)


class FCOS(nn.Module):
    """The detector. `backbone_weights`: "none", "imagenet" or a state dict file."""

    def __init__(self, config: ModelConfig, backbone_weights: str = "none"):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, backbone_weights)
        self.fpn = FPN(self.backbone.channels, config.channels)
        self.head = Head(config)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        self.strides = nn.Buffer(torch.tensor(STRIDES), persistent=False)
        self.pixel_mean = nn.Buffer(torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.pixel_std = nn.Buffer(torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> Outputs:
        """
        Args:
            images: (N, 3, H, W) RGB, uint8 or float 0..255, padded at the right and the bottom.
            image_sizes: (N, 2) height and width without the padding, which becomes exactly zero;
                default: no padding.
        """
        x = self.normalize(images, image_sizes)                       # (N, 3, H, W)
        pyramid = self.fpn(*self.backbone(x))                         # S x (N, channels, ., .)
        logits, box, centerness = self.head(pyramid)
        in_pixels = self.config.box_unit == "pixel"
        factors = self.scales if in_pixels else self.scales * self.strides
        factor = torch.cat([factor.expand(p.shape[2] * p.shape[3])
                            for factor, p in zip(factors, pyramid)])  # (L,)
        box = box.float() * factor[:, None]
        # clamped because the gradient at inf would be NaN
        ltrb = box.clamp(max=16).exp() if in_pixels else box.relu()
        return Outputs(logits, ltrb, centerness.float())

    def normalize(self, images, image_sizes):
        x = (images.float() - self.pixel_mean) / self.pixel_std
        if image_sizes is not None:
            rows = torch.arange(x.shape[2], device=x.device) < image_sizes[:, :1]     # (N, H)
            columns = torch.arange(x.shape[3], device=x.device) < image_sizes[:, 1:]  # (N, W)
            x = x * (rows[:, None, :, None] & columns[:, None, None, :])
        weight = self.head.cls_logits.weight  # x takes its format: no convolution converts x
        channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        return x.to(weight.dtype, memory_format=torch.channels_last if channels_last
                    else torch.contiguous_format)


def fold_frozen_norms(model: nn.Module):
    """Multiply every frozen BatchNorm into the convolution before it, in place. For inference."""
    for (_, conv), (name, norm) in pairwise(list(model.named_modules())):
        if isinstance(norm, FrozenBatchNorm2d):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                norm.weight, norm.bias)
            model.set_submodule(name, nn.Identity())


# --- decoding -----------------------------------------------------------------------------------

class Detections(NamedTuple):
    """The objects found in one image, best first."""
    boxes: Tensor   # (D, 4) xyxy pixels
    scores: Tensor  # (D,)
    labels: Tensor  # (D,) int64 in [0, C)


def detect(outputs: Outputs, locations: Locations, image_sizes,
           config: ModelConfig) -> list[Detections]:
    """The objects in each image, in pixels of the resized image (Sec. 3.1, "Inference").

    `image_sizes`: (N, 2) tensor or N (height, width), pixels without the padding.
    """
    image_sizes = torch.as_tensor(image_sizes, device=outputs.logits.device)
    return unpad(*suppress(*candidates(outputs, locations, image_sizes, config), config))


@torch.no_grad()
def candidates(outputs: Outputs, locations: Locations, image_sizes: Tensor, config: ModelConfig):
    """The best boxes of each level, before NMS.

    Returns: boxes (N, K, 4), scores (N, K), labels (N, K) with K = S * config.candidates_per_level;
        a score of 0 is padding. All shapes are fixed: no host-device sync.
    """
    N, L, C = outputs.logits.shape
    k, S = config.candidates_per_level, len(locations.grids)
    centerness = outputs.centerness.sigmoid()[..., None]                           # (N, L, 1)

    # The top k of a level's H*W*C scores are at the k locations with the best top class. So two
    # top-k: of locations by their top class, then of the (location, class) pairs at those.
    top_class = outputs.logits.amax(-1, keepdim=True)                              # (N, L, 1)
    top_score = final_scores(top_class, centerness, config).squeeze(-1)            # (N, L)
    counts = [width * height for width, height in locations.grids]
    longest = torch.sym_max(k, counts[0])  # sizes are symbols under torch.export
    levels = torch.stack([nn.functional.pad(level, (0, longest - level.shape[1]), value=-1.0)
                          for level in top_score.split(counts, dim=1)], dim=1)     # (N, S, longest)
    best, location = levels.topk(k, sorted=False)                                  # (N, S, k)
    location = (location + locations.first[:, None]).clamp(max=L - 1).flatten(1)   # (N, S*k)

    def at(x, location):
        return x.gather(1, location[..., None].expand(-1, -1, x.shape[2]))

    scores = final_scores(at(outputs.logits, location), at(centerness, location), config)
    scores = scores * (best >= 0).view(N, -1, 1)                                   # (N, S*k, C)
    scores, index = scores.view(N, S, k * C).topk(k)                               # (N, S, k)
    scores, labels = scores.flatten(1), (index % C).flatten(1)                     # (N, K)
    location = location.view(N, S, k).gather(2, index // C).flatten(1)             # (N, K)

    ltrb = at(outputs.ltrb, location)                                              # (N, K, 4)
    xy = evenly_spaced(locations) if config.location_spacing == "even" else locations.xy
    xy = xy[location]                                                              # (N, K, 2)
    corners = torch.stack([xy - ltrb[..., :2], xy + ltrb[..., 2:]], dim=2)         # (N, K, 2, 2)
    width_height = image_sizes.flip(1)[:, None, None]                              # (N, 1, 1, 2)
    corners = torch.minimum(corners.clamp(min=0), width_height)
    has_area = (corners[:, :, 1] > corners[:, :, 0]).all(-1)  # False outside the image
    return corners.flatten(2), scores * has_area, labels


def final_scores(logits, centerness, config: ModelConfig):
    """Scores that rank candidates, 0 below the threshold. `centerness` is a probability.

    (..., C), (..., 1) -> (..., C)
    """
    score = logits.float().sigmoid()
    final = score * centerness
    if config.sqrt_score:
        final = final.sqrt()
    compared = score if config.threshold_on == "class" else final
    return final * (compared > config.score_threshold)


def nms_mask(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float,
             dtype=torch.float64) -> Tensor:
    """Greedy NMS inside each group; which boxes survive.

    boxes (N*K, 4), scores (N*K,), groups (N*K,) int64, negative for padding -> (N*K,) bool.
    Without the extension, torchvision's NMS runs once over boxes that are moved apart by group, on
    a grid of 32 columns. In float32, which ONNX needs, this rounds them by up to 0.002 pixels.
    """
    if boxes.is_cuda and csrc.available():
        return csrc.nms_mask(boxes, scores, groups, iou)
    index = (groups >= 0).nonzero().squeeze(1)
    boxes, group = boxes[index].to(dtype), groups[index]
    apart = nn.functional.pad(boxes, (0, 0, 0, 1)).max() + 1  # there may be no box
    boxes = boxes + torch.stack([group % 32, group // 32], dim=1).repeat(1, 2) * apart
    kept = index[torchvision.ops.nms(boxes, scores[index].to(dtype), iou)]
    return torch.zeros_like(groups, dtype=torch.bool).index_fill(0, kept, True)


@torch.no_grad()
def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, config: ModelConfig, nms=nms_mask):
    """NMS inside each class of each image, then the best detections.

    Returns: boxes (N, D, 4), scores (N, D) best first, labels (N, D), count (N,) of detections;
        entries past the count are padding.
    """
    image = torch.arange(scores.shape[0], device=scores.device)[:, None]
    group = torch.where(scores > 0, image * config.num_classes + labels, -1)
    keep = nms(boxes.flatten(0, 1), scores.flatten(), group.flatten(), config.nms_iou)
    scores = torch.where(keep.view(scores.shape), scores, 0.0)
    scores, index = scores.topk(min(config.max_detections, scores.shape[1]))       # (N, D)
    return boxes[image, index], scores, labels[image, index], (scores > 0).sum(1)


def unpad(boxes, scores, labels, count) -> list[Detections]:
    """Drop the padding of `suppress`; waits for the device."""
    return [Detections(boxes[n, :d], scores[n, :d], labels[n, :d])
            for n, d in enumerate(count.tolist())]


def evenly_spaced(locations: Locations) -> Tensor:
    """Where torchvision's detector puts locations: (L, 2).

    Its rows are H // (number of rows) pixels apart. That is less than a stride where the stride
    does not divide the padded height: P7 has 7 rows in 800 pixels, 114 apart. Columns likewise.
    """
    pitch = locations.cells[0] * locations.stride[0] // locations.cells            # (S, 2) pixels
    pitch = torch.cat([p.expand(width * height, 2)
                       for p, (width, height) in zip(pitch, locations.grids)])     # (L, 2)
    return locations.xy / locations.stride[:, None] * pitch


# --- checkpoints --------------------------------------------------------------------------------

CHECKPOINT_FORMAT = 3


def atomic_write(path, write):
    """Call `write(file)` on a temporary file, sync it to disk, then rename it to `path`."""
    path = Path(path)
    temporary = Path(f"{path}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); free some space, or name another "
                        "place") from None


def checkpoints_of(run) -> list[Path]:
    """The files checkpoint-<step>.pt of a run folder, newest first."""
    found = [path for path in Path(run).glob("checkpoint-*.pt") if path.stem[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[11:]), reverse=True)


def load_checkpoint(path) -> dict:
    """A checkpoint from a file, or the newest undamaged one of a run folder."""
    files = checkpoints_of(path) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise UserError(f"{path}: no checkpoint-*.pt here; train first, or name another run or "
                        "a file, such as its best.pt")
    for file in files:
        try:
            checkpoint = read_archive(file)
            break
        except UserError as error:
            if file is files[-1]:
                raise
            print(f"{error}; trying the checkpoint before it", file=sys.stderr, flush=True)
    try:
        ids, names = (checkpoint["categories"][key] for key in ("ids", "names"))
        model = config_from_dict(ModelConfig, checkpoint["config"]["model"], file)
        ours = (checkpoint["format"] == CHECKPOINT_FORMAT and type(checkpoint["step"]) is int
                and isinstance(checkpoint["model"], dict)
                and len(ids) == len(names) == model.num_classes)
    except (LookupError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{file}: not a checkpoint of this version of the code; for weights of "
                        "another codebase see tools/import_weights.py")
    checkpoint["config"]["model"] = asdict(model)
    return checkpoint


def read_archive(path) -> dict:
    """torch.load(weights_only=True), after checking the archive's CRC-32, which it skips."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                with zipfile.ZipFile(file) as archive:
                    # torch.load would skip a record that is marked as a folder
                    if archive.testzip() or any(r.external_attr & 0x10 for r in archive.infolist()):
                        raise zipfile.BadZipFile("wrong checksum")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path}: holds a Python object ({name[1]}), and loading one can run "
                            "any code; if you trust it, save its tensors alone") from None
        raise UserError(f"{path}: damaged, or not a PyTorch file ({type(error).__name__})") \
            from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of weights")
    return loaded


def load_weights(model: nn.Module, state: dict, message: str):
    """Load a state dict; one sentence instead of a traceback if names or shapes differ."""
    try:
        model.load_state_dict(state)
    except Exception as error:  # also whatever a state dict of other things makes torch raise
        raise UserError(f"{message}: {' '.join(str(error).split())[:400]}") from None


def build_model(checkpoint: dict, source="checkpoint") -> FCOS:
    """The detector of a checkpoint, with its weights."""
    model = FCOS(ModelConfig(**checkpoint["config"]["model"]))
    load_weights(model, checkpoint["model"], f"{source}: its weights do not fit its configuration")
    return model
