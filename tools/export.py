"""export.py: a trained detector as one file that runs without this code.

    python tools/export.py runs/demo --out detector.pt2         torch.export
    python tools/export.py runs/demo --out detector.onnx        needs: pip install onnx onnxscript

in:   images (N, 3, H, W) uint8 RGB, resized as in training and padded with zeros, at the right and
      the bottom, to multiples of 32; image_sizes (N, 2) int64, height and width without the padding
out:  boxes (N, D, 4) xyxy pixels of the canvas, scores (N, D) best first, labels (N, D), and
      count (N,): entries past the count are padding

N, H and W are free. Keep it so: GroupNorm averages over the padding, so one large canvas for all
images would cost AP. To load a .pt2, where `import torchvision` brings the NMS operator:

    import json, torch, torchvision
    extra_files = {"categories.json": ""}
    program = torch.export.load("detector.pt2", extra_files=extra_files)
    detector = program.module(check_guards=False)      # the guards refuse sides of 128 or less
    names = json.loads(extra_files["categories.json"])["names"]
    boxes, scores, labels, count = detector(images, image_sizes)

It runs on the CPU in float32; torch.export.passes.move_to_device_pass moves it to a GPU.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assign import make_locations  # noqa: E402
from data import UserError  # noqa: E402
from evaluate import run_program  # noqa: E402
from model import (FCOS, atomic_write, build_model, candidates, fold_frozen_norms,  # noqa: E402
                   load_checkpoint, nms_mask, suppress)


class ExportedDetector(nn.Module):
    """From pixels to detections, in operators of PyTorch and torchvision."""

    def __init__(self, model: FCOS, nms_dtype: torch.dtype):
        super().__init__()
        fold_frozen_norms(model)
        self.model = model.eval().requires_grad_(False)
        self.nms_dtype = nms_dtype

    def forward(self, images, image_sizes):
        config = self.model.config
        # Past the cache: while it is traced, the height and the width are symbols.
        locations = make_locations.__wrapped__(*images.shape[2:], offset=config.location_offset)
        outputs = self.model(images, image_sizes)
        return suppress(*candidates(outputs, locations, image_sizes, config), config, self.nms)

    def nms(self, boxes, scores, groups, iou):
        """`model.nms_mask` with two more boxes, each alone in its group, so that both are kept:
        torch.export assumes that NMS keeps at least two."""
        boxes = nn.functional.pad(boxes, (0, 0, 0, 2))
        scores = nn.functional.pad(scores, (0, 2), value=1.0)
        groups = torch.cat([groups, groups.max() + torch.arange(1, 3, device=groups.device)])
        return nms_mask(boxes, scores, groups, iou, self.nms_dtype)[:-2]


def export(model: FCOS, nms_dtype=torch.float64) -> torch.export.ExportedProgram:
    """Trace the detector for any batch size, height and width. ONNX has NMS of float32 alone."""
    N, H, W = 2, 256, 320  # an example: every dimension of 1 would be taken for a constant
    example = torch.zeros(N, 3, H, W, dtype=torch.uint8), torch.tensor([[H, W]] * N)
    batch = Dim("batch", min=1)
    shapes = {0: batch, 2: 32 * Dim("rows", min=1), 3: 32 * Dim("columns", min=1)}, {0: batch}
    return torch.export.export(ExportedDetector(model, nms_dtype), example, dynamic_shapes=shapes)


def save(program: torch.export.ExportedProgram, path: Path, categories: dict):
    """Write a .pt2 or .onnx file."""
    if path.suffix == ".pt2":
        extra_files = {"categories.json": json.dumps(categories)}
        memory = io.BytesIO()  # PyTorch's writer ends the process on a full disk
        torch.export.save(program, memory, extra_files=extra_files)
        atomic_write(path, lambda file: file.write(memory.getbuffer()))
        return
    try:
        onnx = torch.onnx.export(program, verbose=False, input_names=("images", "image_sizes"),
                                 output_names=("boxes", "scores", "labels", "count"))
    except ImportError as error:
        raise UserError(f"{path}: an ONNX file needs packages that are not installed ({error}); "
                        "pip install onnx onnxscript, or export to .pt2") from None
    onnx.model_proto.metadata_props.add(key="categories", value=json.dumps(categories))
    atomic_write(path, lambda file: file.write(onnx.model_proto.SerializeToString()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--out", metavar="FILE",
                        help=".pt2 or .onnx file (default: detector.pt2 in the run folder)")
    args = parser.parse_args(argv)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    out = Path(args.out or folder / "detector.pt2")
    if out.suffix not in (".pt2", ".onnx"):
        parser.error("--out must end in .pt2 or .onnx")
    checkpoint = load_checkpoint(args.run)
    model = build_model(checkpoint, args.run)
    nms_dtype = torch.float64 if out.suffix == ".pt2" else torch.float32
    save(export(model, nms_dtype), out, checkpoint["categories"])
    print(f"{out}: {', '.join(checkpoint['categories']['names'])}")


if __name__ == "__main__":
    run_program(main)
