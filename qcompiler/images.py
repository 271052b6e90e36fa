"""Images as model input: decode, resize, crop, normalize.

`x = (pixel * scale - mean) / std` with pixels 0..255, so that every channel is a table of 256 entries. Alpha is dropped
(as OpenCV and torchvision do) unless the model has four channels; EXIF rotation is applied; of an animation the first frame
counts; 16-bit greys are rescaled to 8 bits.

The size fed is `crop`, else the model's own height and width. With `resize` the short side gets that length and the centre is
cropped; without, the image is scaled to just cover the size, then its centre is cropped. A dynamic height or width without a
`crop` follows the image's aspect ratio, and if both are dynamic and there is no `resize` either, images keep their own size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from qcompiler.errors import UserError
from qcompiler.samples import Array, Batch, InputSpec, Sample, reading, show_shape

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Named, because some of Pillow's other formats run outside programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAX_PIXELS = 89_000_000

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Layout = Literal["auto", "NCHW", "NHWC"]


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes an array. `mean` and `std`: one number, or one per channel in the order that is fed."""

    resize: int | None = None
    crop: tuple[int, int] | None = None
    """Height, width."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    bgr: bool = False
    layout: Layout = "auto"
    """`auto`: channels first if that dimension of the model is 1, 3 or 4, else last if that one is."""
    filter: Filter = "bilinear"

    def __post_init__(self) -> None:
        if any(size <= 0 for size in (self.resize or 1, *(self.crop or ()))) or self.resize == 0:
            raise UserError("resize and crop must be positive", "preprocessing")
        numbers = (self.scale, *self.mean, *self.std)
        if 0 in self.std or not all(map(math.isfinite, numbers)):
            raise UserError("scale, mean and std must be finite, and std not 0", "preprocessing")


PRESETS: Mapping[str, Preprocess] = {
    "unit": Preprocess(),
    "raw": Preprocess(scale=1.0),
    "inception": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "imagenet-tf": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "caffe": Preprocess(scale=1.0, mean=(103.939, 116.779, 123.68), bgr=True),
    "imagenet": Preprocess(resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
"""Pixels as 0..1, 0..255, -1..1 (two names), BGR less Caffe's mean colour, and torchvision's normalization for ImageNet."""


class ImageReader:
    """Reads images as items of one model input, shape [1, C, H, W] (or H, W, C; no batch axis if the model has none)."""

    def __init__(self, spec: InputSpec, preprocess: Preprocess | None) -> None:
        """Without `preprocess`: `unit` for a float input, `raw` for an integer one. Raises `UserError` on a misfit."""
        plan = preprocess or PRESETS["unit" if spec.dtype.kind == "f" else "raw"]
        shape = (None,) * 4 if spec.shape is None else spec.shape
        if len(shape) not in (3, 4):
            raise UserError(f"{spec} is not an image: save its samples as .npy", "input")
        self.spec = spec
        self.batch = _batch(spec.name, shape)
        self._plan = plan
        self._channels_last, self._channels = _channels(spec, shape[-3:], plan.layout)
        height, width = shape[-3:-1] if self._channels_last else shape[-2:]
        self._size = _size(spec, (height, width), plan.crop)
        self._table = _table(spec, plan, self._channels)

    def read(self, path: Path) -> Array:
        """Decode one file. Raises `UserError` if it is damaged, too large or too small."""
        with reading(path, "not a readable image"):
            return self._array(_decode(path, _MODES[self._channels]), str(path))

    def convert(self, pixels: Array, where: str) -> Array:
        """Convert pixels in memory: uint8, shape [H, W] or [H, W, 1, 3 or 4]. Raises `UserError` if they are too small."""
        plain = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
        return self._array(Image.fromarray(plain).convert(_MODES[self._channels]), where)

    def _array(self, picture: Image.Image, where: str) -> Array:
        image = self._shaped(picture, where)
        pixels = np.asarray(image).reshape(image.height, image.width, self._channels)
        if self._plan.bgr:
            pixels = pixels[..., [2, 1, 0, 3][: self._channels]] if self._channels > 1 else pixels
        planes = [table[pixels[..., channel]] for channel, table in enumerate(self._table)]
        array = np.stack(planes, axis=-1 if self._channels_last else 0)
        return array[np.newaxis] if self.batch.names else array

    def _shaped(self, image: Image.Image, where: str) -> Image.Image:
        filter_ = Image.Resampling[self._plan.filter.upper()]
        height, width = self._size
        if self._plan.resize is None and height is not None and width is not None:
            return ImageOps.fit(image, (width, height), filter_)
        wide, high = _scaled(image.size, self._size, self._plan.resize)
        if wide * high > _MAX_PIXELS:
            raise UserError(f"the image is too elongated: resized, it is {wide} x {high} pixels", where)
        image = image if (wide, high) == image.size else image.resize((wide, high), filter_)
        height, width = height or high, width or wide
        if wide < width or high < height:
            raise UserError(f"resized to {wide} x {high}, the image is smaller than {width} x {height}", where)
        left, top = round((wide - width) / 2), round((high - height) / 2)
        return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class ImageRecord:
    """One image file as a record of one item."""

    path: Path
    reader: ImageReader

    @property
    def where(self) -> str:
        """The file's name, for messages."""
        return str(self.path)

    def count(self) -> int:
        """Return the number of items."""
        return 1

    def items(self, indices: Sequence[int]) -> Iterator[Sample]:
        """Yield the chosen items."""
        for _ in indices:
            yield {self.reader.spec.name: self.reader.read(self.path)}


@dataclass(frozen=True)
class PixelRecord:
    """Images in memory: uint8, shape [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels."""

    pixels: Array
    reader: ImageReader
    where: str

    def count(self) -> int:
        """Return the number of items."""
        return len(self.pixels)

    def items(self, indices: Sequence[int]) -> Iterator[Sample]:
        """Yield the chosen items."""
        for index in indices:
            yield {self.reader.spec.name: self.reader.convert(self.pixels[index], f"{self.where}, image {index}")}


def _batch(name: str, shape: tuple[int | str | None, ...]) -> Batch:
    if len(shape) == 3:
        return Batch(1, frozenset())
    lead = shape[0]
    return Batch(max(lead, 1) if isinstance(lead, int) else 1, frozenset([name]))


def _channels(spec: InputSpec, dims: tuple[int | str | None, ...], layout: Layout) -> tuple[bool, int]:
    """Return whether the channels are last, and how many there are; 3 where a given layout leaves them dynamic."""
    last = layout == "NHWC" or (layout == "auto" and dims[0] not in _MODES and dims[2] in _MODES)
    found = dims[2] if last else dims[0]
    if layout != "auto" and not isinstance(found, int):
        found = 3
    if not isinstance(found, int) or found not in _MODES:
        hint = (
            "cannot tell where the channels are; set the layout"
            if layout == "auto"
            else "no image has so many channels"
        )
        raise UserError(f"{spec}: {hint}, or save the samples as .npy", "input")
    return last, found


def _size(
    spec: InputSpec, dims: tuple[int | str | None, int | str | None], crop: tuple[int, int] | None
) -> tuple[int | None, int | None]:
    if crop is None:
        height, width = (dim if isinstance(dim, int) else None for dim in dims)
        return height, width
    if any(isinstance(dim, int) and dim != size for dim, size in zip(dims, crop, strict=True)):
        raise UserError(
            f"the crop is {crop[0]} x {crop[1]}, but the model takes {show_shape(dims)}: crop to that",
            f"input '{spec.name}'",
        )
    return crop


def _table(spec: InputSpec, plan: Preprocess, channels: int) -> Array:
    """Tabulate (pixel * scale - mean) / std: shape [channels, 256], in the input's dtype."""
    for values, kind in ((plan.mean, "mean"), (plan.std, "std")):
        if len(values) not in (1, channels):
            raise UserError(
                f"{kind} has {len(values)} values, but the model has {channels} channel(s)", f"input '{spec.name}'"
            )
    mean, std = (np.asarray(values, np.float64).reshape(-1, 1) for values in (plan.mean, plan.std))
    table = np.broadcast_to((np.arange(256) * plan.scale - mean) / std, (channels, 256))
    if spec.dtype.kind == "f":
        return table.astype(spec.dtype)
    if spec.dtype.kind not in "iu":
        raise UserError(f"{spec} is not an image: save its samples as .npy", "input")
    limits = np.iinfo(spec.dtype)
    if (table != np.rint(table)).any():
        raise UserError(f"{spec} takes integers, but this preprocessing gives fractions: use scale 1, std 1", "input")
    if table.min() < limits.min or table.max() > limits.max:
        given = f"{table.min():g} to {table.max():g}; shift it by the mean"
        raise UserError(f"{spec} takes {limits.min} to {limits.max}, but this preprocessing gives {given}", "input")
    return table.astype(spec.dtype)


def _scaled(size: tuple[int, int], target: tuple[int | None, int | None], resize: int | None) -> tuple[int, int]:
    """Return width and height with the short side at `resize`, else with the one known side of `target` met."""
    wide, high = size
    if resize is not None:
        # Truncated, as torchvision does.
        short = min(size)
        return resize * wide // short, resize * high // short
    height, width = target
    if height is not None:
        return max(1, round(wide * height / high)), height
    if width is not None:
        return width, max(1, round(high * width / wide))
    return size


def _decode(path: Path, mode: str) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, which does no harm, and of huge images, which do.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            return _eight_bit(upright, path).convert(mode)


def _eight_bit(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise UserError("pixels are 32-bit floats of unknown range: save the samples as .npy", str(path))
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise UserError("pixels have more than 16 bits: save the samples as .npy", str(path))
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    # A palette may hold alpha, which a direct conversion to RGB complains about.
    return image.convert("RGBA") if image.mode in ("P", "PA") else image
