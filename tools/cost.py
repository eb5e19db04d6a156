"""cost.py: what a preset costs: levels, parameters, FLOPs, memory.

    python tools/cost.py fcos_R_50_FPN_1x_center_giou
    python tools/cost.py demo --size 224 352

Counted on the meta device, where a tensor is a shape alone.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assign import make_locations  # noqa: E402
from data import TrainSampler  # noqa: E402
from evaluate import run_program  # noqa: E402
from model import FCOS, ModelConfig  # noqa: E402
from train import PRESETS, TrainConfig  # noqa: E402

MIB = 2**20


def network_cost(config: ModelConfig, height: int, width: int) -> list[str]:
    """Levels, parameters, FLOPs and training memory for one image."""
    saved = {}  # storage -> what autograd keeps for the backward pass

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"):
        model, images = FCOS(config), torch.empty(1, 3, height, width)
    with (FlopCounterMode(display=False) as counter,
          torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)):
        outputs = model(images)
    # Weights are kept, too, but do not begin with the dimension of the one image.
    activations = sum(x.untyped_storage().nbytes() for x in saved.values() if x.shape[:1] == (1,))

    lines = [f"{config.backbone}, {config.num_classes} classes, one image of {height} x {width}"]
    lines += [f"{name} {tuple(x.shape)}" for name, x in outputs._asdict().items()]
    lines += ["", "level  stride  cells (h x w)  max(l, t, r, b) of its boxes"]
    locations = make_locations(height, width)
    ranges = locations.size_range[locations.first].clamp(min=0).tolist()
    for number, (level, (low, high)) in enumerate(zip(locations.levels, ranges), start=3):
        cells = f"{level.height} x {level.width}"
        lines.append(f"P{number}     {level.stride:6}  {cells:13}  {low:.0f} .. {high:.0f}")
    lines += ["", "part       parameters   learned   GFLOPs (2 per multiply-add)"]
    parts = {"backbone": model.backbone, "fpn": model.fpn, "head": model.head, "all": model}
    for name, part in parts.items():
        total = sum(p.numel() for p in part.parameters())
        learned = sum(p.numel() for p in part.parameters() if p.requires_grad)
        module = "FCOS" if part is model else f"FCOS.{name}"
        flops = sum(counter.get_flop_counts()[module].values())
        lines.append(f"{name:10} {total / 1e6:8.2f} M {learned / 1e6:7.2f} M {flops / 1e9:8.1f}")
    return lines + [
        "",
        f"training in float32, MiB: weights {4 * total / MIB:.0f}, gradients and each moment "
        f"of the optimizer {4 * learned / MIB:.0f};",
        f"per image {activations / MIB:.0f} kept for the backward pass (without the losses)"]


def canvas_shapes(config: TrainConfig, steps=2000) -> set[tuple[int, int]]:
    """The padded (height, width) that training meets on images of COCO's usual sizes.

    Every other shape is a recompilation under torch.compile.
    """
    random, model = np.random.default_rng(0), config.model
    long, short = random.choice([640, 612, 500], 5000), random.choice([480, 427, 375, 333], 5000)
    sizes = np.stack([short, long], axis=1)
    tall = random.random(len(sizes)) < 0.3
    sizes[tall] = sizes[tall, ::-1]
    sampler = TrainSampler(sizes, np.arange(len(sizes)), config.batch_size, config.seed,
                           config.train_short_sides, model.long_side, model.enlarge, config.flip,
                           config.canvas_sides)
    return {sampler.global_batch(step)[0].canvas for step in range(steps)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1216),
                        help="pixels of an image (default: 800 1216)")
    args = parser.parse_args(argv)
    if min(args.size) < 1:
        parser.error("--size must be at least 1 1")
    config = PRESETS[args.preset]
    shapes = sorted(canvas_shapes(config))
    print("\n".join(network_cost(config.model, *args.size)))
    print(f"\n2,000 steps on images of COCO's usual sizes meet {len(shapes)} canvas shapes:",
          ", ".join(f"{h} x {w}" for h, w in shapes[:12]), "..." if len(shapes) > 12 else "")


if __name__ == "__main__":
    run_program(main)
