"""The GPUs for planning and measuring: memory, bf16 FLOP/s and links from NVIDIA's data sheets.

A machine is one of eight GPUs with NVLink, as DGX and HGX have it. H100, H200 and H800 come with an
InfiniBand port of 400 Gbit/s for each GPU (DGX H100 data sheet), A100 and A800 with one of 200 Gbit/s (DGX
A100 data sheet).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from upcycle.errors import UpcycleError, shown


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    peak_flops: float  # FLOP/s of dense matrix products in bf16
    memory: float  # bytes
    nvlink: float  # bytes/s from one GPU to the others of its machine, in one direction
    network: float  # bytes/s from one GPU to other machines, in one direction


MACHINE = 8  # GPUs of a machine

KNOWN = (
    Gpu(name="H100", peak_flops=989.4e12, memory=80e9, nvlink=450e9, network=50e9),
    Gpu(name="H200", peak_flops=989.4e12, memory=141e9, nvlink=450e9, network=50e9),
    Gpu(name="H800", peak_flops=989.4e12, memory=80e9, nvlink=200e9, network=50e9),
    Gpu(name="A100", peak_flops=312e12, memory=80e9, nvlink=300e9, network=25e9),
    Gpu(name="A800", peak_flops=312e12, memory=80e9, nvlink=200e9, network=25e9),
)


def find(name: str) -> Gpu:
    """Return the GPU called `name`, in upper or lower case."""
    for gpu in KNOWN:
        if gpu.name == str(name).upper():
            return gpu
    raise UpcycleError(f"unknown GPU {shown(name)}; known: {', '.join(gpu.name for gpu in KNOWN)}")


# Words in a device name that mean another peak in spite of the same letters: cards of less power (H100 PCIe
# and NVL, H200 NVL), GH200, which is not an H200, and a slice of a card (MIG).
_OTHER_PEAK = {"NVL", "MIG"}
_SLOWER_ON_PCIE = {"H100", "H800"}  # A100 and A800 have the same peak with PCIe


def of_device(name: str) -> Gpu | None:
    """Return the GPU for a device name such as "NVIDIA H100 80GB HBM3".

    Returns None for other devices, and for variants whose peak differs from that of the GPU of the same name.
    """
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    found = next((gpu for gpu in KNOWN if gpu.name in words), None)
    if found is None or words & _OTHER_PEAK or ("PCIE" in words and found.name in _SLOWER_ON_PCIE):
        return None
    return found
