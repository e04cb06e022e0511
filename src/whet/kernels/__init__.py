"""The arithmetic of a decoder layer and of the loss, one operation a file.

Each file holds the formula, a torch reference that runs anywhere, and a Triton kernel for CUDA devices; its public
function picks between the two by the device of its input. They are plain functions on tensors: what runs when, forward
and backward, is written in `models/block.py`.
"""
