"""All code that depends on the internals of transformers, and the versions it was tested with.

Other packages use only transformers' public classes. Code that touches its registries, private attributes or
environment is here. The version is checked when the first module of this package is imported.
"""

from upcycle.hf import versions

versions.require()
