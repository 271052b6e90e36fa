"""qcompiler: compile a float ONNX model into a fast, accurate int8 model for ONNX Runtime."""

__version__ = "0.1.0"
