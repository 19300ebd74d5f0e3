"""CLIP and SigLIP: a stack of blocks for texts and one for images, with plain networks in both."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config, Grid, Stack, Weights
from upcycle.families._checked import check
from upcycle.families._encoder import pair
from upcycle.families._training import Trained
from upcycle.families._weights import Bias, RowMatrix, Table, below, linear, norm, row_linear
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

TOWERS = ("text", "vision")


class DualEncoder(Trained):
    """Two encoders whose outputs are compared; `towers` has what transformers assumes for each."""

    towers: ClassVar[Mapping[str, Mapping[str, Any]]]
    causal: ClassVar[bool]  # whether a token of a text sees those before it only
    class_token: ClassVar[bool]  # whether a token stands before the patches of an image
    counts = ()
    before = tuple(f"{tower}_model.embeddings." for tower in TOWERS)
    after = tuple(f"{tower}_model." for tower in TOWERS)

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        self._refuse_one_encoder(raw)
        config: Config = {**self.defaults, **raw}
        for tower in TOWERS:
            given = raw.get(f"{tower}_config") or {}
            if not isinstance(given, Mapping):
                raise UpcycleError(f"config.json: {tower}_config = {given!r}; it must be a table")
            check(f"{self.model_type} ({tower}_config)", given)
            config[tower] = {**self.towers[tower], **given}
        text = config["text"]
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "hidden_act")
        config |= {key: text[key] for key in (*kept, "max_position_embeddings")}
        config["num_hidden_layers"] = sum(config[tower]["num_hidden_layers"] for tower in TOWERS)
        config["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
        config["tie_word_embeddings"] = False
        config["architectures"] = None
        return config

    def _refuse_one_encoder(self, raw: Mapping[str, Any]) -> None:
        """Refuse a class of one of the encoders, alone or with a head."""
        (whole,), named = self.architectures, (raw.get("architectures") or [""])[0]
        if named != whole and named.startswith(whole.removesuffix("Model")):
            raise UpcycleError(
                f"config.json names the class {named}, which has one of the two encoders; of "
                f"{self.model_type}, upcycle takes {whole}"
            )

    @abc.abstractmethod
    def outside(self, config: Config) -> Weights:
        """Return the tensors outside the blocks, by their names on disk."""

    def weights(self, config: Config) -> Weights:
        out = self.outside(config)
        for tower in TOWERS:
            out |= below(f"{tower}_model.", blocks(config[tower]))
        return out

    def tables(self, config: Config) -> Weights:
        """Return words and positions of the encoder of texts."""
        text = config["text"]
        places = (text["max_position_embeddings"], text["hidden_size"])
        return {
            "text_model.embeddings.position_embedding.weight": Table(places),
            "text_model.embeddings.token_embedding.weight": Table((text["vocab_size"], text["hidden_size"])),
        }

    def cached(self, config: Config, layer: int) -> int:
        return 0  # it generates nothing

    def lengths(self, config: Config) -> dict[str, int]:
        grid = self.grid(config, "vision")
        assert grid is not None
        patches = grid.rows * grid.columns + self.class_token
        return {"text": config["text"]["max_position_embeddings"], "vision": patches}

    def row(self, config: Config, length: int) -> dict[str, int]:
        return self.lengths(config) | {"text": length}

    def grid(self, config: Mapping[str, Any], stack: str) -> Grid | None:
        return patches(config["vision"]) if stack == "vision" else None

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**self.words(config, tokens), "pixel_values": ("pixels", (4, *image(config["vision"])))}

    def words(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the part of `inputs` that the text model reads."""
        return super().inputs(config, tokens)

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return tuple(
            stack(config[tower], tower, f"{tower}_model.", causal=tower == "text" and self.causal)
            for tower in TOWERS
        )

    def stack_of(self, name: str) -> str:
        return "vision" if name.startswith("vis") else "text"

    def repeated(self, config: Config, raw: Mapping[str, Any], times: int) -> Config:
        return {
            f"{tower}_config": {
                **(raw.get(f"{tower}_config") or {}),
                "num_hidden_layers": config[tower]["num_hidden_layers"] * times,
            }
            for tower in TOWERS
        }

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return branches(stack)

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "text"
    ) -> FeedForward:
        return network(tensors, f"{stack}_model.", layer)

    def ignored(self, name: str) -> str | None:
        return counted_out(name) or super().ignored(name)


def blocks(tower: Mapping[str, Any]) -> Weights:
    """Return the tensors of the blocks of one encoder, by their names in it."""
    hidden, width = tower["hidden_size"], tower["intermediate_size"]
    block = norm("layer_norm1", hidden) | norm("layer_norm2", hidden)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        block |= linear(f"self_attn.{part}", hidden, hidden)
    block |= linear("mlp.fc1", width, hidden) | linear("mlp.fc2", hidden, width)
    out: Weights = {}
    for i in range(tower["num_hidden_layers"]):
        out |= below(f"encoder.layers.{i}.", block)
    return out


def stack(tower: Mapping[str, Any], name: str, prefix: str, *, causal: bool) -> Stack:
    """Return the stack of one encoder, whose names begin with `prefix`."""
    block = f"{prefix}encoder.layers.{{i}}."
    return Stack(
        name=name,
        count=tower["num_hidden_layers"],
        hidden=tower["hidden_size"],
        width=tower["intermediate_size"],
        attention=tower["hidden_size"],
        path=block + "mlp",
        owned=(block + "mlp.",),
        module=block + "mlp",
        norm_path=block + "layer_norm2",
        down=block + "mlp.fc2",
        heads=(block + "self_attn.out_proj",),
        causal=causal,
        activation=tower["hidden_act"],
    )


def branches(stack: Stack) -> tuple[str, ...]:
    """Return the modules of a block whose output joins the residual stream."""
    return (f"{stack.blocks}.{{i}}.self_attn", f"{stack.blocks}.{{i}}.mlp")


def network(tensors: Mapping[str, Lazy], prefix: str, layer: int) -> FeedForward:
    """Return the network of a block of an encoder, whose names begin with `prefix`."""
    start = f"{prefix}encoder.layers.{layer}.mlp."
    return FeedForward(
        up=tensors[start + "fc1.weight"],
        up_bias=tensors[start + "fc1.bias"],
        down=tensors[start + "fc2.weight"],
        down_bias=tensors[start + "fc2.bias"],
    )


def patches(vision: Mapping[str, Any]) -> Grid:
    """Return the patches that the encoder of images cuts."""
    size, patch = (pair(vision[key]) for key in ("image_size", "patch_size"))
    return Grid(rows=size[0] // patch[0], columns=size[1] // patch[1], height=patch[0], width=patch[1])


def positions(vision: Mapping[str, Any], *, class_token: bool) -> int:
    """Return the number of tokens of an image."""
    grid = patches(vision)
    return grid.rows * grid.columns + class_token


def image(vision: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return channels, height and width of an image."""
    return (vision["num_channels"], *pair(vision["image_size"]))


def counted_out(name: str) -> str | None:
    """Return why a buffer of positions is not in the result, or None for another tensor."""
    return "a buffer that transformers counts out" if name.endswith("embeddings.position_ids") else None


def attending_head(vision: Mapping[str, Any]) -> Weights:
    """Return the tensors of SigLIP's head, which attends to the patches."""
    hidden, width = vision["hidden_size"], vision["intermediate_size"]
    out: Weights = {
        "probe": Table((1, 1, hidden)),
        "attention.in_proj_weight": RowMatrix((3 * hidden, hidden)),
        "attention.in_proj_bias": Bias((3 * hidden,)),
    }
    out |= row_linear("attention.out_proj", hidden, hidden) | norm("layernorm", hidden)
    return out | row_linear("mlp.fc1", width, hidden) | row_linear("mlp.fc2", hidden, width)
