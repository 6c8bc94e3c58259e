"""The parts of the acceptance run, most valuable first, with their time limits. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

BROKEN_GPU = 3  # exit code of a part whose GPU is unusable after an error; the rest of its cases need a new process


@dataclass(frozen=True)
class Part:
    """One process. function: module:name; needs: of "gpu" and "dali"; about: what it finds out."""

    name: str
    function: str
    needs: tuple[str, ...]
    limit_s: float
    about: str


GPU, BOTH = ("gpu",), ("gpu", "dali")
PARTS = (
    Part("environment", "infra.gpu.environment:environment", (), 60, "versions, matrix and copy rates"),
    Part("roi", "infra.gpu.decoding:roi", BOTH, 60, "our loader decodes windows on the GPU"),
    Part("nets", "infra.gpu.nets:nets", GPU, 90, "each family's net against the CPU"),
    Part("speed", "infra.gpu.speed:speed", GPU, 75, "images/s of our loop and of a bare loop"),
    Part("whole", "infra.gpu.decoding:whole", BOTH, 60, "ways to decode that do not crash"),
    Part("waits", "infra.gpu.nets:waits", GPU, 60, "where the host waits for the GPU"),
    Part("profile", "infra.gpu.speed:profiles", GPU, 75, "launches, idle share and memory of a step"),
    Part("feed", "infra.gpu.decoding:feed", BOTH, 60, "from JPEG to trained step"),
    Part("resume", "infra.gpu.resume:resume", GPU, 75, "killed, resumed, equal"),
    Part("rates", "infra.gpu.decoding:rates", BOTH, 60, "decoded images/s"),
    Part("broken", "infra.gpu.decoding:broken", BOTH, 40, "broken JPEGs are named and replaced"),
    Part("pixels", "infra.gpu.decoding:pixels", BOTH, 40, "pixels of the CPU's and the GPU's decoder"),
    Part("nccl", "infra.gpu.resume:nccl", GPU, 40, "DDP of one rank"),
    Part("contexts", "infra.gpu.environment:contexts", GPU, 30, "GPUs that a worker opens"),
    Part("compiled", "infra.gpu.speed:compiled", GPU, 62, "torch.compile and CUDA graphs"),
)
