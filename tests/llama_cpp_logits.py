"""llama.cpp in a process of its own: python llama_cpp_logits.py MODEL.gguf OUT.npy '[1, 2, 3]'

It writes the logits of all places, [L, V] in float32. llama.cpp aborts where others raise.
"""

import json
import sys

import numpy as np
from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):
    """A model with the attribute that `get_logits_ith` of cyllama 0.2.18 reads and forgets to define."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


file, out, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llama_cpp.ggml_backend_load_all()
settings = llama_cpp.LlamaModelParams()
settings.n_gpu_layers = 0
model = Model(file, settings)
settings = llama_cpp.LlamaContextParams()
settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(ids))
settings.type_k = settings.type_v = 0  # keys and values in float32, by their ggml_type
settings.flash_attn_type = 0  # off: it works in float16
settings.n_threads = settings.n_threads_batch = 1
context = llama_cpp.LlamaContext(model, settings)
batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
for place, token in enumerate(ids):
    batch.add(token, place, [0], True)
context.decode(batch)
np.save(out, np.array([context.get_logits_ith(place) for place in range(len(ids))], np.float32))
