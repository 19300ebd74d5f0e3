"""A forecast, from headers alone, of what a step of training needs on a rank: memory, traffic, time.

`groups.py` says which parameters are gathered together, `shape.py` what a step computes on. `memory.py`,
`traffic.py` and `time.py` follow the step of `upcycle train`: FSDP2, tensor parallelism, experts that tokens
are sent to. None of them needs torch. The tests hold them to what torch does in a world of fake ranks.
"""
