"""qcompiler: compile a float ONNX model into a fast, accurate int8 model for ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcompiler.errors import UserError

if TYPE_CHECKING:
    from qcompiler.compile import CompileResult, compile_model

__all__ = ["CompileResult", "UserError", "__version__", "compile_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the compiler when it is first asked for: `import qcompiler` itself stays light."""
    if name in ("CompileResult", "compile_model"):
        from qcompiler import compile as module  # noqa: PLC0415  (that is the point)

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
