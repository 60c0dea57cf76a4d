"""What this CPU is called and how it multiplies int8, for figures that depend on it."""

import platform
from pathlib import Path

_INT8 = ("avx2", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
"""Instruction sets that ONNX Runtime's int8 kernels use, as Linux names them."""
_EXACT = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm"}
"""Those that add products of 8 bits in 32; AVX2 and AVX-512 without VNNI add pairs in 16, which can overflow."""


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU calls itself."""
    return _values(path, "model name").strip() or platform.processor() or platform.machine()


def int8_instructions(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Instruction sets for int8 that this CPU has; none where the system does not say."""
    flags = set(f"{_values(path, 'flags')} {_values(path, 'Features')}".split())
    return [name for name in _INT8 if name in flags]


def multiplies_int8_exactly(path: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether sums of int8 products cannot overflow here; elsewhere weights have 7 bits."""
    return bool(_EXACT & set(int8_instructions(path)))


def _values(path: Path, key: str) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.partition(":")[0].strip() == key), "")
