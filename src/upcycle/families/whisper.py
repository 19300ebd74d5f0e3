"""Whisper: speech to text; an encoder of spectrograms and a decoder of tokens."""

from upcycle.families import Config, Weights
from upcycle.families._seq2seq import STACKS, Seq2Seq, positions
from upcycle.families._weights import Bias, Matrix, Table, norm


class Whisper(Seq2Seq):
    model_type = "whisper"
    architectures = ("WhisperModel", "WhisperForConditionalGeneration")
    summary = "Whisper, Distil-Whisper"
    tied = ("proj_out.weight", "model.decoder.embed_tokens.weight")
    heads = ("proj_out.", "classifier.", "projector.", "layer_weights")
    key_bias = False
    positions_key = "max_target_positions"
    before = ("encoder.conv", "encoder.embed_positions.", "decoder.embed_")
    after = ("encoder.layer_norm.", "decoder.layer_norm.")
    defaults = {
        "vocab_size": 51865,
        "num_mel_bins": 80,
        "encoder_layers": 4,
        "encoder_ffn_dim": 1536,
        "encoder_attention_heads": 6,
        "decoder_layers": 4,
        "decoder_ffn_dim": 1536,
        "decoder_attention_heads": 6,
        "activation_function": "gelu",
        "d_model": 384,
        "dropout": 0.0,
        "init_std": 0.02,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "pad_token_id": 50256,
        "tie_word_embeddings": True,
    }

    def outside(self, config: Config) -> Weights:
        hidden = config["d_model"]
        out: Weights = {"decoder.embed_tokens.weight": Table((config["vocab_size"], hidden))}
        for i, channels in enumerate((config["num_mel_bins"], hidden), 1):
            out[f"encoder.conv{i}.weight"] = Matrix((hidden, channels, 3))
            out[f"encoder.conv{i}.bias"] = Bias((hidden,))
        for stack, rows in self.lengths(config).items():
            out |= positions(stack, rows, hidden) | norm(f"{stack}.layer_norm", hidden)
        return out

    def length(self, config: Config) -> int:
        return int(config["max_target_positions"])

    def lengths(self, config: Config) -> dict[str, int]:
        return dict(
            zip(STACKS, (config["max_source_positions"], config["max_target_positions"]), strict=True)
        )

    def row(self, config: Config, length: int) -> dict[str, int]:
        # Sound is filled up to thirty seconds.
        return super().row(config, length) | {"encoder": config["max_source_positions"]}

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        sound = (1, config["num_mel_bins"], 2 * config["max_source_positions"])
        words = ("tokens", (1, min(tokens // 4, self.length(config))))
        read: dict[str, tuple[str, tuple[int, ...]]] = {"input_features": ("sound", sound)}
        return read | ({"decoder_input_ids": words} if "decoder" in self.parts(config) else {})

    def ignored(self, name: str) -> str | None:
        if name == "proj_out.weight":
            return "tied to the decoder's table"
        return super().ignored(name)


family = Whisper()
