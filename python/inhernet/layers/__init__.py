"""Layers that keep their matrices to themselves, written anew with torch's own linear layers and convolutions.

`plan` and `inherit` factorise `nn.Linear` and `nn.Conv2d`. Other modules that hold matrices (packed attention, transposed
weights, experts in one tensor, 1-D convolutions) are *opened* first: replaced by a module that computes the same from
linear layers inside. One file for each kind; `register` adds yours.
"""

from . import attention, conv1d, encoder_layer, experts, transposed_linear
from .copies import replaced, sharing
from .registry import can_open, open_layers, register, why_closed

__all__ = ["can_open", "open_layers", "register", "replaced", "sharing", "why_closed"]

# Owners before what they own: an encoder layer decides about its attention.
register(encoder_layer.opens, encoder_layer.opened)
for _kind in (attention, transposed_linear, experts, conv1d):
    register(_kind.opens, _kind.opened, _kind.why_not)
