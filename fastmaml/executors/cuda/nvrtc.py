"""What makes a kernel of a Plan's own source (csrc/cuda/source.h) for the GPU at hand: NVRTC, looked for when first needed, and cubins kept on disk.

A cubin's key is all that it is made of: source, headers, architecture, options and NVRTC's version. Whatever fails raises: the cuda executor then walks the
Plan, which needs nothing of this.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch

from fastmaml.executors.cuda import cubins

OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--fmad=false")  # what is fused is written so: in every kernel the same bits
LOG = 1000  # characters of what NVRTC says: the first errors
SHIMS = {  # what the headers include of C and C++: NVRTC has the functions, but no files
    "math.h": "",
    "stdint.h": "typedef signed char int8_t;\ntypedef unsigned char uint8_t;\ntypedef int int32_t;\ntypedef unsigned uint32_t;\n"
    "typedef long int64_t;\ntypedef unsigned long uint64_t;\ntypedef unsigned long uintptr_t;\n",
    "cstdint": "#include <stdint.h>\n",
    "vector": "namespace std {\ntemplate <class T>\nclass vector {};\n}\n",
}


class Absent(RuntimeError):
    """There is no NVRTC here, or it is not wanted."""


class Nvrtc:
    """The library at ``path``; OSError or AttributeError where it is none."""

    def __init__(self, path: str) -> None:
        if os.path.isabs(path):
            for builtins in Path(path).parent.glob("libnvrtc-builtins.so*"):  # which it opens by name alone
                ctypes.CDLL(str(builtins))
        self.path, self._library = path, ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {self._library.nvrtcGetErrorString(status).decode()}")

    def compile(self, source: str, headers: Mapping[str, str], arch: str) -> bytes:
        """A cubin; RuntimeError with what NVRTC says."""
        program = ctypes.c_void_p()
        texts, names = (_strings(part) for part in (headers.values(), headers))
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"half.cu", len(headers), texts, names)
        try:
            options = _strings([f"--gpu-architecture={arch}", *OPTIONS])
            try:
                self._call("nvrtcCompileProgram", program, len(options), options)
            except RuntimeError as error:
                raise RuntimeError(f"{error}: {self._read('ProgramLog', program).decode(errors='replace').strip()[:LOG]}") from None
            return self._read("CUBIN", program)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.raw.rstrip(b"\0") if what == "ProgramLog" else text.raw


def _strings(texts) -> ctypes.Array:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def places() -> Iterator[str]:
    """Where the library may be: among Python's packages, with torch, in a toolkit, where the system looks. What fits torch's CUDA comes first, for the
    driver is known to run that."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root, at, "lib") for root in (spec.submodule_search_locations if spec else ()) for at in ("cu13", "cuda_nvrtc", "cu12")]
    folders.append(Path(torch.__file__).parent / "lib")
    folders += [Path(home, lib) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home for lib in ("lib64", "lib")]
    found = [str(path) for folder in folders if folder.is_dir() for path in sorted(folder.glob("libnvrtc[.-]*so*")) if not re.search("builtins|alt", path.name)]
    found += ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    ours = (torch.version.cuda or "").partition(".")[0]
    yield from sorted(dict.fromkeys(found), key=lambda path: not re.search(rf"\.so\.{ours}\b", path))


@functools.cache
def library() -> Nvrtc:
    """The first that can be loaded; Absent where none can."""
    for path in places():
        with contextlib.suppress(OSError, AttributeError):
            return Nvrtc(path)
    raise Absent("libnvrtc was not found among Python's packages (pip install nvidia-cuda-nvrtc), in torch, in CUDA_HOME or where the system looks for libraries")


def find() -> Nvrtc:
    """The library; Absent with the reason."""
    if os.environ.get("FASTMAML_NVRTC") == "0":
        raise Absent("FASTMAML_NVRTC=0")
    return library()


def cubin(source: str, headers: Mapping[str, str], arch: str, cache_dir: str | os.PathLike | None = None) -> bytes:
    """Of one source for one architecture, like "sm_90": from the disk, or made and then put there."""
    nvrtc, headers = find(), {**headers, **SHIMS}
    made_of = json.dumps([nvrtc.version, arch, OPTIONS, source, sorted(headers.items())])
    key = hashlib.sha256(made_of.encode()).hexdigest()
    image = cubins.load(key, cache_dir)
    if image is None:
        image = nvrtc.compile(source, headers, arch)
        cubins.keep(key, image, cache_dir)
    return image


_loaded: dict[tuple[int, str], int] = {}  # for as long as the process lives: a captured graph may hold any of them


def kernel(source: str, module: ModuleType, device: torch.device) -> int:
    """The source as a kernel on a device, for ``module.execute``."""
    if not module.can_load:
        raise Absent("fastmaml._cuda was built by an nvcc before 12.8, and cannot load what NVRTC makes")
    key = (device.index or 0, source)
    if key not in _loaded:
        major, minor = module.device(key[0])["capability"]
        _loaded[key] = module.load(cubin(source, module.headers(), f"sm_{major}{minor}"), key[0])
    return _loaded[key]
