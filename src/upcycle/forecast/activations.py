"""The bytes that a block keeps of its tokens for the backward pass, and those alive in the middle of that
pass.

They are the tensors that torch saves in a block of transformers' Llama and Mixtral in bfloat16 with flash
attention, counted one by one. Others are estimated by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterator

from upcycle.blueprints.blueprint import Blueprint
from upcycle.families import Stack
from upcycle.forecast.setting import Setting
from upcycle.init import Site

BF16 = 2


def block_bytes(built: Blueprint, stack: Stack, layer: int) -> float:
    """Return the bytes that one block keeps of a token for its backward pass, in bf16 with flash attention.

    Beside its network a block keeps 16 H + 4 q + 2 kv + 4 heads. A dense network keeps 8 I + 8 if it is gated
    and 4 I + 8 if it is not. Experts keep K (4 H + 8 I + 40) + 4 E + 12, and a shared expert 2 H + 8 I. A
    block of ConvNeXt keeps 8 H beside its network. A block of ConvNeXt V2, which has a response norm, keeps
    6 H beside it and 8 I in it.
    """
    if layer not in stack.numbers:
        return float(beside_network(built, stack, convnet_scales=True))
    network = built.dense.feed_forward(layer, stack.name)
    neuron = 8 if network.gate is not None or network.response() else 4
    beside = float(beside_network(built, stack, convnet_scales=not network.response()))
    site = site_of(built, stack, layer)
    if site is None:
        return beside + neuron * network.width + 8
    row = built.dense.family.lengths(built.dense.config)[site.stack]
    for count, width, chosen in experts(built, site, row):
        beside += chosen * (4 * site.hidden + neuron * width + 40) + 4 * count
    if site.shared_width:
        beside += 2 * site.hidden + neuron * site.shared_width
    return beside + 12


def beside_network(built: Blueprint, stack: Stack, *, convnet_scales: bool) -> int:
    """Return the bytes of a token for norms, sums, and attention or convolution: all but the network."""
    config = built.dense.config
    heads, width = config["num_attention_heads"], config["head_dim"]
    if not heads:
        return (8 if convnet_scales else 6) * stack.hidden
    keys = 2 * (config.get("num_key_value_heads") or heads) * width
    return 16 * stack.hidden + 4 * heads * width + 2 * keys + 4 * heads


def site_of(built: Blueprint, stack: Stack, layer: int) -> Site | None:
    """Return the MoE layer of a block, None if it stays dense."""
    return next((s for s in built.sites if (s.stack, s.layer) == (stack.name, layer)), None)


def experts(built: Blueprint, site: Site, row: int) -> Iterator[tuple[int, int, float]]:
    """Yield the sets of experts of a layer: how many, their neurons, and how many a token is sent to.

    `row` is the number of tokens of a row.
    """
    router = built.parts[site.stack].router
    sets = ((site.num_experts, site.width), (site.universal_experts, site.universal_width))
    for count, width in sets:
        if count:
            yield count, width, router.experts_per_token(count, site.top_k, router.group or row)


def kept(setting: Setting, stack: Stack, layer: int) -> float:
    """Return the bytes that a block keeps of all tokens of a pass until it goes back."""
    tokens, width = setting.tokens(stack.name), setting.width
    if setting.recompute:
        also = costly(setting, stack, layer) if setting.recompute == "selective" else 0.0
        return tokens * (stack.hidden * width + also)
    return tokens * width / BF16 * block_bytes(setting.built, stack, layer) / setting.layout.tp


def costly(setting: Setting, stack: Stack, layer: int) -> float:
    """Return the bytes of a token in outputs of matrix products and of attention, which `selective` keeps."""
    built, width = setting.built, setting.width
    config = built.dense.config
    heads, size = config["num_attention_heads"], config["head_dim"]
    keys = 2 * (config.get("num_key_value_heads") or heads or 0) * (size or 0)
    numbers = float(2 * heads * size + keys + stack.hidden) if heads else 0.0
    if layer not in stack.numbers:
        return width * numbers / setting.layout.tp + 4 * (heads or 0)
    network, site = built.dense.feed_forward(layer, stack.name), site_of(built, stack, layer)
    up = 1 if network.gate is None else 2
    if site is None:
        numbers += up * network.width + stack.hidden
    else:
        for count, neurons, chosen in experts(built, site, setting.lengths[stack.name]):
            numbers += count + chosen * (up * neurons + stack.hidden)
        if site.shared_width:
            numbers += up * site.shared_width + stack.hidden
    return width * numbers / setting.layout.tp + 4 * (heads or 0)


def alive_in_network(setting: Setting, stack: Stack, layer: int) -> tuple[float, float]:
    """Return the bytes of a block's network in the backward pass: at its activation, and at its first matrix.

    At the activation these are the first matrix's outputs and the activation's with their gradients, and the
    input. At the first matrix they are the gradient of its output, its input and that one's gradient.
    """
    if layer not in stack.numbers:
        return 0.0, 0.0
    site = site_of(setting.built, stack, layer)
    network = setting.built.dense.feed_forward(layer, stack.name)
    gate = network.gate is not None
    if site is None:
        networks = [(network.width, 1.0)]
    else:
        sets = experts(setting.built, site, setting.lengths[stack.name])
        networks = [(width, chosen) for _, width, chosen in sets]
        networks += [(site.shared_width, 1.0)] if site.shared_width else []
    rows = setting.tokens(stack.name) * setting.width / setting.layout.tp
    middle = sum(rows * chosen * ((6 if gate else 4) * width + stack.hidden) for width, chosen in networks)
    first = sum(rows * chosen * ((2 if gate else 1) * width + 2 * stack.hidden) for width, chosen in networks)
    return middle, first


def attention(setting: Setting, stack: Stack, layer: int) -> float:
    """Return the bytes that a block keeps beside its network, of all tokens of a pass."""
    scales = layer not in stack.numbers or not setting.built.dense.feed_forward(layer, stack.name).response()
    of_token = beside_network(setting.built, stack, convnet_scales=scales)
    return setting.tokens(stack.name) * of_token * setting.width / BF16
