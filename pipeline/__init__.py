"""AdaptNet's pipeline."""

from pipeline.compat import nvjpeg

nvjpeg.load_first()
