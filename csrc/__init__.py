"""csrc: two CUDA kernels at the limit of the memory, each beside the plain PyTorch that says what it computes.

    nms.cu          greedy NMS in every group (image x class) of a whole batch
    focal_loss.cu   the focal loss and its gradient in one pass over the logits

The operators `fcos::*` are defined here, with the PyTorch references as the implementation for every device. The first
call with a CUDA tensor builds and loads the extension, whose kernels then take their place in the dispatcher. Where
that fails, one line says what is missing, and the references go on.

    python -m csrc             what was found, what is missing, what is built
    python -m csrc --build     build now, and show the compiler's output

Letters: K boxes, R rows (locations of all images), C classes.
"""

import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

# ---- non-maximum suppression -----------------------------------------------------------------------------------------


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS inside each group: the (M,) indices of the boxes that survive, best score first.

    See `nms_mask`. This output's length depends on the data, which costs one synchronisation on CUDA.
    """
    order = _best_first(boxes, scores, groups, iou_threshold)
    return order[torch.ops.fcos.nms_mask(boxes.float(), order, groups, iou_threshold)[order]]


def nms_mask(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS inside each group, for a whole batch in one call: which of the boxes survive, (K,) bool.

    From the best score to the worst, equal scores by index: a box survives iff no survivor of its group before it
    has IoU > `iou_threshold` with it. boxes (K,4) xyxy, scores (K,), groups (K,) int64, such as image * C + class.
    A negative group marks padding, which neither survives nor suppresses. On CUDA nothing here waits for the device,
    and every shape is known, so that it can stand in a CUDA graph (after one call outside, which loads the kernel).
    """
    order = _best_first(boxes, scores, groups, iou_threshold)
    return torch.ops.fcos.nms_mask(boxes.float(), order, groups, iou_threshold)


def _best_first(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    K = len(boxes)
    _check(boxes.ndim == 2 and boxes.shape[1] == 4 and boxes.is_floating_point(), "boxes: (K,4) floating point", boxes)
    _check(scores.shape == (K,) and scores.device == boxes.device, f"scores: ({K},) on {boxes.device}", scores)
    _check(groups.shape == (K,) and groups.dtype == torch.int64 and groups.device == boxes.device,
           f"groups: ({K},) int64 on {boxes.device}", groups)
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"csrc: expected iou_threshold in [0, 1], got {iou_threshold}")
    return scores.argsort(descending=True, stable=True)  # stable: equal scores by index


def nms_mask_reference(boxes: Tensor, order: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """What nms.cu computes. boxes (K,4) float32, order (K,) indices best first, groups (K,) -> kept (K,) bool.

    torchvision's CPU `nms`, group by group: exact, where its `batched_nms` shifts the boxes of each class by an
    offset, and so rounds them. It runs on the CPU wherever the boxes are: a thousand small groups go faster there.
    """
    device, boxes, order, groups = boxes.device, boxes.cpu(), order.cpu(), groups.cpu()
    groups, by_group = groups[order].sort(stable=True)  # groups side by side, each still best first
    index = order[by_group]
    boxes = boxes[index]
    alive = groups >= 0
    names, sizes = groups.unique_consecutive(return_counts=True)
    falling = -torch.arange(len(boxes), dtype=torch.float32)  # the order of the scores, without their ties
    start = 0
    for name, size in zip(names.tolist(), sizes.tolist()):
        if name >= 0 and size > 1:
            group = slice(start, start + size)
            alive[group] = False
            alive[start + nms(boxes[group], falling[group], iou_threshold)] = True
        start += size
    keep = torch.empty_like(alive)
    keep[index] = alive
    return keep.to(device)


# ---- focal loss ------------------------------------------------------------------------------------------------------


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0,
               scale: float | Tensor = 1.0) -> Tensor:
    """The focal loss of every logit, summed (Lin et al., arXiv:1708.02002, Sec. 3): a float32 scalar.

        FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t)                                      (eq. 5)

    Each logit is a binary question, p = sigmoid(logit): "is this location an object of class c?" p_t is the
    probability given to the right answer, p if c is the row's label, else 1 - p; alpha_t is alpha or 1 - alpha.
    A location that is plainly background has p_t near 1, and (1 - p_t)^gamma all but removes it: without this, the
    hundred thousand easy ones drown the few that hold an object. gamma = 0 leaves the cross-entropy.

    logits (R,C) float32, bfloat16 or float16, the arithmetic is float32; labels (R,) int64, any outside [0, C), such
    as -1, makes the row background. `scale` multiplies the sum: a number or a scalar tensor on the device, held
    constant. Fold the normaliser in here, and the backward pass finds its gradient finished by the forward pass.
    First derivatives only.
    """
    _check(logits.ndim == 2 and logits.dtype in (torch.float32, torch.bfloat16, torch.float16),
           "logits: (R,C) float32, bfloat16 or float16", logits)
    _check(labels.shape == logits.shape[:1] and labels.dtype == torch.int64 and labels.device == logits.device,
           f"labels: ({len(logits)},) int64 on {logits.device}", labels)
    if gamma < 0:
        raise ValueError(f"csrc: expected gamma >= 0, got {gamma}")
    if not isinstance(scale, Tensor):
        scale = None if scale == 1 else logits.new_full((), scale, dtype=torch.float32)
    else:
        _check(scale.numel() == 1 and scale.device == logits.device, f"scale: () on {logits.device}", scale)
        scale = scale.detach().float()
    return torch.ops.fcos.focal_loss(logits, labels, alpha, gamma, scale)[0]


def focal_loss_reference(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0,
                         scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What focal_loss.cu computes: the summed loss () and its gradient (R,C), in the logits' dtype."""
    hot = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)  # (R,C) is it the row's class?
    z = torch.where(hot, -logits.float(), logits.float())
    q = z.sigmoid()                    # 1 - p_t, the probability given to the wrong answer
    ce = F.softplus(z)                 # -log(p_t), safe however large the logit
    weight = torch.where(hot, alpha, 1 - alpha) * (1 if scale is None else scale)
    weight = weight * q ** gamma       # alpha_t (1 - p_t)^gamma
    slope = weight * (gamma * (1 - q) * ce + q)  # d loss / dz, as dq/dz = q (1 - q) and dce/dz = q
    return (weight * ce).sum(), torch.where(hot, -slope, slope).to(logits.dtype)


def _save_gradient(ctx, inputs, output):
    _, grad = output
    ctx.mark_non_differentiable(grad)  # so the loss alone can bring a backward pass here
    ctx.set_materialize_grads(False)  # or autograd would fill zeros as large as the logits for `grad`
    ctx.save_for_backward(grad)


def _focal_loss_backward(ctx, grad_loss, _):
    grad, = ctx.saved_tensors
    retained = torch._C._autograd._get_current_graph_task_keep_graph()
    if retained or type(grad) is not Tensor:  # needed unscaled for another backward; or traced by torch.compile
        grad = grad * grad_loss
    else:
        torch.ops.fcos.scale_(grad, grad_loss)  # in place, and for a grad_loss of 1 without touching it
    return grad, None, None, None, None


def _scale(grad: Tensor, factor: Tensor) -> None:
    grad.mul_(factor)


# ---- operators -------------------------------------------------------------------------------------------------------


def _check(condition: bool, expected: str, got: Tensor) -> None:
    if not condition:
        raise ValueError(f"csrc: expected {expected}; got {tuple(got.shape)} {got.dtype} on {got.device}")


def _define(name: str, schema: str, reference, fake) -> None:
    """Register `reference` for every device. A kernel of the extension takes precedence once it is loaded."""
    def until_loaded(*args):
        kernel = getattr(torch.ops.fcos, name) if args[0].is_cuda and available() else reference
        return kernel(*args)

    torch.library.define(f"fcos::{name}", schema)
    torch.library.impl(f"fcos::{name}", "CompositeExplicitAutograd", until_loaded)
    torch.library.register_fake(f"fcos::{name}", fake)


_define("nms_mask", "(Tensor boxes, Tensor order, Tensor groups, float iou_threshold) -> Tensor",
        nms_mask_reference, lambda boxes, order, groups, iou_threshold: boxes.new_empty(len(boxes), dtype=torch.bool))
_define("focal_loss", "(Tensor logits, Tensor labels, float alpha, float gamma, Tensor? scale) -> (Tensor, Tensor)",
        focal_loss_reference, lambda logits, labels, alpha, gamma, scale: (
            logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape)))
_define("scale_", "(Tensor(a!) grad, Tensor factor) -> ()", _scale, lambda grad, factor: None)
torch.library.register_autograd("fcos::focal_loss", _focal_loss_backward, setup_context=_save_gradient)

# ---- build -----------------------------------------------------------------------------------------------------------

SOURCES = [Path(__file__).with_name(name) for name in ("nms.cu", "focal_loss.cu")]
TIMEOUT = 600  # seconds for a build, and for waiting while another process builds
BUILD = """import sys; from torch.utils.cpp_extension import load; scratch, *sources = sys.argv[1:]
load("fcos", sources, build_directory=scratch, extra_cuda_cflags=["-O3"], is_python_module=False, verbose=True)"""


@functools.cache
def available() -> bool:
    """True where the CUDA extension is loaded. The first call loads it, and builds it if need be (about a minute)."""
    try:
        torch.ops.load_library(library())
        return True
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        level = logging.WARNING if os.environ.get("LOCAL_RANK", "0") == "0" else logging.DEBUG  # once, not for every GPU
        logging.getLogger(__name__).log(
            level, "csrc: no CUDA kernels: %s. Going on with torchvision's nms and plain PyTorch; see python -m csrc",
            str(error).partition("\n")[0])
        return False


def library(show: bool = False) -> Path:
    """The path of the extension, built first where it is not yet: by one process, while the others wait.

    Nothing that a killed build leaves behind matters: the kernel frees its lock, and `fcos.so` is renamed into its
    place when it is whole.
    """
    folder = build_folder()
    built = folder / "fcos.so"
    if built.exists():
        return built
    if missing := [f"{name} ({remedy})" for name, found, remedy in requirements() if not found]:
        raise RuntimeError("missing " + " and ".join(missing))
    folder.mkdir(parents=True, exist_ok=True)
    arrived, failed = time.time(), folder / "failed.log"
    with open(folder / "lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() - arrived > TIMEOUT:
                    raise TimeoutError(f"another process has held {lock.name} for {TIMEOUT} s") from None
                time.sleep(0.1)
        if built.exists():
            return built
        if failed.exists() and failed.stat().st_mtime > arrived:  # do not let every rank fail in its turn
            raise RuntimeError(f"the build has just failed in another process, see {failed}")
        for abandoned in folder.glob("building-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder, ignore_cleanup_errors=True) as scratch:
            # a process of its own, as torch reads CUDA_HOME once, at import
            build = subprocess.run([sys.executable, "-c", BUILD, scratch, *map(str, SOURCES)], env=_environment(),
                                   text=True, timeout=TIMEOUT, stdout=None if show else subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
            if build.returncode:
                failed.write_text(build.stdout or "")
                errors = [line for line in (build.stdout or "").splitlines() if "error" in line.lower()]
                raise RuntimeError(f"the build failed, see {failed}: {errors[0].strip() if errors else ''}")
            os.replace(Path(scratch) / "fcos.so", built)
    return built


def build_folder() -> Path:
    """Another PyTorch, CUDA, architecture or source: another folder."""
    source = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES) + BUILD.encode()).hexdigest()[:12]
    name = f"fcos-torch{torch.__version__}-cuda{torch.version.cuda}-sm{_architectures()}-{source}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    return Path(root).expanduser() / re.sub(r"[^\w.+-]", "_", name)


def requirements() -> list[tuple[str, str | None, str]]:
    """(what a build needs, what was found, how to get it)"""
    home, nvcc = _cuda_home(), None
    if home:
        version = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
        nvcc = (re.findall(r"release (\d+)\.(\d+)", version) or [("?", "?")])[0]
    major = (torch.version.cuda or "?").partition(".")[0]
    path, compiler = _environment()["PATH"], os.environ.get("CXX", "c++")
    return [
        ("a CUDA build of PyTorch", torch.version.cuda, "see https://pytorch.org/get-started"),
        ("a GPU", _architectures(), "none is visible; TORCH_CUDA_ARCH_LIST=9.0 builds without one"),
        ("a CUDA toolkit", home and f"{home}, nvcc {'.'.join(nvcc)}",
         "install one with bin/nvcc and lib64/libcudart.so, and set CUDA_HOME"),
        (f"CUDA {major}, like PyTorch's", nvcc and nvcc[0] == major and f"nvcc {'.'.join(nvcc)}",
         f"install the CUDA {torch.version.cuda} toolkit, and set CUDA_HOME"),
        ("ninja", shutil.which("ninja", path=path), "pip install ninja"),
        ("a C++ compiler", shutil.which(compiler, path=path), f"install g++, or set CXX; {compiler} was not found"),
    ]


def _cuda_home() -> Path | None:
    """The first complete toolkit. An nvcc on the PATH may be a link or a script: nvcc itself knows where it lives."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        homes += [Path(nvcc).resolve().parents[1], *re.findall(r"TOP=(.+)", dry_run)]
    for home in [Path(home).resolve() for home in homes + ["/usr/local/cuda"] if home]:
        if (home / "bin/nvcc").exists() and any((home / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
            return home
    return None


def _architectures() -> str:
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # pip puts ninja beside python
    return {**os.environ, "PATH": path, "CUDA_HOME": str(_cuda_home() or ""), "TORCH_CUDA_ARCH_LIST": _architectures()}
