import onnx

class LazyValues:
    tensor: onnx.TensorProto
    def __init__(self, tensor: onnx.TensorProto) -> None: ...
