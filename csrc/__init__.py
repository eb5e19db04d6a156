"""csrc: two CUDA kernels, and the code that builds, loads and calls them.

    nms.cu          greedy NMS in every group (image x class) of a whole batch
    focal_loss.cu   the focal loss and its gradient in one pass over the logits

The functions take CUDA tensors, once `available()` has returned True: its first call loads the
extension, and builds it if need be. Importing builds nothing. `loss.py` and `model.py` hold the
same formulas in plain PyTorch, for every other device.

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
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---- functions -----------------------------------------------------------------------------------


@functools.cache
def available() -> bool:
    """True where the CUDA extension is built and loaded. The first call may build it: a minute."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.ops.load_library(library())
        return True
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        first_rank = os.environ.get("LOCAL_RANK", "0") == "0"  # one warning, not one for every GPU
        logging.getLogger(__name__).log(
            logging.WARNING if first_rank else logging.DEBUG,
            "csrc: no CUDA kernels: %s. Plain PyTorch is used instead; see python -m csrc",
            str(error).partition("\n")[0])
        return False


def nms_mask(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS inside each group, for a whole batch in one call: which boxes survive, (K,) bool.

    From the best score to the worst, equal scores by index: a box survives iff no survivor before
    it in its group has IoU > `iou_threshold` with it. boxes (K,4) xyxy float32; scores (K,) float32
    or half precision; groups (K,) int64, such as image * C + class. A negative group is padding: it
    neither survives nor suppresses. No host-device sync, fit for a CUDA graph.
    """
    return torch.ops.fcos.nms_mask(boxes, scores, groups, iou_threshold)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0,
               scale: Tensor | None = None) -> Tensor:
    """The focal loss of every logit (arXiv:1708.02002, eq. 5), summed: a () float32 tensor.

    logits (R,C) float32, bfloat16 or float16, computed in float32; labels (R,) int64, where any
    outside [0, C), such as -1, is background. `scale`, a () float32 tensor on the device,
    multiplies the sum and is held constant: with the normalizer there, the forward pass writes the
    final gradient. First derivatives only.
    """
    return _FocalLoss.apply(logits, labels, alpha, gamma, scale)


class _FocalLoss(torch.autograd.Function):
    """The forward pass writes the gradient too. The backward pass multiplies it by `grad_loss`."""

    @staticmethod
    def forward(ctx, logits, labels, alpha, gamma, scale):
        loss, grad = torch.ops.fcos.focal_loss(logits, labels, alpha, gamma, scale)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad, = ctx.saved_tensors
        if torch._C._autograd._get_current_graph_task_keep_graph():  # needed again
            grad = grad * grad_loss
        else:
            torch.ops.fcos.scale_(grad, grad_loss)  # in place; returns at once if grad_loss is 1
        return grad, None, None, None, None


# ---- build ---------------------------------------------------------------------------------------

SOURCES = [Path(__file__).with_name(name) for name in ("nms.cu", "focal_loss.cu")]
TIMEOUT = 600  # seconds for a build, and for waiting while another process builds
BUILD = """import sys; from torch.utils.cpp_extension import load; scratch, *sources = sys.argv[1:]
load("fcos", sources, build_directory=scratch, extra_cuda_cflags=["-O3"], is_python_module=False,
     verbose=True)"""


def library(show: bool = False) -> Path:
    """The path of the extension, built first if need be: by one process, while the others wait.

    A killed build does no harm: the system frees its lock, and a complete `fcos.so` is renamed
    into place.
    """
    folder = build_folder()
    built, failed, arrived = folder / "fcos.so", folder / "failed.log", time.time()
    if built.exists():
        return built
    if missing := [f"{name} ({remedy})" for name, found, remedy in requirements() if not found]:
        raise RuntimeError("missing " + " and ".join(missing))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() - arrived > TIMEOUT:
                    raise TimeoutError(
                        f"another process has held {lock.name} for {TIMEOUT} s") from None
                time.sleep(0.1)
        if built.exists():
            return built
        if failed.exists() and failed.stat().st_mtime > arrived:  # or each rank would try in turn
            raise RuntimeError(f"the build has just failed in another process, see {failed}")
        for abandoned in folder.glob("building-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder,
                                         ignore_cleanup_errors=True) as scratch:
            # in a process of its own, as torch reads CUDA_HOME once, at import
            build = subprocess.run([sys.executable, "-c", BUILD, scratch, *map(str, SOURCES)],
                                   stdout=None if show else subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
                                   env=_environment())
            if build.returncode:
                output = build.stdout or ""
                failed.write_text(output)
                error = re.search(r".*(error|fatal).*", output, re.IGNORECASE)
                raise RuntimeError(f"the build failed, see {failed}: {error[0] if error else ''}")
            os.replace(Path(scratch) / "fcos.so", built)
    return built


def build_folder() -> Path:
    """Another PyTorch, CUDA, architecture or source: another folder."""
    content = b"".join(path.read_bytes() for path in SOURCES) + BUILD.encode()
    name = (f"fcos-torch{torch.__version__}-cuda{torch.version.cuda}-sm{_architectures()}-"
            f"{hashlib.sha256(content).hexdigest()[:12]}")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    return Path(root).expanduser() / re.sub(r"[^\w.+-]", "_", name)


def requirements() -> list[tuple[str, str | None, str]]:
    """(what a build needs, what was found, how to get it)"""
    home, nvcc = _cuda_home(), None
    if home:
        version = _output(home / "bin/nvcc", "--version")
        nvcc = (re.findall(r"release (\d+\.\d+)", version) or ["?"])[0]
    major = (torch.version.cuda or "?").partition(".")[0]
    path, compiler = _environment()["PATH"], os.environ.get("CXX", "c++")
    return [
        ("a CUDA build of PyTorch", torch.version.cuda, "see https://pytorch.org/get-started"),
        ("a GPU", _architectures(), "none is visible; TORCH_CUDA_ARCH_LIST=9.0 builds without one"),
        ("a CUDA toolkit", home and f"{home}, nvcc {nvcc}",
         "install one with bin/nvcc and lib64/libcudart.so, and set CUDA_HOME"),
        (f"CUDA {major}, like PyTorch's", nvcc and nvcc.startswith(major + ".") and f"nvcc {nvcc}",
         f"install the CUDA {torch.version.cuda} toolkit, and set CUDA_HOME"),
        ("ninja", shutil.which("ninja", path=path), "pip install ninja"),
        ("a C++ compiler", shutil.which(compiler, path=path),
         f"install g++, or set CXX; {compiler} was not found"),
    ]


def _cuda_home() -> Path | None:
    """The first complete toolkit. An nvcc on the PATH may be a link or a script: ask it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        top = re.findall(r"TOP=(.+)", _output(nvcc, "--dryrun", "x.cu"))
        homes += [Path(nvcc).resolve().parents[1], *top]
    for home in [Path(home).resolve() for home in homes + ["/usr/local/cuda"] if home]:
        libraries = [home / "lib64/libcudart.so", home / "lib/libcudart.so"]
        if (home / "bin/nvcc").exists() and any(library.exists() for library in libraries):
            return home
    return None


def _output(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def _architectures() -> str:
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(f"{x}.{y}" for x, y in sorted(found))


def _environment() -> dict[str, str]:
    beside_python = Path(sys.executable).parent  # where pip puts ninja
    return {**os.environ, "PATH": f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}",
            "CUDA_HOME": str(_cuda_home() or ""), "TORCH_CUDA_ARCH_LIST": _architectures()}
