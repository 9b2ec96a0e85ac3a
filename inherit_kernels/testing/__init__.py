"""What tests and benchmarks share: cases, the accuracy rule, poisoned memory."""

from inherit_kernels.testing.accuracy import check_accuracy as check_accuracy
from inherit_kernels.testing.cases import Case as Case
from inherit_kernels.testing.cases import cases_of as cases_of
from inherit_kernels.testing.cases import make_inputs as make_inputs
from inherit_kernels.testing.cases import random_case_of as random_case_of
from inherit_kernels.testing.gpu_timing import cold_copies as cold_copies
from inherit_kernels.testing.gpu_timing import time_on_gpu as time_on_gpu
from inherit_kernels.testing.memory import poisoned_memory as poisoned_memory
