"""The definitions: each memory frame by frame, its inner gradient by autograd of the written loss.

This is the oracle the fast forms are held to. It is slow on purpose, imports none of them and knows
nothing of their algebra: no dual form, no hand-written gradient, no buffer of rank-one writes. One
batch row after another, one frame after another; the heads of a frame run side by side, because no
head reads another's. One file a family, and none imports another.
"""
