"""Run llama.cpp's own converter on a folder: python gguf_from_hf.py LLAMA_CPP FOLDER OUT.gguf

Its converter refuses tokenizers whose hash it does not know; here the tokenizer plays no part, for the
test feeds token ids.
"""

import sys
from pathlib import Path

source, folder, out = map(Path, sys.argv[1:])
sys.path[:0] = [str(source), str(source / "gguf-py")]

import convert_hf_to_gguf  # noqa: E402


def set_vocab(self) -> None:
    """A vocabulary of the right size, of tokens that nobody will read."""
    size = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list([f"<{i}>" for i in range(size)])
    self.gguf_writer.add_token_types([1] * size)
    self.gguf_writer.add_token_merges(["a b"])
    self.gguf_writer.add_bos_token_id(1)
    self.gguf_writer.add_eos_token_id(2)


real = convert_hf_to_gguf.get_model_class


def get_model_class(*args, **kwargs):
    model = real(*args, **kwargs)
    model.set_vocab = set_vocab
    return model


convert_hf_to_gguf.get_model_class = get_model_class
sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(out)]
if '"qwen3_5' in (folder / "config.json").read_text():  # whose checkpoints mostly bring a draft head
    sys.argv.append("--no-mtp")
convert_hf_to_gguf.main()
