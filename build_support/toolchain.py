"""Finds the CUDA compiler and libraries that match the installed torch. Used by setup.py and its tests only."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

# 9.0a: Hopper's own instructions. 9.0+PTX: what later GPUs compile at load.
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;9.0+PTX"


class ToolchainError(SystemExit):
    """Ends the build with one readable message instead of a traceback."""


@dataclass(frozen=True)
class CudaToolchain:
    home: Path
    version: str  # of nvcc, "13.0"
    include_dirs: list[str] = field(default_factory=list)
    library_dirs: list[Path] = field(default_factory=list)

    def link_args(self, scratch: Path) -> list[str]:
        """-L and -l flags for cudart and cuBLAS.

        pip's CUDA wheels carry `libcublas.so.13` but no unversioned name for `-lcublas`: `scratch` gets one.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        for name in ("cudart", "cublas"):
            library = self._find_library(name)
            link = scratch / f"lib{name}.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
        return [f"-L{scratch}", "-lcudart", "-lcublas"]

    def _find_library(self, name: str) -> Path:
        major = self.version.split(".")[0]
        for directory in self.library_dirs:
            for candidate in (f"lib{name}.so", f"lib{name}.so.{major}"):
                if (directory / candidate).exists():
                    return (directory / candidate).resolve()
        searched = ", ".join(str(d) for d in self.library_dirs)
        raise ToolchainError(
            f"alore_ext: lib{name}.so.{major} was not found in {searched}. Install the CUDA build of torch from PyPI "
            f"(it brings nvidia-{name}) or a full CUDA {major} toolkit, or build the CPU ops alone with ALORE_CUDA=0."
        )


def find_cuda(torch_cuda: str | None, site_packages: Path, env) -> CudaToolchain | None:
    """The toolchain to build CUDA ops with, or None for a CPU-only build. Raises ToolchainError with what to do."""
    wanted = env.get("ALORE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ToolchainError(f"alore_ext: ALORE_CUDA must be 0 or 1, got {wanted!r}.")
    if wanted == "0":
        return None
    if torch_cuda is None:
        if wanted == "1":
            raise ToolchainError(
                "alore_ext: ALORE_CUDA=1, but the installed torch is a CPU-only build. Install a CUDA build of torch."
            )
        return None
    nvcc = find_nvcc(env)
    if nvcc is None:
        if wanted == "1":
            raise ToolchainError("alore_ext: ALORE_CUDA=1, but no nvcc was found: set CUDA_HOME or put nvcc on PATH.")
        return None

    home = toolkit_home(nvcc)
    version = nvcc_version(nvcc)
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise ToolchainError(
            f"alore_ext: nvcc is CUDA {version} ({nvcc}), but torch was built for CUDA {torch_cuda}; their major "
            f"versions must agree. Point CUDA_HOME at a CUDA {torch_cuda.split('.')[0]} toolkit, or install a torch "
            f"built for CUDA {version.split('.')[0]}, or build the CPU ops alone with ALORE_CUDA=0."
        )
    wheel = pip_cuda_folder(site_packages, torch_cuda.split(".")[0])
    include = [d for d in (home / "include", wheel and wheel / "include") if d and d.is_dir()]
    libraries = [d for d in (home / "lib64", home / "lib", wheel and wheel / "lib") if d and d.is_dir()]
    if not any((d / "cublas_v2.h").exists() for d in include):
        raise ToolchainError(
            f"alore_ext: cublas_v2.h was found neither in {home}/include nor in site-packages/nvidia. Install the CUDA "
            "build of torch from PyPI (it carries the headers) or a full CUDA toolkit, or set ALORE_CUDA=0."
        )
    return CudaToolchain(home, version, [str(d) for d in include], libraries)


def find_nvcc(env) -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(variable):
            candidate = Path(env[variable]) / "bin" / "nvcc"
            if candidate.exists():
                return str(candidate)
            raise ToolchainError(
                f"alore_ext: {variable}={env[variable]} has no bin/nvcc. Correct it, unset it, or set ALORE_CUDA=0."
            )
    found = shutil.which("nvcc", path=env.get("PATH"))
    if found is None and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    return found


def toolkit_home(nvcc: str) -> Path:
    """The folder of the real toolkit. nvcc tells it itself, so wrapper scripts, ccache and symlinks do not matter."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    match = re.search(r"^#\$ _HERE_=(.+)$", dryrun.stderr + dryrun.stdout, re.M)
    if match is None:
        raise ToolchainError(f"alore_ext: `{nvcc} --dryrun` did not say where its toolkit is. Set CUDA_HOME.")
    return Path(match.group(1).strip()).resolve().parent


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise ToolchainError(f"alore_ext: `{nvcc} --version` printed no release number.")
    return match.group(1)


def pip_cuda_folder(site_packages: Path, major: str) -> Path | None:
    """site-packages/nvidia/cu13, the headers and libraries that come with pip's torch, if it is there."""
    folder = site_packages / "nvidia" / f"cu{major}"
    return folder if folder.is_dir() else None


def cxx_compiler(env) -> str:
    return (env.get("CXX") or shutil.which("c++") or "g++").split()[0]


def openmp_flags(env) -> list[str]:
    """-fopenmp, without which at::parallel_for compiles to a plain loop; its vector part where there is no libgomp."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [cxx_compiler(env), "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        try:
            probe = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ToolchainError(f"alore_ext: no C++ compiler ({error}): install g++ or set CXX.") from None
    if probe.returncode == 0:
        return ["-fopenmp"]
    print("alore_ext: this compiler has no OpenMP library, so the CPU kernels will run on one thread")
    return ["-fopenmp-simd"]


def shared_libstdcxx() -> list[str]:
    """Names the C++ runtime that torch itself uses, ahead of the compiler's own choice.

    Some compiler installations link libstdc++ statically. A library with a private copy of it crashes in the first
    stream that it formats (each error message, that is): the copies number their locale facets differently.
    """
    try:
        loaded = Path("/proc/self/maps").read_text()  # torch is imported, so its runtime is mapped
    except OSError:
        return []
    match = re.search(r"(/\S*/libstdc\+\+\.so\.6\S*)$", loaded, re.M)
    return [match.group(1)] if match else []


def arch_list(env) -> str:
    return env.get("TORCH_CUDA_ARCH_LIST") or env.get("ALORE_ARCHS") or DEFAULT_ARCHS


def announce(cuda: CudaToolchain | None, torch, env) -> None:
    if cuda is not None:
        print(f"alore_ext: CUDA {cuda.version} from {cuda.home}, archs {arch_list(env)}, torch {torch.__version__}")
        return
    if env.get("ALORE_CUDA") == "0":
        reason = "ALORE_CUDA=0"
    elif torch.version.cuda is None:
        reason = "this torch is a CPU-only build"
    else:
        reason = "no nvcc was found; set CUDA_HOME to build the CUDA kernels"
    print(f"alore_ext: CPU ops only ({reason}), torch {torch.__version__}")
