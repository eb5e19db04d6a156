"""plots.py: pictures of the targets, the losses, training and evaluation.

    python tools/plots.py targets                                  which location learns which box
    python tools/plots.py targets --data runs/shapes --image 3     the same, in an image
    python tools/plots.py losses                                   the losses and their gradients
    python tools/plots.py curves runs/demo runs/other              losses and AP of runs
    python tools/plots.py evaluation runs/demo                     what evaluate.py found, judged

The first three write runs/<name>.png. The last one writes to RUN/eval: precision_recall.png, and
the images that went best.png, worst.png and most confidently wrong.png.
"""

import argparse
import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import pad, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from assign import STRIDES, assign_targets, make_locations  # noqa: E402
from data import UserError  # noqa: E402
from loss import box_loss, focal_loss  # noqa: E402

COLORS = ("crimson", "royalblue", "forestgreen", "darkorange", "purple", "saddlebrown", "teal",
          "deeppink", "black", "olive")
THRESHOLD = 0.3  # final score from which a detection is judged


def save(image: Image.Image, path: Path):
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: must end in .png; name such a file with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    print(path)


def save_grid(tiles: list[tuple[str, Tensor]], columns, path: Path):
    """Save images (3, h, w) uint8 in a grid, each below its caption."""
    font, captioned = ImageFont.load_default(14), []
    height, width = (max(image.shape[side] for _, image in tiles) for side in (1, 2))
    width = max(width, *(round(font.getlength(caption)) + 1 for caption, _ in tiles))
    for caption, image in tiles:
        _, h, w = image.shape
        tile = to_pil_image(pad(image, [0, 24, width - w, height - h], fill=255))
        ImageDraw.Draw(tile).text((0, 16), caption, "black", font, "ls")
        captioned.append(pil_to_tensor(tile))
    save(to_pil_image(make_grid(captioned, columns, padding=6, pad_value=255)), path)


# --- charts -------------------------------------------------------------------------------------

class Panel(NamedTuple):
    """One line chart. Ticks, evenly spaced: value -> label; default: round ones that hold 0."""
    title: str
    x_name: str
    curves: dict[str, tuple]  # name -> x values, y values
    x_ticks: dict = {}
    y_ticks: dict = {}


def ticks(values) -> dict[float, str]:
    """Round numbers, at most 7, that enclose the values and 0."""
    low, high = min(0.0, *values), max(0.0, *values)
    high = high if high > low else low + 1
    unit = 10 ** np.floor(np.log10(high - low))
    step = next(unit * part for part in (0.2, 0.25, 0.5, 1, 2) if high - low <= 5 * unit * part)
    first, last = np.floor(low / step + 1e-6), np.ceil(high / step - 1e-6)
    return {float(n * step): f"{n * step:g}" for n in np.arange(first, last + 1)}


def chart(panels: list[Panel]) -> Image.Image:
    """Panels in rows of three, each with a legend. Drawn at twice the size and reduced: smooth.

    The first curve of a panel is wider, so that another that coincides with it is seen too.
    """
    font, line, width, height = ImageFont.load_default(26), 36, 640, 400
    longest = max(font.getlength(name) for panel in panels for name in panel.curves)
    most = max(len(panel.curves) for panel in panels)
    cell_width, cell_height = width + 160 + round(longest), max(height, line * most) + 180
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    picture = Image.new("RGB", (cell_width * columns, cell_height * rows), "white")
    pen = ImageDraw.Draw(picture)
    for n, panel in enumerate(panels):
        left, upper = n % 3 * cell_width + 110, n // 3 * cell_height + 60
        right, lower = left + width, upper + height
        x, y = (np.concatenate(values) for values in zip(*panel.curves.values()))
        x_ticks, y_ticks = panel.x_ticks or ticks(x), panel.y_ticks or ticks(y)
        pen.text((left, upper - 24), panel.title, "black", font, "ls")
        pen.text(((left + right) / 2, lower + 82), panel.x_name, "black", font, "ms")
        for x, label in zip(np.linspace(left, right, len(x_ticks)), x_ticks.values()):
            pen.line([(x, upper), (x, lower)], "gainsboro", 2)
            pen.text((x, lower + 12), label, "black", font, "ma")
        for y, label in zip(np.linspace(lower, upper, len(y_ticks)), y_ticks.values()):
            pen.line([(left, y), (right, y)], "gainsboro", 2)
            pen.text((left - 12, y), label, "black", font, "rm")
        for k, (name, (x, y)) in enumerate(panel.curves.items()):
            color, wide = COLORS[k % len(COLORS)], k == 0 and len(panel.curves) > 1
            points = list(zip(np.interp(x, [min(x_ticks), max(x_ticks)], [left, right]),
                              np.interp(y, [min(y_ticks), max(y_ticks)], [lower, upper])))
            pen.line(points, color, 10 if wide else 4, joint="curve")
            for end in points[-1:]:
                pen.circle(end, 6, color)
            pen.text((right + 24, upper + line * (k + 0.5)), name, color, font, "lm")
    return picture.reduce(2)


# --- targets ------------------------------------------------------------------------------------

def draw_targets(args):
    image, boxes = read_image(args.data, args.image) if args.data else example()
    locations, labels = make_locations(*image.shape[1:]), torch.arange(len(boxes))
    variants = {title: assign_targets(locations, [boxes], [labels], radius)
                for title, radius in (("whole box", None), ("center sampling 1.5", 1.5))}
    print("positive locations   " + "".join(f"    {title:<26}" for title in variants))
    print("box                  " + 2 * "    P3    P4    P5    P6    P7")
    for g, (w, h) in enumerate((boxes[:, 2:] - boxes[:, :2]).tolist()):
        counts = [((t.labels[0] == g) & (locations.stride == s)).sum()
                  for t in variants.values() for s in STRIDES]
        print(f"{COLORS[g % len(COLORS)]:<12}{f'{w:.0f} x {h:.0f}':<9}"
              + "".join(f"{count:6}" for count in counts))
    tiles, learns = [], torch.stack([t.labels[0] >= 0 for t in variants.values()]).any(dim=0)
    for stride, (W, H), first in zip(STRIDES, locations.grids, locations.first.tolist()):
        here = slice(first, first + W * H)
        if learns.any() and not learns[here].any():
            continue
        smallest, largest = locations.size_range[first].clamp(min=0).tolist()
        for title, targets in variants.items():
            title = f"stride {stride}, max(l, t, r, b) {smallest:g} .. {largest:g}: {title}"
            labels, centerness = (x[0, here].view(H, W)
                                  for x in (targets.labels, targets.centerness))
            tiles.append((title, level_picture(image, boxes, stride, labels, centerness)))
    save_grid(tiles, len(variants), args.out)


def level_picture(image, boxes, stride, labels, centerness, width=480) -> Tensor:
    """The positive locations of a level: cells in the color of their box, as opaque as central.

    image (3, h, w) uint8, boxes (G, 4), labels and centerness (H, W) -> (3, h', width) uint8
    """
    _, h, w = image.shape
    colors = torch.tensor([ImageColor.getrgb(color) for color in COLORS])[labels % len(COLORS)]
    opacity = torch.where(labels >= 0, 0.15 + 0.85 * centerness, 0)[..., None]          # (H, W, 1)
    cells = torch.cat([colors, opacity], dim=2).permute(2, 0, 1)                        # (4, H, W)
    cells = F.interpolate(cells[None], scale_factor=stride)[0, :, :h, :w]               # (4, h, w)
    pale = 255 - 0.4 * (255 - image)
    image = (cells[3] * cells[:3] + (1 - cells[3]) * pale).to(torch.uint8)
    image = resize(image, (max(1, round(width * h / w)), width))
    return draw_bounding_boxes(image, boxes * (width / w), width=2, colors=[
        COLORS[g % len(COLORS)] for g in range(len(boxes))])


def example():
    """Four ellipses (3, h, w) and their boxes (4, 4)."""
    boxes = [(24, 24, 404, 276), (224, 64, 424, 244), (496, 84, 584, 168), (544, 124, 592, 172)]
    image = Image.new("RGB", (640, 288), "#d8d8d8")
    for box, gray in zip(boxes, ("#a8a8a8", "#787878", "#787878", "#484848")):
        ImageDraw.Draw(image).ellipse(box, gray)
    return pil_to_tensor(image), torch.tensor(boxes).float()


def read_image(root, image_id: int | None):
    """An image of the train or else the val split, and its boxes (G, 4); None: the first one."""
    for kind in ("train", "val"):
        dataset = data.open_split(root, kind)
        for i in dataset.with_boxes().tolist():
            if image_id in (None, dataset.annotations.image_ids[i]):
                return dataset.image(i), torch.from_numpy(dataset.targets(i)[0])
    raise UserError(f"{root}: image {image_id} is in neither the train nor the val split, or has "
                    "no boxes; name another with --image")


# --- losses -------------------------------------------------------------------------------------

def draw_losses(args):
    target = torch.tensor([[20.0, 20, 20, 20]])
    box = {kind: partial(box_loss, target_ltrb=target, kind=kind)
           for kind in ("linear_iou", "giou", "iou")}
    u = (torch.arange(128) + 0.5) / 128  # (128,) in 0 .. 1: no sample lies on a kink
    shift = 20 * u[:, None] * torch.tensor([-1, -1, 1, 1])
    focal = {f"gamma {gamma}": lambda logits, gamma=gamma: torch.stack(
        [focal_loss(logit[None], torch.tensor([0]), 1, gamma) for logit in logits])
        for gamma in (0, 1, 2)}
    values, gradients = [], []
    for title, by, losses, x, x_name, labels in (
            ("box loss", "ltrb", box, target * 4 ** (2 * u[:, None] - 1),
             "size / size of the target", "1/4 1/2 1 2 4"),
            ("box loss", "ltrb", box, target + shift, "shift in x and y, pixels", "0 5 10 15 20"),
            ("focal loss, alpha 1", "logit", focal, u[:, None].logit(),
             "p_t, the probability of the right answer", "0 1/4 1/2 3/4 1")):
        x_ticks = {i / 4: label for i, label in enumerate(labels.split())}
        values.append(Panel(title, x_name, {}, x_ticks))
        gradients.append(Panel(f"|d loss / d {by}|", x_name, {}, x_ticks))
        for name, function in losses.items():
            inputs = x.clone().requires_grad_()
            value = function(inputs)
            value.sum().backward()
            values[-1].curves[name] = u, value.detach()
            gradients[-1].curves[name] = u, inputs.grad.norm(dim=1)
    save(chart(values + gradients), args.out)


# --- curves of runs -----------------------------------------------------------------------------

def draw_curves(args):
    runs, panels = {str(run): train.read_metrics(run) for run in args.runs}, []
    for figure in ("loss", *train.TERMS, "AP", "AP50"):
        points = {run: [(e["step"], e[figure]) for e in entries if type(e.get(figure)) is float]
                  for run, entries in runs.items()}
        if any(points.values()):
            curves = {run: tuple(zip(*curve)) or ((), ()) for run, curve in points.items()}
            panels.append(Panel(figure, "step", curves))
    if not panels:
        raise UserError(f"{', '.join(runs)}: no metrics.jsonl with a logged step; name folders of "
                        "runs, such as runs/demo, or wait for the first progress line")
    save(chart(panels), args.out)


# --- evaluation ---------------------------------------------------------------------------------

def draw_evaluation(args):
    folder = (args.run if args.run.is_dir() else args.run.parent) / "eval"
    try:
        results, metrics = (json.loads((folder / f"{name}.json").read_text())
                            for name in ("results", "metrics"))
        split = metrics["split"]  # JSON file and image folder
    except (OSError, KeyError):
        raise UserError(f"{folder}: no evaluation here; write one with python evaluate.py RUN") \
            from None
    json_file, images = data.find_split(args.data, "val", args.val_split) if args.data else split
    a = data.read_annotations(json_file)
    boxes = np.bincount(a.labels[~a.crowd], minlength=len(a.category_ids)).tolist()
    if [(c["name"], c["boxes"]) for c in metrics["classes"]] != [*zip(a.category_names, boxes)]:
        raise UserError(f"{folder}: is not an evaluation of {a.path}; name its data with --data")
    a = a._replace(  # the fonts have no other letters
        category_names=[ascii(name)[1:-1] for name in a.category_names])
    dataset = data.CocoDataset(a, images)
    evaluation = evaluate.coco_evaluation(a, results)
    save(precision_recall(evaluation, a.category_names), folder / "precision_recall.png")
    verdicts = judge(evaluation)
    for name, images in choose(verdicts).items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of an older evaluation
        if images:
            save_grid([judged(dataset, i, verdicts[i]) for i in images], 4, path)
        else:
            print(f"no {path}: there is nothing to show at score {THRESHOLD}")


def precision_recall(evaluation, names) -> Image.Image:
    """Precision against recall: the mean over classes at several IoUs, and each class at 0.5."""
    precision = evaluation.eval["precision"][..., 0, -1]  # (10 IoUs, 101 recalls, C)
    recall, AP50, unit = evaluation.params.recThrs, precision[0].mean(axis=0), ticks([0, 1])
    known = sorted(np.flatnonzero(AP50 > -1), key=lambda k: -AP50[k])  # -1: has no true box
    if not known:
        raise UserError("the validation split has no boxes to compare with")
    shown = known if len(known) <= 10 else known[:5] + known[-5:]
    by_iou = {f"IoU {evaluation.params.iouThrs[t]:.1f}": (
        recall, precision[t][:, known].mean(axis=1)) for t in (0, 2, 4, 6, 8)}
    by_class = {f"{names[k]} {AP50[k]:.2f}": (recall, precision[0, :, k]) for k in shown}
    return chart([
        Panel("precision, mean over classes", "recall", by_iou, unit, unit),
        Panel("precision at IoU 0.5, best and worst classes", "recall", by_class, unit, unit)])


def judge(evaluation) -> dict[int, dict[str, list[dict]]]:
    """Image id -> what was missed (annotations), wrong and right (detections).

    By pycocotools' matching at IoU 0.5. It matches the best scores first, so detections below the
    threshold change nothing above it.
    """
    verdicts = defaultdict(lambda: {"missed": [], "wrong": [], "right": []})
    truth, detections = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    for e in evaluation.evalImgs:                                   # one class in one image
        if e is None or e["aRng"] != evaluation.params.areaRng[0]:  # the first one: all areas
            continue
        verdict, found = verdicts[e["image_id"]], set()
        for id, score, match, ignored in zip(e["dtIds"], e["dtScores"], e["dtMatches"][0],
                                             e["dtIgnore"][0]):
            if score >= THRESHOLD:
                found.add(match)
                if not ignored:
                    verdict["right" if match else "wrong"].append(detections[id])
        verdict["missed"] += [truth[id] for id, ignored in zip(e["gtIds"], e["gtIgnore"])
                              if not ignored and id not in found and truth[id]["bbox"][2] > 0]
    return verdicts


def choose(verdicts, count=8) -> dict[str, list[int]]:
    """The images that went best (by F1, something was right), worst and most confidently wrong."""
    def f1(i):
        missed, wrong, right = map(len, verdicts[i].values())
        return 2 * right / (2 * right + wrong + missed)

    best, worst, wrong = ([i for i, v in verdicts.items() if any(v[name] for name in names)]
                          for names in (["right"], ["wrong", "missed"], ["wrong"]))
    best.sort(key=lambda i: (-f1(i), -len(verdicts[i]["right"])))
    worst.sort(key=f1)
    wrong.sort(key=lambda i: -max(row["score"] for row in verdicts[i]["wrong"]))
    return {"best": best[:count], "worst": worst[:count], "wrong": wrong[:count]}


def judged(dataset, image_id, verdict, side=480) -> tuple[str, Tensor]:
    """A caption, and the image with what was missed (dashed), wrong and right."""
    a = dataset.annotations
    image = dataset.image(a.image_ids.tolist().index(image_id))
    scale = side / max(image.shape)
    h, w = (max(1, round(s * scale)) for s in image.shape[1:])
    image = resize(image, (h, w))
    stripes = (torch.arange(h)[:, None] + torch.arange(w)) % 12 < 7
    for (kind, rows), color in zip(verdict.items(), ("blue", "red", "green")):
        if rows:
            boxes = box_convert(torch.tensor([row["bbox"] for row in rows]), "xywh", "xyxy")
            boxes = (boxes * scale).clamp(0, side)
            texts = [a.category_names[a.category_ids.index(row["category_id"])]
                     + (f" {row['score']:.2f}" if "score" in row else "") for row in rows]
            lines = draw_bounding_boxes(image, boxes, colors=color, width=2)
            image = torch.where(stripes, lines, image) if kind == "missed" else lines
            image = draw_bounding_boxes(image, boxes, texts, color, width=0, fill_labels=True,
                                        label_colors="white")
    missed, wrong, right = map(len, verdict.values())
    return f"{right} right (green), {wrong} wrong (red), {missed} missed (dashed)", image


# --- command line -------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="PICTURE")
    targets = commands.add_parser("targets", help="which location of which level learns which box")
    targets.add_argument("--data", metavar="DIR", help="COCO-format folder (default: an example)")
    targets.add_argument("--image", type=int, metavar="ID", help="default: the first with boxes")
    losses = commands.add_parser("losses", help="the losses and their gradients")
    curves = commands.add_parser("curves", help="losses and AP of runs, over one another")
    curves.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    judged = commands.add_parser("evaluation", help="precision and recall, best and worst images")
    judged.add_argument("run", type=Path, metavar="RUN", help="evaluated folder or checkpoint")
    judged.add_argument("--data", metavar="DIR", help="where its COCO-format folder has moved to")
    judged.add_argument("--val-split", default="", metavar="NAME", help="its split in --data")
    judged.set_defaults(draw=draw_evaluation)
    for command, draw in ((targets, draw_targets), (losses, draw_losses), (curves, draw_curves)):
        command.set_defaults(draw=draw)
        command.add_argument("--out", type=Path, metavar="FILE", help="default: %(default)s",
                             default=f"runs/{command.prog.split()[-1]}.png")
    args = parser.parse_args(argv)
    args.draw(args)


if __name__ == "__main__":
    evaluate.run_program(main)
