"""python -m csrc: what the CUDA extension needs, and what is built.

With --build: build it now, and show the compiler's output.
"""

import argparse
import subprocess

import csrc

parser = argparse.ArgumentParser(prog="python -m csrc", description=__doc__.splitlines()[0])
parser.add_argument("--build", action="store_true", help="build the extension now")
build = parser.parse_args().build

for name, found, remedy in csrc.requirements():
    print(f"{name:<24} {found or f'missing: {remedy}'}", flush=True)
folder = csrc.build_folder()
if build:
    try:
        print(f"built                    {csrc.library(show=True)}")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise SystemExit(f"csrc: {error}")
else:
    failed = "it failed, see failed.log" if (folder / "failed.log").exists() else "no"
    state = "yes" if (folder / "fcos.so").exists() else failed
    print(f"built                    {state}, in {folder}")
