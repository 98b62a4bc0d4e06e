"""Builds the compiled extension, fastdiff/_C; everything else about the package is in pyproject.toml.

The extension is a shared object with C functions, called through ctypes, and a few of Python's stable interface; it has
nothing of torch's C++ interface.
It is optional: with no compiler, or FASTDIFF_NO_EXTENSION=1, the package installs without it and says so when asked;
FASTDIFF_REQUIRE_EXTENSION=1 makes a failed build an error.
CUDA code is built when torch is a CUDA build and a toolkit is found, whether or not this machine has a GPU.
"""

import os
import platform
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

PORTABLE = (
    "affine", "attention", "guide", "isa", "measure", "norm", "norm_backward", "python", "python_train",
    "scalar", "torch_normal", "train", "winograd", "winograd_train",
)  # fmt: skip
SOURCES = [f"csrc/cpu/{name}.cpp" for name in PORTABLE]
CUDA_SOURCES = ["csrc/cuda/affine.cu", "csrc/cuda/guide.cu", "csrc/cuda/measure.cu", "csrc/cuda/train.cu"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
# Each instruction set is a translation unit of its own, so that nothing else is compiled for the newer CPU.
ISA_FLAGS = {
    "csrc/cpu/avx2.cpp": AVX2,
    "csrc/cpu/avx512.cpp": [*AVX512, "-Wno-maybe-uninitialized"],  # gcc 12 warns of its own header
}
# The order of roundings is part of the result: no contraction, no reordering.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-g0"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr"]
# Real code for the machines in use, and PTX so that later ones can still load it.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def unwanted() -> bool:
    return os.environ.get("FASTDIFF_NO_EXTENSION", "0") not in ("", "0") or sys.platform == "win32"


def build_command():
    """torch's build_ext (ninja, nvcc), taught flags per file and to carry on without what does not compile."""
    import torch
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # any failure of the tool chain leaves a package that works without it
                if os.environ.get("FASTDIFF_REQUIRE_EXTENSION", "0") not in ("", "0"):
                    raise
                self.extensions = []  # else setuptools looks for the file
                warnings.warn(f"fastdiff: installed without its extension, it did not build: {error}", stacklevel=1)

        def build_extension(self, ext):
            plain = ext.extra_objects = self._isa_objects(ext)
            try:
                ext.extra_objects = plain + self._cuda_objects()
                super().build_extension(ext)
            except Exception as error:
                if ext.extra_objects == plain:
                    raise
                warnings.warn(f"fastdiff: built without CUDA, it did not link: {error}", stacklevel=1)
                ext.extra_objects = plain
                super().build_extension(ext)

        def _isa_objects(self, ext):
            if platform.machine() not in ("x86_64", "AMD64"):
                return []
            with ThreadPoolExecutor(len(ISA_FLAGS)) as pool:
                built = pool.map(lambda item: self._objects(ext, item[0], CXX_FLAGS + item[1]), ISA_FLAGS.items())
                return [name for objects in built for name in objects]

        def _objects(self, ext, source, cxx_flags):
            folder = os.path.join(self.build_temp, Path(source).stem)
            os.makedirs(folder, exist_ok=True)
            return self.compiler.compile(
                [source],
                output_dir=folder,
                include_dirs=ext.include_dirs,
                extra_postargs={"cxx": cxx_flags, "nvcc": NVCC_FLAGS},
                depends=ext.depends,
            )

        def _cuda_objects(self):
            if torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
                return []
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
            try:
                objects = [o for source in CUDA_SOURCES for o in self._objects(self.extensions[0], source, CXX_FLAGS)]
            except Exception as error:
                warnings.warn(f"fastdiff: built without CUDA, its kernels did not compile: {error}", stacklevel=1)
                return []
            # The static runtime, its symbols kept inside: any torch's own runtime may be loaded beside it.
            folders = [f"-L{folder}" for folder in cpp_extension.library_paths("cuda")]
            return [*objects, *folders, "-lcudart_static", "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL"]

    return Build


def extension() -> Extension:
    from torch.utils import cpp_extension

    return Extension(
        "fastdiff._C",
        sources=SOURCES,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        # what is listed here also goes into the sdist
        depends=[*map(str, sorted(Path("csrc").rglob("*.h"))), *ISA_FLAGS, *CUDA_SOURCES],
        language="c++",
        py_limited_api=True,
    )


if unwanted():
    setup()
else:
    setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
