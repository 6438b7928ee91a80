"""What GPUs can do, by their data sheets, and how much of it is assumed to be reached. Nothing here was measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from tale_ray.errors import ConfigError
from tale_ray.tasks.keys import suggestion

# Assumed, not measured: products of some thousand rows through the plain forward of transformers, without compiled
# kernels, commonly reach 35 to 50% of a data sheet's dense rate, and reading weights two thirds of its bandwidth.
FLOPS_SHARE = 0.4
BYTES_SHARE = 0.6
CALL_SECONDS = 5e-4  # assumed: Python's share of one layer's forward, which no GPU runs faster than
FREE_SHARE = 0.92  # of an empty card: error correction takes up to 6% of some, and a CUDA context half a GiB
HOST_BYTES_PER_SECOND = 20e9  # of weights that are streamed: PCIe 4.0 x16 has 32 GB/s by its specification


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card."""

    name: str
    memory_bytes: int
    flops_per_second: float  # dense, bfloat16, accumulated in float32
    bytes_per_second: float  # of its memory
    source: str

    @property
    def free_bytes(self) -> int:
        """Bytes that are assumed to be free before anything is loaded."""
        return int(FREE_SHARE * self.memory_bytes)

    def seconds(self, flops: float, read_bytes: float, layer_calls: int) -> float:
        """Return how long computing, reading or calling takes, whichever is longest, at the assumed shares."""
        return max(
            flops / (FLOPS_SHARE * self.flops_per_second),
            read_bytes / (BYTES_SHARE * self.bytes_per_second),
            layer_calls * CALL_SECONDS,
        )


def _gpu(name: str, gibibytes: int, teraflops: float, gigabytes_per_second: float, source: str) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=gibibytes * 2**30,
        flops_per_second=teraflops * 1e12,
        bytes_per_second=gigabytes_per_second * 1e9,
        source=source,
    )


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("L4", 24, 121, 300, "NVIDIA L4 data sheet, 2023 (half of the 242 TFLOPS with sparsity)"),
        _gpu("A10", 24, 125, 600, "NVIDIA A10 data sheet, 2021"),
        _gpu("RTX-4090", 24, 165.2, 1008, "NVIDIA Ada GPU architecture white paper, 2022, appendix A"),
        _gpu("A100-40GB", 40, 312, 1555, "NVIDIA A100 data sheet, 2021 (SXM4 40 GB)"),
        _gpu("L40S", 48, 362, 864, "NVIDIA L40S data sheet, 2023 (362.05 TFLOPS without sparsity)"),
        _gpu("A100-80GB", 80, 312, 2039, "NVIDIA A100 data sheet, 2021 (SXM4 80 GB)"),
        _gpu("H100-80GB", 80, 989, 3350, "NVIDIA H100 data sheet, 2023 (SXM5; half of the 1979 TFLOPS with sparsity)"),
        _gpu("H200", 141, 989, 4800, "NVIDIA H200 data sheet, 2024 (SXM; half of the 1979 TFLOPS with sparsity)"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name; capitals do not matter.

    Raises:
        ConfigError: it is not in the table.
    """
    if (found := next((gpu for known, gpu in GPUS.items() if known.lower() == name.lower()), None)) is not None:
        return found
    raise ConfigError(
        f"GPU {name!r} is not known{suggestion(name, GPUS)}: the GPUs are {', '.join(GPUS)}; of another one give "
        "the memory alone (--gpu-memory 48GiB)"
    )
