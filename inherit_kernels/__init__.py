"""inherit_kernels: fused low-rank layers, plain and gated, behind one function per op.

>>> import torch, inherit_kernels as ik
>>> x, down, up, gate = torch.randn(2, 8), torch.randn(3, 8), torch.randn(4, 5, 3), torch.randn(4, 3)
>>> y = ik.gated_lowrank_linear(x, down, up, gate)
"""

from inherit_kernels.dispatch import use_backend as use_backend
from inherit_kernels.explain import explain as explain
from inherit_kernels.ops.gated_lowrank_conv2d import gated_lowrank_conv2d as gated_lowrank_conv2d
from inherit_kernels.ops.gated_lowrank_linear import gated_lowrank_linear as gated_lowrank_linear
from inherit_kernels.ops.lowrank_conv2d import lowrank_conv2d as lowrank_conv2d
from inherit_kernels.ops.lowrank_linear import lowrank_linear as lowrank_linear
from inherit_kernels.packing import Packed as Packed
from inherit_kernels.packing import bind as bind
from inherit_kernels.packing import pack as pack
from inherit_kernels.registry import OPS, flop_formulas_of
from inherit_kernels.status import status as status
from inherit_kernels.version import __version__ as __version__

# For torch.utils.flop_counter.FlopCounterMode(custom_mapping=inherit_kernels.flop_formulas); importing torch's counter here
# would import triton.
flop_formulas = {packet: formula for spec in OPS.values() for packet, formula in flop_formulas_of(spec).items()}
