"""What to change in a recipe so that many workers are used well: the batch, its learning rate, the decoding.

Everything follows from a `ResourcePlan`; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import ceil

from pipeline.bench.plan import ResourcePlan
from pipeline.run_config import RunConfig
from pipeline.training.config import LR_SCALES, ScaleLr

FEW, ENOUGH = 32, 64  # images of a GPU in a step: below the first its kernels are too short to fill it
LARGEST_LINEAR = 8192  # batch up to which a linear scale was shown to work (Goyal et al., 2017)
WARMUP_EPOCHS = 5  # with a scaled rate, in the same paper
NOTABLE = 0.05  # share of a step from which the communication is worth a line


def advise(config: RunConfig, plan: ResourcePlan, *, gpus_per_node: int) -> list[str]:
    """Sentences for people, the most important first; empty if there is nothing to say.

    gpus_per_node: 0 if the workers compute on CPUs.
    """
    on_gpu = gpus_per_node > 0
    found = (_batch(config, plan, on_gpu=on_gpu), _workers(config, plan, on_gpu=on_gpu), _network(plan))
    return [*chain(*found), *_decoding(config, plan, gpus_per_node)]


def better_batch(plan: ResourcePlan) -> int:
    """The smallest power of two that gives each worker ENOUGH images."""
    return 1 << (ENOUGH * plan.workers - 1).bit_length()


def scale_of(config: RunConfig) -> ScaleLr:
    """The recipe's rule for its learning rates; without one the usual rule for its optimizer."""
    if config.training.scale_lr != "none":
        return config.training.scale_lr
    return "linear" if config.training.optimizer.kind == "sgd" else "sqrt"


def _batch(config: RunConfig, plan: ResourcePlan, *, on_gpu: bool) -> Iterator[str]:
    training, rule, batch = config.training, scale_of(config), better_batch(plan)
    if not on_gpu or plan.rows >= FEW:
        return
    yield (
        f"{plan.rows} images a GPU: batch {training.batch_size} over {plan.workers} GPUs is too small to keep them "
        f"busy; with batch {batch} each has {ceil(batch / plan.workers)}"
    )
    reference = training.reference_batch or training.batch_size
    rate = training.optimizer.lr * LR_SCALES[rule](batch / reference)
    yield (
        f"--batch-size {batch} training.scale_lr={rule}: the learning rate of {training.optimizer.lr:g} for batch "
        f"{reference} becomes {rate:.4g}"
    )
    if rule == "linear" and batch > LARGEST_LINEAR:
        gpus = max(1, LARGEST_LINEAR // ENOUGH)
        yield (
            f"batches above {LARGEST_LINEAR} lose accuracy with SGD (Goyal et al., 2017): use {gpus} GPUs or fewer, "
            "or training.optimizer.kind=lamb"
        )
    warmup = training.schedule.warmup_epochs
    if warmup < WARMUP_EPOCHS:
        yield f"a larger batch needs a warm-up: training.schedule.warmup_epochs={WARMUP_EPOCHS}, now {warmup:g}"


def _workers(config: RunConfig, plan: ResourcePlan, *, on_gpu: bool) -> Iterator[str]:
    given = config.compute.workers
    if given not in (plan.workers, 0) or (given == 0 and plan.workers > 1):
        yield f"compute.workers={plan.workers}: one for each {'GPU' if on_gpu else 'node'}; the recipe has {given}"


def _network(plan: ResourcePlan) -> Iterator[str]:
    if plan.communication_s is None or plan.step_s is None or plan.step_s == 0:
        return
    share = plan.communication_s / plan.step_s
    if share >= 1:
        rows = ceil(plan.rows * share)
        yield (
            f"the network is the limit: sending gradients takes {share:.1f} times as long as computing; from {rows} "
            f"images a worker (batch {rows * plan.workers}) computing takes longer"
        )
    elif share >= NOTABLE:
        yield f"sending gradients takes {share:.0%} of a step's time and overlaps with the backward pass"


def _decoding(config: RunConfig, plan: ResourcePlan, gpus_per_node: int) -> Iterator[str]:
    if plan.decode_cores is None:
        return
    threads, cpus = ceil(plan.decode_cores), config.compute.cpus
    node = threads * max(1, gpus_per_node)
    if cpus is None and config.data.decode_threads is None:
        yield f"decoding keeps {threads} cores of each worker busy, so {node} cores on each node"
        return
    has = config.data.decode_threads or max(1, int(cpus or 1))
    if threads > has:
        yield (
            f"decoding keeps {threads} cores of each worker busy, the recipe gives {has}: compute.cpus_per_worker="
            f"{threads}, so {node} cores on each node; or smaller images by `adaptnet data pack`, or a GPU's decoder"
        )
