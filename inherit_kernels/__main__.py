"""`python -m inherit_kernels`: what is built, and what it supports."""

from inherit_kernels.status import status, support_table

print(status())
print()
print(support_table())
