"""csrc: the kernels against their definitions, and the build. The kernels' tests need a GPU."""

import functools
import itertools
import logging
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

import csrc
from conftest import ROOT, exact_focal_loss, greedy_nms

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
needs_nvcc = pytest.mark.skipif(csrc._cuda_home() is None, reason="needs a CUDA toolkit with nvcc")


@pytest.fixture(scope="module")
def kernels():
    assert csrc.available(), "the CUDA extension could not be built; run python -m csrc --build"


def on(device, *tensors):
    return [x.to(device) for x in tensors]


# ---- NMS ---------------------------------------------------------------------------------------

KINDS = ("random", "integers", "identical", "empty", "reversed", "huge", "nonfinite", "ties",
         "apart")


def candidates(K, G, kind="random", seed=0):
    """K boxes of one kind in about G groups, one of them padding where there are several."""
    rng = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(K, 2, generator=rng) * 60, torch.rand(K, 2, generator=rng) * 40
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(K, generator=rng)
    shuffled = torch.randperm(K, generator=rng)
    groups = shuffled if G >= K else torch.randint(-(G > 1), G, (K,), generator=rng)
    if kind == "integers":
        boxes = boxes.round()
    if kind == "identical":
        boxes[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    if kind == "empty":
        boxes[::3, 2:] = boxes[::3, :2]
    if kind == "reversed":
        boxes[::3] = boxes[::3][:, [2, 3, 0, 1]]
    if kind == "huge":
        boxes = boxes * 1e6 + 1e8
    if kind == "nonfinite":
        boxes[::4, 1], boxes[1::4, 2], boxes[2::9] = float("nan"), float("inf"), -float("inf")
        scores[::5] = float("nan")
    if kind == "ties":  # 0 and -0 among them
        scores = (scores * 4).round() / 4 * torch.where(shuffled % 2 > 0, 1, -1)
    if kind == "apart":  # nearly all survive
        boxes += 60 * (shuffled // 2)[:, None]
    return boxes, scores, groups


@gpu
@pytest.mark.parametrize("K", [0, 1, 31, 64, 65, 1025, 5000, 16384, 16385, 80000])
def test_nms_kernel_equals_greedy_nms(kernels, K):
    kinds = KINDS if K <= 1025 else ("random", "ties", "apart")
    for seed, (G, kind) in enumerate(itertools.product([1, 80, 1280, K], kinds)):
        case = candidates(K, G, kind, seed)
        assert csrc.nms_mask(*on("cuda", *case), 0.6).cpu().equal(greedy_nms(*case, 0.6)), (G, kind)


@gpu
def test_nms_kernel_takes_half_precision_scores_and_boxes_that_are_not_aligned(kernels):
    boxes, scores, groups = on("cuda", *candidates(500, 3))
    expected = greedy_nms(boxes, scores.half(), groups, 0.5)
    shifted = torch.cat([boxes.new_zeros(1), boxes.flatten()])[1:].view(-1, 4)
    for boxes in (shifted, boxes.t().contiguous().t()):
        assert csrc.nms_mask(boxes, scores.half(), groups, 0.5).equal(expected)


# ---- focal loss --------------------------------------------------------------------------------


def rows(R, C, dtype=torch.float32, device="cpu", spread=4.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, C, generator=rng) * spread
    labels = torch.randint(-1, C, (R,), generator=rng)
    return logits.to(device, dtype).requires_grad_(), labels.to(device)


def assert_focal_loss_is_right(logits, labels, **options):
    loss = csrc.focal_loss(logits, labels, **options)
    grad, = torch.autograd.grad(loss, logits)
    expected_loss, expected_grad = exact_focal_loss(logits, labels, **options)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[logits.dtype]
    assert loss.dtype == torch.float32 and grad.dtype == logits.dtype
    torch.testing.assert_close(loss.double().cpu(), expected_loss, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(grad.double().cpu(), expected_grad, rtol=rounding, atol=1e-6)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R, C", [(0, 80), (1, 1), (31, 3), (64, 80), (65, 7), (1025, 91),
                                  (80000, 80), (80000, 1)])
def test_focal_kernel_equals_float64(kernels, R, C, dtype):
    scale = torch.tensor(1 / 7, device="cuda")
    for seed, gamma in itertools.product(range(3), [2.0, 1.5, 0.0]):
        logits, labels = rows(R, C, dtype, "cuda", seed=seed)
        assert_focal_loss_is_right(logits, labels, gamma=gamma)
        assert_focal_loss_is_right(logits, labels, alpha=0.4, gamma=gamma, scale=scale)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_kernel_takes_what_is_not_aligned_or_not_contiguous(kernels, dtype):
    logits, labels = rows(66, 7, dtype, "cuda")
    assert_focal_loss_is_right(logits.detach()[1:].requires_grad_(), labels[1:])
    assert_focal_loss_is_right(logits.detach().t().contiguous().t().requires_grad_(), labels)


@gpu
def test_focal_kernel_is_safe_for_logits_of_a_hundred_and_passes_nan_on(kernels):
    logits = torch.tensor([[100.0, -100, 89, -89], [100, -100, 100, -100]], device="cuda")
    assert_focal_loss_is_right(logits.requires_grad_(), torch.tensor([1, 0], device="cuda"))
    assert csrc.focal_loss(logits * float("nan"), torch.tensor([-1, 0], device="cuda")).isnan()


@gpu
def test_focal_loss_can_be_differentiated_twice_over_a_retained_graph(kernels):
    logits, labels = rows(31, 5, device="cuda")
    loss = csrc.focal_loss(logits, labels) * 3
    first, = torch.autograd.grad(loss, logits, retain_graph=True)
    second, = torch.autograd.grad(loss, logits)
    assert first.equal(second)
    expected = 3 * exact_focal_loss(logits, labels)[1]
    torch.testing.assert_close(first.double().cpu(), expected, rtol=1e-5, atol=1e-6)


# ---- both kernels ------------------------------------------------------------------------------

WRONG = [
    (lambda b, s, g: csrc.nms_mask(b[:, :3], s, g, 0.5), r"boxes must be \(K,4\) .* got \[7, 3\]"),
    (lambda b, s, g: csrc.nms_mask(b.double(), s, g, 0.5), "boxes must be .* Double"),
    (lambda b, s, g: csrc.nms_mask(b, s[:5], g, 0.5), r"scores must be \(7,\) .* got \[5\]"),
    (lambda b, s, g: csrc.nms_mask(b, s.double(), g, 0.5), "scores must be .* Double"),
    (lambda b, s, g: csrc.nms_mask(b, s, g.int(), 0.5), r"groups must be \(7,\) int64 .* Int"),
    (lambda b, s, g: csrc.nms_mask(b, s, g, 60), r"iou_threshold must be in \[0, 1\], got 60"),
    (lambda b, s, g: csrc.focal_loss(b[None], g), r"logits must be \(R,C\), got \[1, 7, 4\]"),
    (lambda b, s, g: csrc.focal_loss(b.double(), g), "float16 or bfloat16, got Double"),
    (lambda b, s, g: csrc.focal_loss(b, g[:3]), r"labels must be \(7,\) int64 .* got \[3\]"),
    (lambda b, s, g: csrc.focal_loss(b, g, gamma=-1), "gamma must be >= 0, got -1"),
    (lambda b, s, g: csrc.focal_loss(b, g, scale=s), r"scale must be one float32 .* got \[7\]"),
]


@gpu
@pytest.mark.parametrize("wrong, message", WRONG)
def test_wrong_inputs_are_refused_with_what_was_got(kernels, wrong, message):
    with pytest.raises(RuntimeError, match=message):
        wrong(*on("cuda", *candidates(7, 1)))


@pytest.fixture
def run_both(kernels):
    """A call of both kernels, and what it reads."""
    case, (logits, labels) = on("cuda", *candidates(5000, 80)), rows(22400, 80, device="cuda")
    losses = functools.partial(csrc.focal_loss, logits.detach_(), labels)
    return lambda: (csrc.nms_mask(*case, 0.6), losses()), case, logits


@gpu
def test_kernels_give_the_same_bits_every_run(run_both):
    case = on("cuda", *candidates(20000, 3, "apart"))  # groups over many blocks
    run = lambda: (*run_both[0](), csrc.nms_mask(*case, 0.6))  # noqa: E731
    first, *others = [run() for _ in range(10)]
    assert all(x.equal(y) for other in others for x, y in zip(first, other))


@gpu
def test_kernels_follow_the_current_stream(run_both):
    run, (boxes, *_), logits = run_both
    expected, fresh = run(), (boxes.clone(), logits.clone())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        boxes.zero_(), logits.zero_()
        torch.cuda._sleep(10**8)  # what follows must queue behind this
        boxes.copy_(fresh[0]), logits.copy_(fresh[1])
        got = run()
        torch.cuda.current_stream().synchronize()
    assert all(x.equal(y) for x, y in zip(got, expected))


@two_gpus
def test_kernels_run_on_the_device_of_their_inputs(kernels):
    case = candidates(1025, 80)
    assert csrc.nms_mask(*on("cuda:1", *case), 0.6).cpu().equal(greedy_nms(*case, 0.6))
    assert_focal_loss_is_right(*rows(65, 80, device="cuda:1"))


@gpu
def test_kernels_can_be_captured_and_replayed(run_both):
    run, case, _ = run_both
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for seed in (1, 2):  # new candidates in the same memory
        for static, fresh in zip(case, candidates(5000, 80, seed=seed)):
            static.copy_(fresh)
        graph.replay()
        assert all(got.equal(expected) for got, expected in zip(outputs, run()))


@gpu
@pytest.mark.parametrize("K", [5000, 20000])  # counted and sorted
def test_kernels_need_no_host_device_sync(kernels, K):
    case, (logits, labels) = on("cuda", *candidates(K, 80)), rows(1025, 80, device="cuda")
    scale = torch.tensor(0.5, device="cuda")
    csrc.focal_loss(logits, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        csrc.nms_mask(*case, 0.6)
        csrc.focal_loss(logits, labels, scale=scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_kernels_are_clean_under_compute_sanitizer(kernels, tool):
    code = ("import sys; sys.path[:0] = ['.', 'tests']; from test_csrc import *; csrc.available()\n"
            "for K in (1, 65, 1025): csrc.nms_mask(*on('cuda', *candidates(K, 7)), 0.6)\n"
            "csrc.nms_mask(*on('cuda', *candidates(16385, 80)), 0.6)\n"
            "for C in (3, 80): csrc.focal_loss(*rows(65, C, device='cuda')).mul(2).backward()")
    subprocess.run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
                    "--kernel-regex", "kns=fcos",  # their namespace: leave PyTorch's sorts out
                    sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


# ---- build -------------------------------------------------------------------------------------

# A compiler that starts by writing half a library, takes its time, and keeps a count of its runs.
PRETEND = """import os, pathlib, sys, time
scratch = pathlib.Path(sys.argv[1])
with open(scratch.parent / "runs", "a") as runs: runs.write("x")
(scratch / "fcos.so").write_text("half")
time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
if "BUILD_ERROR" in os.environ: print("nms.cu(7): error: expected a ;"); sys.exit(1)
(scratch / "fcos.so").write_text("whole")"""
BUILDER = (f"import csrc; csrc.BUILD = {PRETEND!r}; csrc.requirements = lambda: []\n"
           "print(csrc.library(), flush=True)")


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """As if there was a GPU; builds, here and by BUILDER, are pretended, in their own folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(csrc, "BUILD", PRETEND)
    monkeypatch.setattr(csrc, "requirements", lambda: [])
    csrc.available.cache_clear()
    yield csrc.build_folder()
    csrc.available.cache_clear()


def start_builder(**environment):
    return subprocess.Popen([sys.executable, "-c", BUILDER], cwd=ROOT, text=True,
                            env={**os.environ, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def begun(pretend):
    """Starts another process that builds, and returns when it is in the midst of that."""
    builders = []

    def begin(**environment):
        builders.append(start_builder(**environment))
        deadline = time.time() + 60
        while not list(pretend.glob("building-*/fcos.so")):
            assert time.time() < deadline, "the build has not begun"
            time.sleep(0.05)
        return builders[0]

    yield begin
    builders[0].kill()
    builders[0].communicate()


def test_nothing_is_built_at_import_or_without_a_gpu(tmp_path):
    code = ("import csrc; assert csrc.available.cache_info().currsize == 0\n"
            "assert csrc.available() is False")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True,
                         capture_output=True, text=True)
    assert not run.stdout + run.stderr and not list(tmp_path.iterdir())


def test_a_build_killed_half_way_does_not_hinder_the_next(pretend, begun):
    builder = begun(BUILD_SECONDS="60")
    builder.kill()  # SIGKILL: nothing is cleaned up
    builder.wait()
    assert (pretend / "lock").exists() and list(pretend.glob("building-*"))
    assert csrc.library().read_text() == "whole"
    assert not list(pretend.glob("building-*"))


def test_waiting_for_another_builder_ends_with_a_warning(begun, monkeypatch, caplog):
    begun(BUILD_SECONDS="60")
    monkeypatch.setattr(csrc, "TIMEOUT", 0.2)
    assert not csrc.available()
    assert "another process has held" in caplog.text and "lock for 0.2 s" in caplog.text


def test_a_failed_build_is_not_repeated_by_those_that_waited_for_it(pretend, begun):
    begun(BUILD_SECONDS="2", BUILD_ERROR="1")
    with pytest.raises(RuntimeError, match="has just failed in another process"):
        csrc.library()
    assert (pretend / "runs").read_text() == "x"


def test_two_processes_build_once(pretend):
    builders = [start_builder(BUILD_SECONDS="1") for _ in range(2)]
    outputs = [builder.communicate(timeout=60)[0].strip() for builder in builders]
    assert outputs == [str(pretend / "fcos.so")] * 2
    assert (pretend / "runs").read_text() == "x"


def test_a_failed_build_is_told_in_one_line_and_tried_again_later(pretend, monkeypatch, caplog):
    monkeypatch.setenv("BUILD_ERROR", "1")
    assert not csrc.available() and not csrc.available()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert "nms.cu(7): error: expected a ;" in record.getMessage()
    assert (pretend / "failed.log").exists()
    csrc.available.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not csrc.available() and len(caplog.records) == 1  # the other ranks are silent
    monkeypatch.delenv("BUILD_ERROR")
    assert csrc.library().read_text() == "whole"


def test_ninja_beside_python_is_found_though_it_is_not_on_the_path(monkeypatch, tmp_path):
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    found = {name: found for name, found, _ in csrc.requirements()}
    assert found["ninja"] == str(tmp_path / "ninja")


def toolkit(folder, libcudart=True, release="13.0"):
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "#$ TOP={folder}/bin/.." >&2\necho release {release}\n')
    nvcc.chmod(0o755)
    if libcudart:
        (folder / "lib64").mkdir()
        (folder / "lib64/libcudart.so").touch()
    return folder


@pytest.mark.parametrize("link", [True, False], ids=["a link", "a script"])
def test_cuda_is_found_behind_an_nvcc_that_is_a_link_or_a_script(monkeypatch, tmp_path, link):
    home, on_path = toolkit(tmp_path / "cuda"), tmp_path / "bin/nvcc"
    on_path.parent.mkdir()
    if link:
        on_path.symlink_to(home / "bin/nvcc")
    else:
        on_path.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        on_path.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert csrc._cuda_home() == home


def test_a_toolkit_without_libcudart_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "headless", libcudart=False)))
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "whole")))
    assert csrc._cuda_home() == tmp_path / "whole"


@pytest.mark.parametrize("release, matches", [("13.2", True), ("12.8", False), ("1.3", False)])
def test_another_cuda_major_is_not_a_match(monkeypatch, tmp_path, release, matches):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", release=release)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = {name: found for name, found, _ in csrc.requirements()}
    assert bool(found["CUDA 13, like PyTorch's"]) == matches


def test_diagnosis_names_every_requirement_and_a_failed_build_exits_with_an_error(tmp_path):
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"})
    diagnosis = run([sys.executable, "-m", "csrc"])
    assert diagnosis.returncode == 0 and "missing: install g++" in diagnosis.stdout
    assert all(name in diagnosis.stdout for name, _, _ in csrc.requirements())
    build = run([sys.executable, "-m", "csrc", "--build"])
    assert build.returncode == 1 and "no-such-compiler" in build.stderr


@needs_nvcc
def test_extension_compiles_and_registers_its_kernels_even_without_a_gpu():
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0"
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architectures}
    subprocess.run([sys.executable, "-m", "csrc", "--build"], cwd=ROOT, env=environment, check=True)
    code = ("import csrc, torch; torch.ops.load_library(csrc.library())\n"
            "for name in ('nms_mask', 'focal_loss', 'scale_'):\n"
            "    has = torch._C._dispatch_has_kernel_for_dispatch_key(f'fcos::{name}', 'CUDA')\n"
            "    assert has, name")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
