"""``impl="triton"``: block-sparse attention for GPUs, forward and backward.

Only `run` is for others. Nothing here is imported before it is needed: triton takes as long to load
as torch itself.
"""
