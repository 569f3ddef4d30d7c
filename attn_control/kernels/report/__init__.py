"""``make gpu-report``: what the kernels are worth on the GPU that is here, measured.

Correctness against a float64 softmax that is written out here, then times beside torch's dense
attention and compiled flex_attention; a page for people and a file for `kernels.cost`.
"""
