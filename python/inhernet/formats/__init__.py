"""Files for other engines: a file for each format. Every export is loaded again and compared with the model."""

from .dense import to_dense
from .lowrankarena import export_lowrankarena
from .onnx_export import export_onnx
from .plain import plain
from .program import export_aoti, export_program

__all__ = ["export_aoti", "export_lowrankarena", "export_onnx", "export_program", "plain", "to_dense"]
