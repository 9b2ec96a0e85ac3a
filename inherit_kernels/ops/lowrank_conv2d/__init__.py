from inherit_kernels.ops.lowrank_conv2d.op import lowrank_conv2d as lowrank_conv2d
