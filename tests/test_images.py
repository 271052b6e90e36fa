from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qcompiler.errors import UserError
from qcompiler.images import PRESETS, ImageReader, Preprocess
from qcompiler.samples import InputSpec

RAW = PRESETS["raw"]


def spec(*shape, dtype=np.float32):
    return InputSpec("x", np.dtype(dtype), shape)


def noise(height, width, channels=3):
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture
def save(tmp_path):
    def save(image, name="a.png", **options):
        path = tmp_path / name
        image.save(path, **options)
        return path

    return save


@pytest.fixture
def picture(save):
    return save(Image.fromarray(noise(8, 8)))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("unit", 0, 1), ("raw", 0, 255), ("inception", -1, 1), ("imagenet-tf", -1, 1)]
)
def test_preset_ranges(save, name, low, high):
    pixels = np.zeros((1, 2, 3), np.uint8)
    pixels[0, 1] = 255
    array = ImageReader(spec(1, 3, 1, 2), PRESETS[name]).read(save(Image.fromarray(pixels)))
    assert array.dtype == np.float32 and array[0, 0, 0].tolist() == [low, high]


def test_imagenet_is_torchvisions_resize_crop_normalize(save):
    image = Image.fromarray(noise(300, 401))
    array = ImageReader(spec("N", 3, 224, 224), PRESETS["imagenet"]).read(save(image))
    small = image.resize((342, 256), Image.Resampling.BILINEAR).crop((59, 16, 283, 240))
    want = (np.asarray(small) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert array.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(array[0], want.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "layout", "fed"),
    [
        ((1, 3, 8, 8), "auto", (1, 3, 8, 8)),
        (("N", 8, 8, 3), "auto", (1, 8, 8, 3)),
        ((4, 3, 8, 8), "auto", (1, 3, 8, 8)),
        ((3, 8, 8), "auto", (3, 8, 8)),
        ((8, 8, 1), "auto", (8, 8, 1)),
        ((1, 4, 8, 8), "auto", (1, 4, 8, 8)),
        (("N", "C", 8, 8), "NCHW", (1, 3, 8, 8)),
        (("N", 8, 8, "C"), "NHWC", (1, 8, 8, 3)),
        ((1, 3, 4, 3), "NHWC", (1, 3, 4, 3)),
    ],
)
def test_layout_follows_the_model(picture, shape, layout, fed):
    assert ImageReader(spec(*shape), Preprocess(layout=layout)).read(picture).shape == fed


def test_channels_first_is_channels_last_transposed(picture):
    first = ImageReader(spec(1, 3, 8, 8), RAW).read(picture)
    last = ImageReader(spec(1, 8, 8, 3), RAW).read(picture)
    assert last[0].tolist() == noise(8, 8).tolist() == first[0].transpose(1, 2, 0).tolist()


def test_bgr_swaps_the_channels_before_the_mean(picture):
    array = ImageReader(spec(1, 8, 8, 3), PRESETS["caffe"]).read(picture)
    want = noise(8, 8)[..., ::-1] - np.array([103.939, 116.779, 123.68])
    assert array[0].tolist() == want.astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("shape", "plan", "fed"),
    [
        ((1, 3, 10, 10), Preprocess(), (10, 10)),
        ((1, 3, 30, 10), Preprocess(), (30, 10)),
        ((1, 3, "H", "W"), Preprocess(), (20, 40)),
        ((1, 3, "H", "W"), Preprocess(resize=10), (10, 20)),
        ((1, 3, "H", "W"), Preprocess(crop=(8, 16)), (8, 16)),
        ((1, 3, "H", "W"), Preprocess(resize=10, crop=(8, 16)), (8, 16)),
        ((1, 3, 48, "W"), Preprocess(), (48, 96)),
        ((1, 3, "H", 10), Preprocess(), (5, 10)),
    ],
)
def test_sizes(save, shape, plan, fed):
    path = save(Image.fromarray(noise(20, 40)))
    assert ImageReader(spec(*shape), plan).read(path).shape[2:] == fed


def test_crops_are_central(save):
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    path = save(Image.fromarray(ramp))
    array = ImageReader(spec(1, 3, 20, 20), RAW).read(path)
    assert array[0, 0, 0].tolist() == list(range(10, 30))
    array = ImageReader(spec(1, 3, 10, 10), Preprocess(scale=1, resize=20)).read(path)
    assert array[0, 0, 0].tolist() == list(range(15, 25))


@pytest.mark.parametrize(
    ("shape", "plan", "reason"),
    [
        ((1, 5, 8, 8), None, "cannot tell where the channels are"),
        (("N", "C", "H", "W"), None, "set the layout"),
        ((1, 8, 8, 8), Preprocess(layout="NHWC"), "no image has so many channels"),
        ((1, 10), None, "not an image"),
        ((1, 3, 192, 192), PRESETS["imagenet"], r"crop is 224 x 224, but the model takes \[192, 192\]"),
        ((1, 1, 224, 224), PRESETS["imagenet"], "mean has 3 values, but the model has 1"),
    ],
)
def test_a_preprocessing_that_cannot_fit_is_refused_at_once(shape, plan, reason):
    with pytest.raises(UserError, match=reason):
        ImageReader(spec(*shape), plan)


@pytest.mark.parametrize(
    "options",
    [
        {"std": (0.0,)},
        {"resize": 0},
        {"resize": -1},
        {"crop": (0, 1)},
        {"scale": float("nan")},
        {"mean": (float("inf"),)},
    ],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(UserError):
        Preprocess(**options)


def test_integer_inputs_get_pixels(picture):
    unsigned = ImageReader(spec(1, 8, 8, 3, dtype=np.uint8), None).read(picture)
    assert unsigned.dtype == np.uint8 and unsigned[0].tolist() == noise(8, 8).tolist()
    signed = ImageReader(spec(1, 8, 8, 3, dtype=np.int8), Preprocess(scale=1, mean=(128,))).read(picture)
    assert signed.dtype == np.int8 and (signed[0].astype(int) + 128).tolist() == noise(8, 8).tolist()
    for dtype, plan, reason in (
        (np.uint8, PRESETS["unit"], "gives fractions"),
        (np.int8, RAW, "takes -128 to 127, but this preprocessing gives 0 to 255"),
    ):
        with pytest.raises(UserError, match=reason):
            ImageReader(spec(1, 8, 8, 3, dtype=dtype), plan)
    with pytest.raises(UserError, match="not an image"):
        ImageReader(spec(1, 8, 8, 3, dtype=bool), RAW)


def grey_value(path, channels=1):
    return ImageReader(spec(1, channels, 4, 4), RAW).read(path)[0, :, 0, 0].tolist()


def test_every_colour_mode_is_converted(save):
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    assert grey_value(save(red), 3) == [200, 0, 0]
    assert grey_value(save(red), 4) == [200, 0, 0, 255]
    assert grey_value(save(red)) == [60]
    assert grey_value(save(Image.new("RGBA", (4, 4), (9, 8, 7, 0))), 3) == [9, 8, 7]
    assert grey_value(save(Image.new("RGBA", (4, 4), (9, 8, 7, 6))), 4) == [9, 8, 7, 6]
    assert grey_value(save(Image.new("LA", (4, 4), (50, 0))), 3) == [50, 50, 50]
    assert grey_value(save(Image.new("1", (4, 4), 1)), 3) == [255, 255, 255]
    assert grey_value(save(red.quantize(4), transparency=b"\0"), 3) == [200, 0, 0]
    cyan = grey_value(save(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "a.jpg", quality=100), 3)
    assert cyan[0] < 30 and min(cyan[1:]) > 200


def test_deep_greys_are_rescaled(save):
    sixteen = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    assert grey_value(save(sixteen)) == [0x80]
    assert grey_value(save(sixteen, "a.tif"), 3) == [0x80] * 3
    for dtype, reason in ((np.float32, "32-bit floats"), (np.int32, "more than 16 bits")):
        with pytest.raises(UserError, match=reason):
            grey_value(save(Image.fromarray(np.full((4, 4), 70000, dtype)), "a.tif"))


def test_exif_rotation_is_applied(save):
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(image, "a.jpg", exif=exif)
    assert ImageReader(spec(1, 3, "H", "W"), None).read(path).shape == (1, 3, 40, 20)


def test_an_animation_gives_its_first_frame(save):
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    assert grey_value(save(frames[0], "a.gif", save_all=True, append_images=frames[1:])) == [10]


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.ppm"])
def test_lossless_formats_agree(save, name):
    options = {"lossless": True} if name == "a.webp" else {}
    array = ImageReader(spec(1, 8, 8, 3), RAW).read(save(Image.fromarray(noise(8, 8)), name, **options))
    assert array[0].tolist() == noise(8, 8).tolist()


def png(width, height, body=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"\xff\xd8\xff\xe0" + b"noise" * 99, png(60000, 60000), png(12000, 12000), png(100, 100)],
    ids=["empty", "text", "jpeg-noise", "bomb", "large", "truncated"],
)
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable image") as caught:
        grey_value(path)
    assert caught.value.where == str(path)


def test_a_truncated_jpeg_is_refused(save):
    path = save(Image.fromarray(noise(64, 64)), "a.jpg")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated"):
        grey_value(path)


def test_an_image_that_is_too_small_or_too_elongated_is_refused(save):
    path = save(Image.new("L", (5000, 2)))
    with pytest.raises(UserError, match="smaller than 224 x 224"):
        ImageReader(spec(1, 3, 224, 224), Preprocess(resize=100, crop=(224, 224))).read(path)
    with pytest.raises(UserError, match="too elongated"):
        ImageReader(spec(1, 3, "H", "W"), Preprocess(resize=256)).read(path)
    assert ImageReader(spec(1, 3, 224, 224), None).read(path).shape == (1, 3, 224, 224)
