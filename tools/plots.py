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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from assign import STRIDES, assign_targets, make_locations  # noqa: E402
from data import UserError  # noqa: E402
from loss import box_loss, focal_loss  # noqa: E402
from model import atomic_write, load_checkpoint  # noqa: E402

COLORS = ("crimson", "royalblue", "forestgreen", "darkorange", "purple", "saddlebrown", "teal",
          "deeppink", "black", "olive")
VERDICTS = {"right": "#117733", "wrong": "#cc2222", "missed": "#1144cc"}
THRESHOLD = 0.3  # final score from which a detection is judged


def save(image, path: Path):
    evaluate.make_folder(path.parent, "--out")
    atomic_write(path, lambda file: image.save(file, "png"))
    print(path)


# --- charts -------------------------------------------------------------------------------------

class Panel(NamedTuple):
    """One line chart. Ticks: position -> label; by default round numbers that begin at 0."""
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


def chart(panels: list[Panel], columns=3) -> Image.Image:
    """Panels in a grid, each under its legend. Drawn at twice the size and reduced: smooth lines.

    The first curve of a panel is wider, so that another that coincides with it is seen too.
    """
    font, line = ImageFont.load_default(26), 36
    width = max(640, *(round(font.getlength(name)) for panel in panels for name in panel.curves))
    legends = [flow(panel.curves, font, width) for panel in panels]
    top = line * (3 + max(row for legend in legends for _, row in legend))
    cell_width, cell_height, rows = width + 160, top + 520, -(-len(panels) // columns)
    size = (cell_width * min(columns, len(panels)), cell_height * rows)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for n, (panel, legend) in enumerate(zip(panels, legends)):
        left, above = n % columns * cell_width + 110, n // columns * cell_height
        right, upper, lower = left + width, above + top, above + top + 400
        x, y = (np.concatenate(values) for values in zip(*panel.curves.values()))
        x_ticks, y_ticks = panel.x_ticks or ticks(x), panel.y_ticks or ticks(y)

        def place(x, y):
            return (np.interp(x, [min(x_ticks), max(x_ticks)], [left, right]),
                    np.interp(y, [min(y_ticks), max(y_ticks)], [lower, upper]))

        pen.text((left, above + line), panel.title, "black", font, "ls")
        pen.text(((left + right) / 2, lower + 82), panel.x_name, "black", font, "ms")
        for tick, label in x_ticks.items():
            x, _ = place(tick, 0)
            pen.line([(x, upper), (x, lower)], "gainsboro", 2)
            pen.text((x, lower + 12), label, "black", font, "ma")
        for tick, label in y_ticks.items():
            _, y = place(0, tick)
            pen.line([(left, y), (right, y)], "gainsboro", 2)
            pen.text((left - 12, y), label, "black", font, "rm")
        for k, ((name, curve), (x, row)) in enumerate(zip(panel.curves.items(), legend)):
            color, points = COLORS[k % len(COLORS)], list(zip(*place(*curve)))
            pen.text((left + x, above + line * (row + 2)), name, color, font, "ls")
            if points:
                wide = 10 if k == 0 and len(panel.curves) > 1 else 4
                pen.line(points, color, wide, joint="curve")
                pen.circle(points[-1], 6, color)
    return picture.reduce(2)


def flow(names, font, width) -> list[tuple[float, int]]:
    """Where the names of a legend go, like words in a paragraph: (x, row)."""
    places, x, row = [], 0.0, 0
    for length in map(font.getlength, names):
        if x and x + length > width:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += length + 36
    return places


# --- targets ------------------------------------------------------------------------------------

def draw_targets(args):
    image, boxes = read_image(args.data, args.image) if args.data else example()
    locations, labels = make_locations(image.height, image.width), torch.arange(len(boxes))
    columns = {title: assign_targets(locations, [boxes], [labels], radius)
               for title, radius in (("whole box", None), ("center sampling 1.5", 1.5))}
    print("positive locations       " + "".join(f"{title:<30}" for title in columns))
    print("box                  " + 2 * "    P3    P4    P5    P6    P7")
    for g, (w, h) in enumerate((boxes[:, 2:] - boxes[:, :2]).tolist()):
        counts = [((t.labels[0] == g) & (locations.stride == s)).sum()
                  for t in columns.values() for s in STRIDES]
        print(f"{COLORS[g % len(COLORS)]:<12}{f'{w:.0f} x {h:.0f}':<9}"
              + "".join(f"{count:6}" for count in counts))
    save(target_grid(image, boxes, locations, columns), args.out)


def example():
    """Four ellipses and their boxes (4, 4)."""
    boxes = [(24, 24, 404, 276), (224, 64, 424, 244), (496, 84, 584, 168), (544, 124, 592, 172)]
    image = Image.new("RGB", (640, 288), "#d8d8d8")
    for box, gray in zip(boxes, ("#a8a8a8", "#787878", "#787878", "#484848")):
        ImageDraw.Draw(image).ellipse(box, gray)
    return image, torch.tensor(boxes).float()


def read_image(root, image_id: int | None):
    """An image of the train or else the val split, and its boxes (G, 4); None: the first one."""
    for kind in ("train", "val"):
        json_file, folder = data.find_split(root, kind)
        dataset = data.CocoDataset(data.read_annotations(json_file), folder)
        found = (dataset.with_boxes() if image_id is None else
                 np.flatnonzero(dataset.annotations.image_ids == image_id))
        if len(found):
            boxes, _ = dataset.targets(found[0])
            return to_pil_image(dataset.image(found[0])), torch.from_numpy(boxes)
    wanted = "an image with boxes" if image_id is None else f"image {image_id}"
    raise UserError(f"{root}: {wanted} is in neither the train nor the val split; name another "
                    "with --image or --data")


def target_grid(image, boxes, locations, columns):
    """A row for each level that learns, a column for each of the targets; labels number the boxes.

    A positive location is drawn as its cell in the color of its box, as opaque as it is central.
    """
    width, head, gap = 480, 30, 12
    scale, height = width / image.width, round(width * image.height / image.width)
    pale = Image.blend(image.resize((width, height)), Image.new("RGB", (width, height), "white"),
                       0.6)
    learns = torch.stack([targets.labels[0] >= 0 for targets in columns.values()]).any(0)  # (L,)
    strides = locations.stride[learns].unique().int().tolist() or STRIDES
    picture = Image.new("RGB", (len(columns) * (width + gap) - gap,
                                len(strides) * (height + head)), "white")
    for row, stride in enumerate(strides):
        smallest, largest = locations.size_range[locations.stride == stride][0].clamp(min=0)
        for column, (title, targets) in enumerate(columns.items()):
            panel, here = pale.copy(), (locations.stride == stride) & (targets.labels[0] >= 0)
            pen = ImageDraw.Draw(panel, "RGBA")
            corner, side = (locations.xy[here] - stride / 2) * scale, max(0, stride * scale - 2)
            for (x, y), g, centerness in zip(corner.tolist(), targets.labels[0, here].tolist(),
                                             targets.centerness[0, here].tolist()):
                color = ImageColor.getrgb(COLORS[g % len(COLORS)])
                pen.rectangle((x, y, x + side, y + side), (*color, round(40 + 215 * centerness)))
            for g, box in enumerate((boxes * scale).tolist()):
                pen.rectangle(box, outline=COLORS[g % len(COLORS)], width=2)
            left, top = column * (width + gap), row * (height + head) + head - 4
            picture.paste(panel, (left, top))
            title = f"stride {stride}, max(l, t, r, b) {smallest:.0f} .. {largest:.0f}: {title}"
            ImageDraw.Draw(picture).text((left, top - 7), title, "black",
                                         ImageFont.load_default(16), "ls")
    return picture


# --- losses -------------------------------------------------------------------------------------

def draw_losses(args):
    target = torch.tensor([[20.0, 20, 20, 20]])
    box = {kind: lambda pred, kind=kind: box_loss(pred, target, kind)
           for kind in ("linear_iou", "giou", "iou")}
    print("target ltrb (20, 20, 20, 20); where d loss < 0, the side should be farther away")
    for name, *ltrb in (("too small", 10, 10, 10, 10), ("too large", 40, 40, 40, 40),
                        ("wide and flat", 40, 10, 40, 10), ("shifted", 10, 10, 30, 30),
                        ("shifted to the end", 0, 0, 40, 40), ("exact", 20, 20, 20, 20)):
        pred = torch.tensor([ltrb]).float()                                              # (1, 4)
        iou, giou = (1 - box[kind](pred).item() for kind in ("linear_iou", "giou"))
        print(f"\n{name} {ltrb}: IoU {iou:.3f}, GIoU {giou:.3f}")
        for kind, loss in box.items():
            value, gradient = with_gradient(loss, pred)
            numbers = [round(v, 4) + 0.0 for v in (*value.tolist(), *gradient[0].tolist())]  # no -0
            print("  {:<10} {:8.4f}    d loss / d ltrb {:8.4f} {:8.4f} {:8.4f} {:8.4f}".format(
                kind, *numbers))
    print()

    u = (torch.arange(128) + 0.5) / 128  # (128,) in 0 .. 1: no sample lies on a kink
    shift = 20 * u[:, None] * torch.tensor([-1, -1, 1, 1])
    focal = {f"gamma {gamma}": lambda logits, gamma=gamma: torch.stack(
        [focal_loss(logit[None], torch.tensor([0]), 1, gamma) for logit in logits])
        for gamma in (0, 1, 2)}
    values, gradients = [], []
    for title, by, x, losses, x_name, labels in (
            ("box loss", "ltrb", target * 4 ** (2 * u[:, None] - 1), box,
             "size / size of the target", "1/4 1/2 1 2 4"),
            ("box loss", "ltrb", target + shift, box,
             "shift in x and in y, pixels", "0 5 10 15 20"),
            ("focal loss, alpha 1", "logit", u[:, None].logit(), focal,
             "p_t, the probability of the right answer", "0 1/4 1/2 3/4 1")):
        x_ticks = {i / 4: label for i, label in enumerate(labels.split())}
        loss, slope = {}, {}
        for name, function in losses.items():
            value, gradient = with_gradient(function, x)
            loss[name], slope[name] = (u, value), (u, gradient.norm(dim=1))
        values.append(Panel(title, x_name, loss, x_ticks))
        gradients.append(Panel(f"|d loss / d {by}|", x_name, slope, x_ticks))
    save(chart(values + gradients), args.out)


def with_gradient(loss, x):
    """The loss (K,) of the rows of x, and its gradient, of the shape of x."""
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


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
    checkpoint = load_checkpoint(args.run)
    folder = (args.run if args.run.is_dir() else args.run.parent) / "eval"
    trained = checkpoint["config"]
    root = args.data or trained.get("data")
    if not root:
        raise UserError(f"{args.run}: does not say which data it was evaluated on; name it with "
                        "--data")
    dataset = data.open_split(root, "val", args.val_split or trained.get("val_split", ""))
    a = dataset.annotations
    evaluate.check_categories(a, **checkpoint["categories"], owner=str(args.run))
    results = read_results(folder / "results.json", a)
    evaluation = evaluate.coco_evaluation(a, results)
    pictures = {"precision_recall": precision_recall(evaluation, a.category_names)}
    for name, images in choose(judge(evaluation, a, results), results).items():
        pictures[name] = mosaic(dataset, results, images) if images else None
    for name, picture in pictures.items():
        if picture:
            save(picture, folder / f"{name}.png")
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an older evaluation
            print(f"no {name}.png: there is nothing to show at score {THRESHOLD}")


def read_results(path: Path, annotations: data.Annotations) -> evaluate.Results:
    """The detections that evaluate.py wrote."""
    if not path.exists():
        raise UserError(f"{path}: no such file; write it with python evaluate.py RUN")
    rows = json.loads(path.read_text())
    image_ids = np.array([row["image_id"] for row in rows], np.int64)
    if not np.isin(image_ids, annotations.image_ids).all():
        raise UserError(f"{path}: has images that {annotations.path} lacks; name the data that was "
                        "evaluated with --data and --val-split")
    boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [annotations.category_ids.index(row["category_id"]) for row in rows]
    return evaluate.Results(image_ids, boxes, np.array([row["score"] for row in rows], np.float32),
                            np.array(labels, np.int64))


def precision_recall(evaluation, names) -> Image.Image | None:
    """Precision against recall: the mean over classes at several IoUs, and each class at 0.5."""
    precision = evaluation.eval["precision"][..., 0, -1]  # (10 IoUs, 101 recalls, C)
    recall, AP50 = evaluation.params.recThrs, precision[0].mean(axis=0)
    known = sorted(np.flatnonzero(AP50 > -1), key=lambda k: -AP50[k])  # -1: has no true box
    if not known:
        return None
    title, shown = "by class", known
    if len(known) > 10:
        title, shown = "best and worst 5 classes", known[:5] + known[-5:]
    by_iou = {f"IoU {evaluation.params.iouThrs[t]:.1f}": (
        recall, precision[t][:, known].mean(axis=1)) for t in (0, 2, 4, 6, 8)}
    by_class = {f"{printable(names[k])} {AP50[k]:.2f}": (recall, precision[0, :, k]) for k in shown}
    unit = ticks([0, 1])
    return chart([Panel("precision, mean over classes", "recall", by_iou, unit, unit),
                  Panel(f"precision, IoU 0.5, {title}", "recall", by_class, unit, unit)])


def printable(text):
    return ascii(text)[1:-1]  # Pillow's font has no other letters


def judge(evaluation, annotations, results: evaluate.Results) -> dict[int, dict[str, list[int]]]:
    """Image -> what was right and wrong (indices of detections) and missed (of annotations).

    By pycocotools' matching at IoU 0.5. It matches the best scores first, so detections below the
    threshold change nothing above it.
    """
    index = {id: i for i, id in enumerate(annotations.image_ids.tolist())}
    drawable = data.learnable(annotations)
    verdicts = defaultdict(lambda: {verdict: [] for verdict in VERDICTS})
    for e in evaluation.evalImgs:                                   # one class in one image
        if e is None or e["aRng"] != evaluation.params.areaRng[0]:  # the first one: all areas
            continue
        detections, match = np.array(e["dtIds"], np.int64) - 1, e["dtMatches"][0]  # ids: from 1
        confident = results.scores[detections] >= THRESHOLD
        counts = confident & (e["dtIgnore"][0] == 0)
        verdict = verdicts[index[e["image_id"]]]
        verdict["right"] += detections[counts & (match > 0)].tolist()
        verdict["wrong"] += detections[counts & (match == 0)].tolist()
        verdict["missed"] += [id - 1 for id, ignored in zip(e["gtIds"], e["gtIgnore"])
                              if not ignored and id not in match[confident] and drawable[id - 1]]
    return verdicts


def choose(verdicts, results, count=8) -> dict[str, dict]:
    """The images that went best (by F1, something was right), worst and most confidently wrong."""
    def f1(v):
        return 2 * len(v["right"]) / (2 * len(v["right"]) + len(v["wrong"]) + len(v["missed"]))

    some = {i: v for i, v in verdicts.items() if any(v.values())}
    orders = {"best": lambda v: (-f1(v), -len(v["right"])) if v["right"] else None,
              "worst": lambda v: (f1(v), -len(v["wrong"] + v["missed"])) if f1(v) < 1 else None,
              "wrong": lambda v: -results.scores[v["wrong"]].max() if v["wrong"] else None}
    return {name: dict(sorted(((i, v) for i, v in some.items() if key(v) is not None),
                              key=lambda item: key(item[1]))[:count])
            for name, key in orders.items()}


def layout(aspect: np.ndarray, width=1280, height=300, gap=8, caption=26):
    """Images in rows of full width without holes: (left, top, width, height) of each.

    Each row holds about the same sum of aspect ratios (width / height), so all are about as high.
    """
    width = min(width, round(aspect.sum() * height))
    rows = max(1, round(aspect.sum() * height / width))
    row = ((aspect.cumsum() - aspect / 2) / aspect.sum() * rows).astype(int)
    places, top = [], 0
    for r in np.unique(row):
        edges = np.append(0, aspect[row == r].cumsum())
        edges = (edges * (width + gap) / edges[-1]).round().astype(int)  # a gap behind each
        tall = max(1, round((width - gap * (len(edges) - 2)) / aspect[row == r].sum()))
        places += [(left, top, max(1, right - gap - left), tall)
                   for left, right in zip(edges.tolist(), edges[1:].tolist())]
        top += tall + caption
    return places


def mosaic(dataset, results, images: dict[int, dict]) -> Image.Image:
    """The images with what was right, wrong (the 10 best scores) and missed (dashed)."""
    a, names = dataset.annotations, list(map(printable, dataset.annotations.category_names))
    sizes = a.sizes[list(images)]
    places = layout(sizes[:, 1] / sizes[:, 0])
    size = np.max([(x + w, y + h + 26) for x, y, w, h in places], axis=0).tolist()
    picture = Image.new("RGB", size, "white")
    for (i, verdicts), (x, y, w, h) in zip(images.items(), places):
        image = to_pil_image(dataset.image(i)).resize((w, h), Image.Resampling.LANCZOS)
        scale = np.tile([w / a.sizes[i, 1], h / a.sizes[i, 0]], 2)
        pen, colored = ImageDraw.Draw(image), image.copy()
        for box in a.boxes[verdicts["missed"]] * scale:
            pen.rectangle(box.tolist(), outline="white", width=2)
            ImageDraw.Draw(colored).rectangle(box.tolist(), outline=VERDICTS["missed"], width=2)
        stripes = np.add.outer(np.arange(h), np.arange(w)) % 10 < 6
        image.paste(colored, mask=Image.fromarray(stripes))
        wrong = sorted(verdicts["wrong"], key=lambda d: results.scores[d])[-10:]
        order = sorted([(results.scores[d], d, "right") for d in verdicts["right"]]
                       + [(results.scores[d], d, "wrong") for d in wrong])  # the best on top
        for _, d, verdict in order:
            pen.rectangle((results.boxes[d] * scale).tolist(), outline=VERDICTS[verdict], width=2)
        for m in verdicts["missed"]:  # named below, where no detection has its name
            x0, _, _, y1 = a.boxes[m] * scale
            tag(image, x0, y1, names[a.labels[m]], VERDICTS["missed"])
        for score, d, verdict in order:
            x0, y0, _, _ = results.boxes[d] * scale
            tag(image, x0, y0 - 15, f"{names[results.labels[d]]} {score:.2f}", VERDICTS[verdict])
        picture.paste(image, (x, y))
        for verdict, found in verdicts.items():
            text, font = f"{len(found)} {verdict}", ImageFont.load_default(min(15, w / 12))
            ImageDraw.Draw(picture).text((x, y + h + 17), text, VERDICTS[verdict], font, "ls")
            x += font.getlength(text + ", ")
    return picture


def tag(image, x, y, text, color):
    """White letters on a color, inside the image."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    width = font.getlength(text) + 4
    x, y = max(0, min(x, image.width - width)), max(0, min(y, image.height - 15))
    pen.rectangle((x, y, x + width, y + 14), color)
    pen.text((x + 2, y + 11), text, "white", font, "ls")


# --- command line -------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="PICTURE")

    def command(name, function, text):
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(function=function)
        if function is not draw_evaluation:
            added.add_argument("--out", type=Path, default=Path(f"runs/{name}.png"), metavar="FILE",
                               help=f"default: runs/{name}.png")
        return added

    targets = command("targets", draw_targets, "which location of which level learns which box")
    targets.add_argument("--data", metavar="DIR", help="COCO-format folder (default: an example)")
    targets.add_argument("--image", type=int, metavar="ID", help="default: the first with boxes")
    command("losses", draw_losses, "losses and their gradients, and a worked example as text")
    curves = command("curves", draw_curves, "losses and AP of runs, over one another")
    curves.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    judged = command("evaluation", draw_evaluation, "precision and recall, best and worst images")
    judged.add_argument("run", type=Path, metavar="RUN", help="evaluated folder or checkpoint")
    judged.add_argument("--data", metavar="DIR", help="COCO-format folder (default: the run's)")
    judged.add_argument("--val-split", default="", metavar="NAME", help="default: the run's")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    evaluate.run_program(main)
