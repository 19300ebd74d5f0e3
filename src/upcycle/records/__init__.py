"""The JSON documents in folders, as typed records that their writers and readers share.

Each file here is a document: its name, its format number and, in annotations, its contents. Nothing here
needs torch.
"""
