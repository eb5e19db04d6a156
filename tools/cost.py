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
from evaluate import run_program  # noqa: E402
from model import FCOS  # noqa: E402
from train import PRESETS, make_sampler  # noqa: E402

MIB = 2**20  # bytes


def print_network(config, height: int, width: int):
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

    print(f"{config.backbone}, {config.num_classes} classes, one image of {height} x {width}")
    for name, x in outputs._asdict().items():
        print(name, tuple(x.shape))
    print("\nlevel  stride  cells (h x w)  max(l, t, r, b) of its boxes")
    locations = make_locations(height, width)
    for number, level in enumerate(locations.levels):
        low, high = locations.size_range[locations.first[number]].clamp(min=0).tolist()
        cells = f"{level.height} x {level.width}"
        print(f"P{number + 3}     {level.stride:6}  {cells:13}  {low:.0f} .. {high:.0f}")
    print("\npart       parameters   learned   GFLOPs (2 per multiply-add)")
    for name in ("backbone", "fpn", "head", ""):
        parameters = list(model.get_submodule(name).parameters())
        total = sum(p.numel() for p in parameters)
        learned = sum(p.numel() for p in parameters if p.requires_grad)
        flops = sum(counter.get_flop_counts()[f"FCOS.{name}".rstrip(".")].values())
        print(f"{name or 'all':10} {total / 1e6:8.2f} M {learned / 1e6:7.2f} M {flops / 1e9:8.1f}")
    print(f"\ntraining in float32, MiB: weights {4 * total / MIB:.0f}, gradients and each moment "
          f"of the optimizer {4 * learned / MIB:.0f};\nper image {activations / MIB:.0f} kept for "
          "the backward pass (without the losses)\n")


def print_canvases(config, steps=2000):
    """How many padded sizes, each a compilation under torch.compile, training on COCO meets."""
    random = np.random.default_rng(0)
    sizes = np.stack([random.choice((480, 427, 375, 333), 5000),
                      random.choice((640, 612, 500), 5000)], axis=1)
    sizes[:1500] = sizes[:1500, ::-1]  # tall
    sampler = make_sampler(config, sizes, np.arange(len(sizes)))
    shapes = sorted({sampler.global_batch(step)[0].canvas for step in range(steps)})
    print(f"{steps:,} steps on images of COCO's usual sizes meet {len(shapes)} canvas shapes:",
          ", ".join(f"{h} x {w}" for h, w in shapes[:12]), "..." if len(shapes) > 12 else "")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1216),
                        help="pixels of an image (default: 800 1216)")
    args = parser.parse_args(argv)
    if min(args.size) < 1:
        parser.error("--size must be at least 1 1")
    print_network(PRESETS[args.preset].model, *args.size)
    print_canvases(PRESETS[args.preset])


if __name__ == "__main__":
    run_program(main)
