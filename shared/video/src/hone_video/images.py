"""Images that videos begin with."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

__all__ = ["cover", "read_image"]


def read_image(file: str | Path) -> Image.Image:
    """An image in RGB, turned as its camera held it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"image {file} does not exist; expected a PNG, a JPEG or another image")
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"image {file} cannot be read ({error}); expected a PNG, a JPEG or another image") from error


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image scaled to cover a size and cut to its middle, where pipelines would stretch it.

    Args:
        image: Of any size.
        height: Pixels.
        width: Pixels.
    """
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
