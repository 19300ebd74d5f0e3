"""Makes what the guides about text start from, in a few seconds and without a download.

`dense/` is a Llama of 0.15 M parameters with a tokenizer of bytes, trained a little on Python's manual.
`train.txt` is that text, and `held_out.txt` is a part of it that the model has not seen. `code.txt` and
`code_held_out.txt` are another domain: sources of Python's library.
"""

import argparse
import ast
import tarfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
of_bytes = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
of_bytes.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_bytes, bos_token="</s>", eos_token="</s>")

text = "\n".join(topics.values())[:250_000]
Path("train.txt").write_text(text[:-10_000])
Path("held_out.txt").write_text(text[-10_000:])
Path("code.txt").write_text(Path(argparse.__file__).read_text() + Path(tarfile.__file__).read_text())
Path("code_held_out.txt").write_text(Path(ast.__file__).read_text()[:10_000])

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(alphabet), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
tokens = tokenizer(text[:-10_000], return_tensors="pt")["input_ids"][0]
for _ in range(80):
    starts = torch.randint(len(tokens) - 128, (8,))
    rows = torch.stack([tokens[start : start + 128] for start in starts])
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.save_pretrained("dense")
tokenizer.save_pretrained("dense")
