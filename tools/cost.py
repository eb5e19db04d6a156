"""cost.py: what a preset costs: levels, parameters, FLOPs, memory.

    python tools/cost.py fcos_R_50_FPN_1x_center_giou
    python tools/cost.py demo --size 224 352

Counted on the meta device, where a tensor is a shape alone.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assign import STRIDES, make_locations  # noqa: E402
from evaluate import run_program  # noqa: E402
from model import FCOS  # noqa: E402
from train import PRESETS  # noqa: E402

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
    for number, (stride, (W, H)) in enumerate(zip(STRIDES, locations.grids)):
        low, high = locations.size_range[locations.first[number]].clamp(min=0).tolist()
        print(f"P{number + 3}     {stride:6}  {f'{H} x {W}':13}  {low:.0f} .. {high:.0f}")
    print("\npart       parameters   learned   GFLOPs (2 per multiply-add)")
    for name in ("backbone", "fpn", "head", ""):
        parameters = list(model.get_submodule(name).parameters())
        total = sum(p.numel() for p in parameters)
        learned = sum(p.numel() for p in parameters if p.requires_grad)
        flops = sum(counter.get_flop_counts()[f"FCOS.{name}".rstrip(".")].values())
        print(f"{name or 'all':10} {total / 1e6:8.2f} M {learned / 1e6:7.2f} M {flops / 1e9:8.1f}")
    print(f"\ntraining in float32, MiB: weights {4 * total / MIB:.0f}, gradients and each moment "
          f"of the optimizer {4 * learned / MIB:.0f};\nper image {activations / MIB:.0f} kept for "
          "the backward pass (without the losses)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1216),
                        help="pixels of an image (default: 800 1216)")
    args = parser.parse_args(argv)
    if min(args.size) < 1:
        parser.error("--size must be at least 1 1")
    print_network(PRESETS[args.preset].model, *args.size)


if __name__ == "__main__":
    run_program(main)
