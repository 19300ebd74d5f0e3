"""The sharing of a model over ranks, as arithmetic alone.

`layout.py` says how many ranks there are of which kind, `placement.py` which part of a tensor a rank holds.
Neither needs torch, a process group or a model, so any rank of any world can be asked about.
"""
