"""Temporary: the native library is not written yet. Replace this file."""
import torch
error = "the native library is not built"
ops = None
path = None
def load(): return False
def isa(): return None
def cuda_built(): return False
