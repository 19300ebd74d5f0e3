"""BART: summaries and translations; post-norm blocks, positions from 2 on."""

from collections.abc import Mapping

from upcycle.families import Config, Weights
from upcycle.families._seq2seq import STACKS, Seq2Seq, positions
from upcycle.families._weights import Bias, Matrix, Table, norm


class Bart(Seq2Seq):
    model_type = "bart"
    architectures = ("BartModel", "BartForConditionalGeneration")
    over_classes = "classification_head.out_proj"
    summary = "BART, DistilBART"
    tied = ("lm_head.weight", "model.shared.weight")
    heads = ("classification_head.", "qa_outputs.", "lm_head.", "final_logits_bias")
    defaults = {
        "vocab_size": 50265,
        "max_position_embeddings": 1024,
        "encoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        "decoder_layers": 12,
        "decoder_ffn_dim": 4096,
        "decoder_attention_heads": 16,
        "activation_function": "gelu",
        "d_model": 1024,
        "dropout": 0.1,
        "init_std": 0.02,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "tie_word_embeddings": True,
    }

    def outside(self, config: Config) -> Weights:
        hidden = config["d_model"]
        out: Weights = {"shared.weight": Table((config["vocab_size"], hidden))}
        for stack in STACKS:
            out |= positions(stack, config["max_position_embeddings"] + 2, hidden)
            out |= norm(f"{stack}.layernorm_embedding", hidden)
        return out

    def head(self, config: Config) -> Weights:
        if config["architectures"][0] == "BartModel":
            return {}
        rows = config["vocab_size"]
        bias: Weights = {"final_logits_bias": Bias((1, rows))}
        return bias if config["tie_word_embeddings"] else {
            **bias, "lm_head.weight": Matrix((rows, config["d_model"])),
        }  # fmt: skip

    def may_lack(self, config: Config) -> frozenset[str]:
        named = config["architectures"][0]
        return frozenset({"final_logits_bias"} if named == self.architectures[1] else ())

    def twins(self, config: Config) -> Mapping[str, str]:
        base = self.base(config)
        tables = (f"{base}{stack}.embed_tokens.weight" for stack in STACKS)
        return {**super().twins(config), **dict.fromkeys(tables, f"{base}shared.weight")}

    def ignored(self, name: str) -> str | None:
        if name.endswith("coder.embed_tokens.weight") or name == "lm_head.weight":
            return "tied to shared.weight"
        return super().ignored(name)


family = Bart()
