"""Model files: safetensors headers and bytes, dtypes, hub ids."""
