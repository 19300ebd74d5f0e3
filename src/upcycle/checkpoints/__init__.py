"""Files of models: safetensors headers and bytes, dtypes, hub ids."""
