"""The part of onnx-graphsurgeon's logger that qcompiler uses."""

class Logger:
    CRITICAL: int
    severity: int

G_LOGGER: Logger
