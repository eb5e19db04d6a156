"""The top level and the tools can be imported; data sets and processes that several files need."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.ops import box_convert

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real data sets, where they are
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
FORKS = multiprocessing.get_context("forkserver")  # a start takes no import of torch
FORKS.set_forkserver_preload(["train"])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# --- data sets ----------------------------------------------------------------------------------

def good_content():
    """Four images, three categories with sparse unordered ids, five boxes; nothing is faulty."""
    boxes = [(7, 10, 900, [10, 20, 30, 35]), (8, 10, 3, [1.5, 2, 20, 20]),
             (9, 30, 41, [0, 0, 64, 48]), (12, 20, 3, [5, 5, 9, 12]),
             (11, 40, 900, [20, 10, 15, 25])]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48 + i}
                   for i in (30, 10, 20, 40)],
        "categories": [{"id": 900, "name": "cat"}, {"id": 3, "name": "dog"},
                       {"id": 41, "name": "eel"}],
        "annotations": [{"id": n, "image_id": i, "category_id": c, "bbox": b, "iscrowd": 0,
                         "area": b[2] * b[3], "segmentation": [[n, 2, 3, 4, 5, 6]]}
                        for n, i, c, b in boxes]}


def change(table, i, key, value=None):
    """A mutation of good_content: one value, or without it None (JSON's null)."""
    def mutate(content):
        content[table][i][key] = value
        return content
    return mutate


def repeated(table, **changes):
    return lambda content: content | {table: content[table] + [content[table][0] | changes]}


def write_split(root, content, split="train"):
    """A split with noise for its images; `content` may also be bytes. Returns the JSON file."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    for entry in good_content()["images"]:
        random = np.random.default_rng([entry["id"], len(split)])
        pixels = random.integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / entry["file_name"])
    path = root / "annotations" / f"instances_{split}.json"
    path.write_bytes(content if type(content) is bytes else json.dumps(content).encode())
    return path


def edit(path, change):
    """Change a JSON file by `change(content)`."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def link_copy(source, folder):
    """A copy of a folder that may be changed file by file."""
    return Path(shutil.copytree(source, folder, copy_function=lambda a, b: (
        shutil.copy(a, b) if a.endswith(("json", "jsonl")) else os.link(a, b))))


def truth_as_detections(a, score=1.0):
    boxes = box_convert(torch.from_numpy(a.boxes).float(), "xyxy", "xywh").tolist()
    return [dict(image_id=int(a.image_ids[a.image[k]]), category_id=a.category_ids[a.labels[k]],
                 bbox=boxes[k], score=score) for k in np.flatnonzero(~a.crowd)]


# --- references ---------------------------------------------------------------------------------

def exact_focal_loss(logits, labels, alpha=0.25, gamma=2.0, scale=1.0):
    """The focal loss and its gradient, as the paper defines them (eq. 5), in float64."""
    x = logits.detach().double().cpu().requires_grad_()
    is_class = labels.cpu()[:, None] == torch.arange(x.shape[1])
    z = torch.where(is_class, x, -x)  # p_t = sigmoid(z)
    alpha_t = torch.where(is_class, alpha, 1 - alpha)
    loss = -(alpha_t * (-z).sigmoid()**gamma * F.logsigmoid(z)).sum() * float(scale)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def greedy_nms(boxes, scores, groups, iou_threshold):
    """Which boxes survive NMS, by torchvision's CPU `nms`, group by group; negative: padding."""
    device, boxes, scores, groups = boxes.device, boxes.cpu(), scores.cpu(), groups.cpu()
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # each group side by side, best first
    names, sizes = groups[order].unique_consecutive(return_counts=True)
    keep = torch.zeros(len(boxes), dtype=torch.bool)
    for name, members in zip(names.tolist(), order.split(sizes.tolist())):
        if name >= 0:
            falling = -torch.arange(len(members), dtype=boxes.dtype)  # the order without ties
            keep[members[torchvision.ops.nms(boxes[members], falling, iou_threshold)]] = True
    return keep.to(device)


# --- processes ----------------------------------------------------------------------------------

def start(output, *options, world=1, program="train"):
    """Programs in processes of their own, as torchrun starts them; what they print: a file.

    RANK in an option becomes the number of the process.
    """
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1"),
                            ("CUDA_VISIBLE_DEVICES", "")):
            patch.setenv(name, value)  # of the server
        processes = []
        for rank in range(world):
            ranks = {} if world == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            texts = [str(option).replace("RANK", str(rank)) for option in options]
            arguments = (program, texts, ranks, str(output))
            processes.append(FORKS.Process(target=_child, args=arguments))
            processes[-1].start()
    return processes


def _child(program, options, ranks, output):
    import evaluate  # the forkserver has them; tests without processes need neither
    import train
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a user's
    os.setsid()
    os.environ.update(ranks)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{program}.py", *options]
    evaluate.run_program({"train": train, "evaluate": evaluate}[program].main)


def finish(processes, timeout=120):
    """The exit codes."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
