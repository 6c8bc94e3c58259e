"""What the augmentations do to uint8 images: torchvision's operations, on batches of which each image has its own.

An operation's argument is that of torchvision.transforms.v2.functional. Where an operation has one number for each of
the 256 levels, it is a table. Everything is integer arithmetic, or float32 in torchvision's order, so that an image's
pixels depend neither on the other images nor on the device. n images of one operation, S their side.

Differences from torchvision: shears and rotations find the nearest pixel in fixed-point numbers of 1/65536 pixel, so
where two pixels are equally near, either may be taken. A blur works by rows and columns, and its last bit may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augment.chain import Floats, PixelOp

ONE_PX = 1 << 16  # fixed-point coordinates
BLUR_RADIUS_PX = 8  # four of the largest standard deviations
CPU_BYTES = 1 << 17  # of images that a CPU handles at a time, so that they stay in its cache


def apply_chain(images: Tensor, chain: Tensor, fill: Sequence[int] = (0, 0, 0)) -> Tensor:
    """Images uint8 [B, S, S, 3] after the operations of each one's chain.

    chain [B, n, 2] f64 on the host: PixelOp and argument; the host groups the images without waiting for the device.
    fill: colour of what shears, translations and rotations uncover.
    """
    for link in chain.unbind(1):
        images = _applied(images, link, fill)
    return images


def _applied(images: Tensor, link: Tensor, fill: Sequence[int]) -> Tensor:
    ops, order = link[:, 0].long().sort(stable=True)
    counts = torch.bincount(ops, minlength=len(PixelOp)).tolist()
    rows, back = torch.stack([order, order.argsort()]).to(images.device, non_blocking=True)
    parts = [
        changed_by(op, images.index_select(0, some), values, fill)
        for op, mine, theirs in zip(
            PixelOp, torch.split(rows, counts), torch.split(link[order, 1], counts), strict=True
        )
        for some, values in _parts(images, mine, theirs)
    ]
    return torch.cat(parts).index_select(0, back) if parts else images


def _parts(images: Tensor, rows: Tensor, arguments: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if len(rows):
        most = len(rows) if images.is_cuda else max(1, CPU_BYTES // images[0].numel())
        yield from zip(torch.split(rows, most), torch.split(arguments, most), strict=True)


def changed_by(op: PixelOp, images: Tensor, arguments: Tensor, fill: Sequence[int] = (0, 0, 0)) -> Tensor:
    """Images uint8 [n, S, S, 3] after one operation; arguments [n] f64 on the host."""
    if op == PixelOp.IDENTITY:
        return images
    if op in MATRICES:
        return _resampled(images, MATRICES[op](arguments.numpy(), images.shape[1]), fill)
    values = arguments.to(images.device, non_blocking=True)
    if op in TABLES:
        return _looked_up(images, TABLES[op](images, values[:, None]))
    return OTHERS[op](images, values[:, None, None, None])


# --- where pixels come from


def _matrix(*numbers: Floats | float) -> Floats:
    """[n, 6]: the source of a pixel at (x, y) is (a x + b y + c, d x + e y + f), seen from the middle of the image."""
    return np.stack(np.broadcast_arrays(*map(np.asarray, numbers)), axis=-1).astype(np.float64)


def _rotation(degrees: Floats, side: int) -> Floats:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return _matrix(cos, -sin, 0, sin, cos, 0)


MATRICES: Mapping[PixelOp, Callable[[Floats, int], Floats]] = {
    PixelOp.SHEAR_X: lambda tangent, side: _matrix(1, tangent, tangent * side / 2, 0, 1, 0),  # of the upper left corner
    PixelOp.SHEAR_Y: lambda tangent, side: _matrix(1, 0, 0, tangent, 1, tangent * side / 2),
    PixelOp.TRANSLATE_X: lambda px, side: _matrix(1, 0, -px, 0, 1, 0),
    PixelOp.TRANSLATE_Y: lambda px, side: _matrix(1, 0, 0, 0, 1, -px),
    PixelOp.ROTATE: _rotation,
}


def _resampled(images: Tensor, matrices: Floats, fill: Sequence[int]) -> Tensor:
    """The nearest pixel of the source of each; `fill` where that is outside."""
    count, side = images.shape[:2]
    terms = torch.from_numpy(_fixed_point(matrices, side)).to(images.device, non_blocking=True)
    across, down = terms[:, :, 0, None, :], terms[:, :, 1, :, None]  # [2, n, 1, S], [2, n, S, 1]
    x, y = ((across + down) >> 16).unbind(0)
    inside = ((x | y) >= 0) & (torch.maximum(x, y) < side)
    first = torch.arange(0, count * side * side, side * side, device=images.device, dtype=torch.int32)
    place = torch.where(inside, y * side + x + first[:, None, None], count * side * side)
    pixels = torch.cat([images.reshape(-1, 3), _constant(tuple(fill), images.device)[None]])
    return pixels.index_select(0, place.flatten()).view(images.shape)


def _fixed_point(matrices: Floats, side: int) -> NDArray[np.int32]:
    """The parts of source x and y that come from the column and from the row of a pixel, [2, n, 2, S]."""
    middle = np.arange(side) + 0.5 - side / 2
    a, b, c, d, e, f = (matrices[:, at, None] for at in range(6))
    parts = [[a * middle + c + side / 2, b * middle], [d * middle + f + side / 2, e * middle]]
    fixed: NDArray[np.int32] = np.rint(np.stack([np.stack(part, 1) for part in parts]) * ONE_PX).astype(np.int32)
    return fixed


@lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Levels on the device, where they stay: a copy may make the host wait."""
    return torch.tensor(values, dtype=torch.uint8).to(device)


# --- tables: a new level for each of the 256


def _looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """Images with the levels of their tables [n, 256], or [n, 3 * 256] of each channel."""
    levels = images.flatten(2).long()  # long rows: a CPU is slow at steps of 3
    if tables.shape[1] != 256:
        levels += _of_channel(images)
    return tables.gather(1, levels.flatten(1)).view(images.shape)


def _of_channel(images: Tensor) -> Tensor:
    """Where the 256 levels of each number's channel begin, [3 S]."""
    return torch.arange(0, 768, 256, device=images.device, dtype=torch.int32).repeat(images.shape[2])


def _levels(device: torch.device) -> Tensor:
    return torch.arange(256, device=device)


def _as_levels(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def _contrast(images: Tensor, factors: Tensor) -> Tensor:
    side, factor = images.shape[1], factors.float()
    mean = _grey(_planes(images)).flatten(1).sum(1, keepdim=True, dtype=torch.float64).float() / (side * side)
    scaled = (_levels(images.device).float() * factor).double()
    return _as_levels((scaled + mean.double() * (1 - factors).float().double()).float())  # rounded once, as torch does


def _posterized(images: Tensor, bits: Tensor) -> Tensor:
    dropped = (1 << (8 - bits.long())) - 1
    return (_levels(images.device) & ~dropped).to(torch.uint8)


def _solarized(images: Tensor, thresholds: Tensor) -> Tensor:
    levels = _levels(images.device)
    return torch.where(levels.float() >= thresholds.float(), 255 - levels, levels).to(torch.uint8)


def _with_added(images: Tensor, added: Tensor) -> Tensor:
    levels = _levels(images.device)
    return torch.where(levels < 128, levels + added.long(), levels).clamp_(max=255).to(torch.uint8)


def _full_range(images: Tensor, _: Tensor) -> Tensor:
    """Autocontrast: each channel's levels stretched to 0..255."""
    lowest, highest = (each.float()[..., None] for each in _planes(images).flatten(2).aminmax(dim=2))
    flat = lowest == highest
    scale = torch.where(flat, 1.0, (highest - lowest) * (1 / 255))
    stretched = (_levels(images.device).float() - torch.where(flat, 0.0, lowest)) / scale
    return _as_levels(stretched).flatten(1)


def _equalized(images: Tensor, _: Tensor) -> Tensor:
    """Equalize: Pillow's table, in integers."""
    histogram = _histogram(images)
    cumulated = histogram.cumsum(2)
    highest = cumulated.argmax(2, keepdim=True)
    step = (images.shape[1] ** 2 - histogram.gather(2, highest)) // 255
    rising = (cumulated[..., :-1] + step // 2) // step.clamp(min=1)
    table = F.pad(rising.clamp_(0, 255), (1, 0))
    return torch.where(step == 0, _levels(images.device), table).to(torch.uint8).flatten(1)


def _histogram(images: Tensor) -> Tensor:
    """How often each level occurs, [n, 3, 256]."""
    count = len(images)
    first = torch.arange(0, count * 768, 768, device=images.device, dtype=torch.int32)[:, None, None]
    places = (images.flatten(2) + (first + _of_channel(images))).flatten()
    if images.is_cuda:  # where bincount makes the host wait
        counts = torch.zeros(count * 768, dtype=torch.int64, device=images.device)
        return counts.scatter_add_(0, places.long(), counts.new_ones(1).expand(len(places))).view(count, 3, 256)
    return torch.bincount(places, minlength=count * 768).view(count, 3, 256)


TABLES: Mapping[PixelOp, Callable[[Tensor, Tensor], Tensor]] = {
    PixelOp.BRIGHTNESS: lambda images, factors: _as_levels(_levels(images.device).float() * factors.float()),
    PixelOp.CONTRAST: _contrast,
    PixelOp.POSTERIZE: _posterized,
    PixelOp.SOLARIZE: _solarized,
    PixelOp.SOLARIZE_ADD: _with_added,
    PixelOp.AUTO_CONTRAST: _full_range,
    PixelOp.EQUALIZE: _equalized,
    PixelOp.INVERT: lambda images, _: (255 - _levels(images.device)).to(torch.uint8).expand(len(images), 256),
}


# --- the others, by planes [n, 3, S, S]


def _planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).contiguous()


def _grey(planes: Tensor) -> Tensor:
    """Luma [n, S, S] f32, rounded down."""
    red, green, blue = planes.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _saturated(images: Tensor, factors: Tensor) -> Tensor:
    planes = _planes(images)
    grey = _grey(planes)[:, None]
    blended = torch.addcmul(planes * factors.float(), grey, (1 - factors).float())
    return _as_levels(blended).permute(0, 2, 3, 1)


def _sharpened(images: Tensor, factors: Tensor) -> Tensor:
    """Blends with the mean of 3 x 3 pixels, of which the middle one counts 5 times; the border stays."""
    if images.shape[1] <= 2:
        return images
    planes = _planes(images).float()
    rows = planes[:, :, :-2] + planes[:, :, 1:-1] + planes[:, :, 2:]
    middle = planes[..., 1:-1, 1:-1]
    smooth = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(middle, alpha=4).mul_(1 / 13).round_()
    middle.addcmul_(smooth.sub_(middle), (1 - factors).float())
    return _as_levels(planes).permute(0, 2, 3, 1)


def _blurred(images: Tensor, deviations: Tensor) -> Tensor:
    """A Gaussian of 17 x 17 pixels, or what fits, with the image reflected at its border."""
    radius = min(BLUR_RADIUS_PX, images.shape[1] - 1)
    distance = torch.arange(radius + 1, device=images.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (distance / deviations.flatten()[:, None]) ** 2)
    weights = (weights / (2 * weights.sum(1, keepdim=True) - 1)).float()[..., None, None, None]
    planes = _planes(images).float()
    for _ in range(2):  # rows, and after the transposition columns
        padded = F.pad(planes, (radius, radius, 0, 0), mode="reflect")
        planes = (padded[..., radius : padded.shape[-1] - radius] * weights[:, 0]).contiguous()
        for at in range(1, radius + 1):
            both = padded[..., radius - at : -radius - at] + padded[..., radius + at : padded.shape[-1] - radius + at]
            planes.addcmul_(both, weights[:, at])
        planes = planes.transpose(-1, -2).contiguous()
    return planes.round_().to(torch.uint8).permute(0, 2, 3, 1)


OTHERS: Mapping[PixelOp, Callable[[Tensor, Tensor], Tensor]] = {
    PixelOp.COLOR: _saturated,
    PixelOp.SHARPNESS: _sharpened,
    PixelOp.BLUR: _blurred,
}
