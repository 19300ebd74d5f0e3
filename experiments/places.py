"""The place of each variant among the series of figures: its colour, dash and marker, the same in all.

There are six colours: the remainder of a place says which, and the whole place gives dash and marker. So
variants of one figure need different remainders, and those of one experiment different places.
"""

from __future__ import annotations

COLOURS = 6

_BLUE, _RED, _GREEN, _PURPLE, _BROWN, _VIOLET = range(COLOURS)

PLACES = {
    "dense": _BLUE,  # alone
    "virtual_group": _RED,
    "shuffle_slice": _GREEN,
    "copy": _PURPLE,
    "drop_0.5": _BROWN,
    "scratch": _VIOLET,
    # Code.
    "copy_every_other": COLOURS + _VIOLET,
    "virtual_group_small_router": COLOURS + _GREEN,
    "virtual_group_warm": COLOURS + _PURPLE,
    "virtual_group_slow_router": COLOURS + _BROWN,
    "copy_4_experts": COLOURS + _RED,
    "copy_16_experts": 2 * COLOURS + _GREEN,
    "copy_32_experts": 2 * COLOURS + _BROWN,
    "drop_0.1": 2 * COLOURS + _RED,
    "drop_0.25": 3 * COLOURS + _GREEN,
    "drop_0.5_independent": 2 * COLOURS + _VIOLET,
    "dense_moments": 3 * COLOURS + _RED,
    "copy_moments": 4 * COLOURS + _GREEN,
    "copy_every_other_moments": 3 * COLOURS + _BROWN,
    "noise": 4 * COLOURS + _RED,
    "copy_top_1": 5 * COLOURS + _GREEN,
    "copy_softmax_first": 4 * COLOURS + _BROWN,
    "virtual_group_ungrouped": 2 * COLOURS + _PURPLE,
    "virtual_group_4": 3 * COLOURS + _VIOLET,
    "shuffle_slice_redrawn": 3 * COLOURS + _PURPLE,
    "virtual_group_every_other": 4 * COLOURS + _PURPLE,
    "shuffle_slice_every_other": 5 * COLOURS + _BROWN,
    # Vision and the encoder.
    "expert_choice_1": COLOURS + _PURPLE,
    "expert_choice_2": COLOURS + _VIOLET,
    # MoE Jetpack.
    "importance": COLOURS + _RED,
    "importance_repo": COLOURS + _GREEN,
    "large": COLOURS + _PURPLE,
    "small_of_all_flops": COLOURS + _BROWN,
}
