"""The public module `adaptnet.datasets`. It defines nothing, as a checkout and a wheel may load it by two names."""

from __future__ import annotations

from pipeline.api.image_sets import ImageSet as ImageSet
from pipeline.api.image_sets import ImageSplit as ImageSplit
from pipeline.api.image_sets import LabelledImage as LabelledImage
from pipeline.api.image_sets import open as open
