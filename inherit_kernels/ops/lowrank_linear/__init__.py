from inherit_kernels.ops.lowrank_linear.op import lowrank_linear as lowrank_linear
