"""Builds `alore_ext._C`: CPU ops always, CUDA ops when torch is a CUDA build and an nvcc is found.

Environment:
  ALORE_CUDA=0|1        0: CPU ops only. 1: fail instead of falling back when CUDA cannot be built.
  ALORE_ARCHS, TORCH_CUDA_ARCH_LIST
                        compute capabilities, e.g. "9.0a" or "8.0;8.6" (default: 8.0 8.6 8.9 9.0a 9.0+PTX).
  CUDA_HOME             toolkit folder; without it the nvcc on PATH is asked where it lives.
  MAX_JOBS              parallel compiler jobs.

Whether a GPU is visible is never asked: machines that build often have none.
"""

import json
import os
import platform
import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))

import toolchain  # noqa: E402

try:
    import torch
except ImportError:
    sys.exit(
        "alore_ext builds against torch, which this environment lacks. Run `pip install torch` first, then "
        "`pip install --no-build-isolation .` (or plain `pip install .`, which fetches its own torch to build with)."
    )

cuda = toolchain.find_cuda(torch.version.cuda, Path(torch.__file__).parent.parent, os.environ)
if cuda is not None:
    # torch.utils.cpp_extension reads these when it is imported.
    os.environ["CUDA_HOME"] = str(cuda.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = toolchain.arch_list(os.environ)

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402

VERSION = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)


def kernel_sources(suffixes: tuple[str, ...]) -> list[str]:
    names = (ROOT / "csrc" / "kernels" / "SOURCES").read_text().split()
    return [f"csrc/kernels/{name}" for name in names if name.endswith(suffixes)]


def extension():
    sources = sorted(str(p.relative_to(ROOT)) for d in ("ops", "bindings") for p in (ROOT / "csrc" / d).glob("*.cpp"))
    sources += kernel_sources((".cpp",) if cuda is None else (".cpp", ".cu"))
    if cuda is None:
        sources = [s for s in sources if not s.endswith("_cuda.cpp")]

    macros = [("ALORE_VERSION", f'"{VERSION}"'), ("ALORE_TORCH_VERSION", f'"{torch.__version__}"')]
    openmp = toolchain.openmp_flags(os.environ)
    cxx = ["-O3", "-std=c++20", "-Wall", "-fvisibility=hidden", *openmp]
    if platform.machine() in ("x86_64", "AMD64"):
        # The token-mixing loops are 8 to 64 floats wide, made for vectors.
        cxx += ["-mavx2", "-mfma"]
    flags = {"cxx": cxx}
    link, include = [*openmp, *toolchain.shared_libstdcxx()], [str(ROOT / "csrc")]
    if cuda is not None:
        macros += [
            ("ALORE_WITH_CUDA", None),
            ("ALORE_CUDA_VERSION", f'"{cuda.version}"'),
            ("ALORE_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
        ]
        flags["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-diag-suppress=20012"]
        include += cuda.include_dirs
        link += cuda.link_args(ROOT / "build" / "cuda-link")
    return CppExtension(
        "alore_ext._C",
        sources,
        include_dirs=include,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link,
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()),
        libraries=["c10_cuda", "torch_cuda"] if cuda is not None else [],
    )


class BuildWithRecord(BuildExtension):
    """Leaves beside the library a note of what it was built for, which `import alore_ext` checks before loading."""

    def run(self):
        super().run()
        record = {"version": VERSION, "torch": torch.__version__, "cuda": cuda.version if cuda else None}
        record["python"] = platform.python_version()
        target = Path(self.get_ext_fullpath("alore_ext._C")).parent / "_build_record.json"
        target.write_text(json.dumps(record) + "\n")


toolchain.announce(cuda, torch, os.environ)
setup(ext_modules=[extension()], cmdclass={"build_ext": BuildWithRecord})
