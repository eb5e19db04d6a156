"""import_weights.py: the weights of another FCOS as a checkpoint of this code.

    python tools/import_weights.py torchvision --out model.pt                   downloads them
    python tools/import_weights.py FCOS_R_50_FPN_1x.pth --form fcos_plus --out model.pt
    python evaluate.py model.pt --data DIR

Forms: torchvision   a `torchvision.models.detection.FCOS`
       fcos_plus     FCOS_PLUS, and FCOS as first published (maskrcnn-benchmark)
       fcos_imprv    FCOS with NORM_REG_TARGETS and CENTERNESS_ON_REG

The backbone is the one whose names and shapes fit. Classes are named after COCO's where their
number is COCO's, else by number; --categories takes ids and names from an annotation file.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import UserError  # noqa: E402
from evaluate import run_program  # noqa: E402
from model import (BACKBONES, CHECKPOINT_FORMAT, FCOS, IMPROVED, ModelConfig,  # noqa: E402
                   atomic_write, download, read_archive)

PUBLISHED = FCOS_ResNet50_FPN_Weights.COCO_V1
COCO_CLASSES = {i: name for i, name in enumerate(PUBLISHED.meta["categories"])
                if name not in ("__background__", "N/A")}  # category id -> name; 80 of 1 .. 90
MASKRCNN = dict(stride_in_1x1=True, pixel_mean=(122.7717, 115.9465, 102.9801),
                pixel_std=(1.0, 1.0, 1.0), inclusive_boxes=True)
FORMS = {  # what the weights mean, beyond their names and shapes
    "torchvision": IMPROVED | dict(location_offset=0.0, location_spacing="even",
                                   score_threshold=0.2, threshold_on="final"),
    "fcos_plus": MASKRCNN,
    "fcos_imprv": MASKRCNN | IMPROVED,
}
RENAMES = (  # applied in this order
    (r"^module\.", ""),                                                  # DistributedDataParallel
    (r"^backbone\.body\.stem\.", "backbone.body."),                      # maskrcnn-benchmark
    (r"^backbone\.fpn\.(fpn_)?", "fpn."),
    (r"^fpn\.top_blocks\.", "fpn.extra_blocks."),
    (r"^fpn\.(inner|layer)([234])\.", lambda m: f"fpn.{m[1]}_blocks.{int(m[2]) - 2}.0."),
    (r"^fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)$", r"fpn.\1_blocks.\2.0.\3"),  # before 0.14
    (r"^rpn\.head\.", "head."),
    (r"^head\.scales\.(\d)\.scale$", r"scales.\1"),
    (r"^head\.(bbox_tower|regression_head\.conv)\.", "head.box_tower."),
    (r"^head\.(bbox_pred|regression_head\.bbox_reg)\.", "head.box_pred."),
    (r"^head\.regression_head\.bbox_ctrness\.", "head.centerness."),
    (r"^head\.classification_head\.conv\.", "head.cls_tower."),
    (r"^head\.classification_head\.", "head."),
)


def convert(weights: dict[str, Tensor], form: str, source) -> tuple[ModelConfig, dict]:
    """Weights in our names, with all their class rows, and the config that tells their meaning."""
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise UserError(f"{source}: holds no state dict (names and tensors), neither alone nor "
                        'under "model"; save that: torch.save(model.state_dict(), NEW)')
    state = {}
    for name, value in weights.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if not name.endswith("num_batches_tracked"):
            state[name] = value.float()
    if form == "torchvision":
        state["scales"] = torch.ones(5)
    elif scales := [state.pop(name) for name in sorted(state) if name.startswith("scales.")]:
        state["scales"] = torch.cat([scale.flatten() for scale in scales])
    config = fitting_config(state, form, source)
    if form != "torchvision":
        state["backbone.body.conv1.weight"] = state["backbone.body.conv1.weight"].flip(1)  # of BGR
        # They divide by sqrt(var), FrozenBatchNorm2d by sqrt(var + 1e-5).
        for name in [name for name in state if name.endswith(".running_var")]:
            weight, var = name.replace("running_var", "weight"), state[name].double()
            state[weight] = (state[weight] * (1 + 1e-5 / var).sqrt()).float()
    return config, state


def fitting_config(state: dict[str, Tensor], form: str, source) -> ModelConfig:
    """The config with the backbone that has the names and shapes of `state`."""
    classes = state.get("head.cls_logits.bias", torch.empty(1)).numel()
    config = ModelConfig(num_classes=max(1, classes), **FORMS[form])
    found, differ = {(name, *value.shape) for name, value in state.items()}, {}
    for backbone in BACKBONES:
        # The ResNeXts of maskrcnn-benchmark downsample in their 3x3 convolution.
        in_1x1 = config.stride_in_1x1 and not backbone.startswith("resnext")
        fitting = replace(config, backbone=backbone, stride_in_1x1=in_1x1)
        with torch.device("meta"):
            expected = {(name, *x.shape) for name, x in FCOS(fitting).state_dict().items()}
        if found == expected:
            return fitting
        differ[backbone] = expected ^ found
    nearest = min(differ, key=lambda backbone: len(differ[backbone]))
    examples = [f"{name} {shape} is {'unexpected' if (name, *shape) in found else 'missing'}"
                for name, *shape in sorted(differ[nearest])[:3]]
    raise UserError(f"{source}: not a detector of the form {form}, see --form; with {nearest}, the "
                    f"nearest backbone, {len(differ[nearest])} names or shapes differ: "
                    f"{', '.join(examples)}")


def read_categories(path) -> dict[int, str]:
    """Category id -> name, in the order of the file."""
    try:
        categories = json.loads(Path(path).read_text("utf-8-sig"))["categories"]
        return {int(c["id"]): str(c["name"]) for c in categories}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no COCO categories can be read from it ({error!r}); name a file "
                        "in COCO format") from None


def import_weights(weights: dict[str, Tensor], form: str, source, categories_file=None) -> dict:
    """The checkpoint. Classes are in the order of their ids, as everywhere in this code.

    In torchvision's form the row of a class is its category id: of COCO's 91 rows, the 80 that have
    a name remain. In the others, rows are in the order of the annotation file.
    """
    config, state = convert(weights, form, source)
    C, row_is_id = config.num_classes, form == "torchvision"
    if categories_file:
        names = read_categories(categories_file)
    elif C == (91 if row_is_id else 80):
        names = COCO_CLASSES
    else:
        names = {i: f"class {i}" for i in (range(C) if row_is_id else range(1, C + 1))}
    ids = sorted(names)
    rows = ids if row_is_id else [list(names).index(i) for i in ids]
    if not rows or not set(rows) <= set(range(C)) or not row_is_id and len(rows) < C:
        raise UserError(f"{categories_file}: its {len(ids)} categories do not fit the {C} class "
                        f"rows of {source}; name the annotations that it was trained on")
    for name in ("head.cls_logits.weight", "head.cls_logits.bias"):
        state[name] = state[name][rows]
    return {"format": CHECKPOINT_FORMAT, "step": 0, "model": state,
            "config": {"model": asdict(replace(config, num_classes=len(ids))),
                       "data": "", "val_split": ""},
            "categories": {"ids": ids, "names": [names[i] for i in ids]}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help='weights, or "torchvision": downloads its own')
    parser.add_argument("--form", choices=FORMS, default="torchvision",
                        help="where the weights come from (default: torchvision)")
    parser.add_argument("--out", metavar="FILE", required=True, help="checkpoint to write")
    parser.add_argument("--categories", metavar="FILE", help="annotations that name the classes")
    args = parser.parse_args(argv)
    if not Path(args.out).name:
        raise UserError(f"{args.out!r}: is no name of a file; name one with --out")
    if args.file == "torchvision":
        weights = download(PUBLISHED, "run: python tools/import_weights.py "
                           f"{Path(PUBLISHED.url).name} --form torchvision --out {args.out}")
    else:
        weights = read_archive(args.file)
        weights = weights.get("model", weights)
    checkpoint = import_weights(weights, args.form, args.file, args.categories)
    atomic_write(args.out, lambda file: torch.save(checkpoint, file))
    model, names = checkpoint["config"]["model"], checkpoint["categories"]["names"]
    print(f"{args.out}: {model['backbone']}, {len(names)} classes: {', '.join(names)}")


if __name__ == "__main__":
    run_program(main)
