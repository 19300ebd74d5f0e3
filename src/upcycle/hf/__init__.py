"""Everything that reaches into transformers, and the versions that it was tested with.

Other rooms use transformers' public classes. Whatever reads or writes its registries, its private attributes
or its environment lies here. The version is looked at when the first module of this room is imported.
"""

from upcycle.hf import versions

versions.require()
