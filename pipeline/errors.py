"""The few kinds of error. Each message says what was found, where, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class AdaptNetError(Exception):
    """Something that a person must act on; the command prints it without a traceback and exits 2."""


class ConfigError(AdaptNetError):
    """The user must change the recipe, an override or a command-line argument."""


class DataError(AdaptNetError):
    """The user must mend the images, shards or labels, or point to others."""


class UndecodableError(DataError):
    """Some of the images given cannot be decoded; `reasons` says which, by position, and why."""

    def __init__(self, num_images: int, reasons: Mapping[int, str]) -> None:
        listed = "; ".join(f"image {position}: {reasons[position]}" for position in sorted(reasons))
        super().__init__(f"{len(reasons)} of {num_images} images, counted from 0, cannot be decoded: {listed}")
        self.num_images, self.reasons = num_images, dict(reasons)

    def __reduce__(self) -> tuple[object, ...]:
        return (UndecodableError, (self.num_images, self.reasons))


class ResourceError(AdaptNetError):
    """The user must free or add what the run needs: workers, GPUs, disk, a reachable server, a free run folder."""


class CheckpointError(AdaptNetError):
    """A checkpoint is missing, damaged or of another recipe; an older one or a fresh run folder is the way out."""


class DivergedError(AdaptNetError):
    """The loss or a gradient is not finite; carries the step and the last good checkpoint.

    Lower the learning rate or clip, and continue from `checkpoint`.
    """

    def __init__(self, message: str, *, step: int, checkpoint: str | None) -> None:
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_diverged, (str(self), self.step, self.checkpoint))


def _rebuild_diverged(message: str, step: int, checkpoint: str | None) -> DivergedError:
    return DivergedError(message, step=step, checkpoint=checkpoint)


class ContractError(AdaptNetError):
    """The author of a family must mend it: it does not keep what `pipeline.family` promises."""
