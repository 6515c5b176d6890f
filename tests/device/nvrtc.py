"""NVRTC, CUDA's compiler in a library, through ctypes: the one that still compiles for sm_70."""

import ctypes
from pathlib import Path


def compile_cubin(library: Path, source: str, options: list[str]) -> tuple[bytes, str, str]:
    """Compile device code to a cubin.

    Args:
        library: ``libnvrtc.so``.
        source: CUDA C++.
        options: Of the compiler.

    Returns:
        The cubin, its PTX, and what the compiler said.

    Raises:
        RuntimeError: If the code does not compile; with what the compiler said.
    """
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()

    def call(name: str, *arguments: object) -> int:
        return getattr(nvrtc, name)(*arguments)

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{kind}", program, buffer)
        return buffer.raw

    created = call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    if created != 0:
        raise RuntimeError(f"nvrtcCreateProgram: error {created}")
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = call("nvrtcCompileProgram", program, len(options), array)
        log = text("ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise RuntimeError(f"nvrtcCompileProgram: error {failed}\n{log}")
        return text("CUBIN"), text("PTX").rstrip(b"\0").decode(), log
    finally:
        call("nvrtcDestroyProgram", ctypes.byref(program))
