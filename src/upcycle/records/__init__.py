"""The JSON documents that folders hold, as typed records: whoever writes one and whoever reads it share it.

A file here is a document: its name, its format number, and what it must hold, said by annotations. Nothing
here needs torch.
"""
