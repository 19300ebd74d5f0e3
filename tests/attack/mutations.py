"""Damage to files: bytes to bytes, of whatever a random generator draws."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable

from damage import spoil

Mutation = Callable[[random.Random, bytes], bytes]

ODD_BYTES = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\x1b[31m", b"[", b"{", b'"', b"[" * 2000,
    b"9" * 5000,
    b"NaN", b"1e999", b"\xed\xa0\x80", b"\xff" * 8, b"\0" * 8, b"../", b"/etc/passwd",
)  # fmt: skip
ODD_TOML = (
    "1", "-1", "0", "1e400", "nan", "inf", "-inf", "''", '"x"', "[]", "{}", "true", "false", "[[1]]",
    "{a = 1}",
    "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", str(2**63), str(2**70), "9" * 5000, '"a\\u0000b"',
    '"\\u001b[31m"', '"all"', "[0]", "[1, 3]", "[-1]", '"../x"', "0.5", "100000", "65536", "1e-320",
)  # fmt: skip


def any_bytes(draw: random.Random, raw: bytes) -> bytes:
    """One to four bits, stretches or marks changed, taken out, doubled or put in; or the end cut off."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(raw) + 1)
        length = draw.choice((1, 1, 2, 8, 64, draw.randrange(len(raw) + 1)))
        part = raw[at : at + length]
        raw = draw.choice(
            (
                raw[:at] + bytes(b ^ 1 << draw.randrange(8) for b in part[:1]) + raw[at + 1 :],
                raw[:at] + draw.randbytes(len(part[:64])) + raw[at + len(part[:64]) :],
                raw[:at] + raw[at + length :],
                raw[:at] + part + raw[at:],
                raw[:at] + draw.choice(ODD_BYTES) + raw[at + draw.choice((0, 1, length)) :],
                raw[:at],
            )
        )
    return raw


def any_json(draw: random.Random, raw: bytes) -> bytes:
    """A JSON value with a part replaced, a key renamed, or its text damaged."""
    if draw.random() < 0.25:
        return any_bytes(draw, raw)
    try:
        value = json.loads(raw)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            value = _renamed(draw, value) if draw.random() < 0.15 else spoil(draw, value)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return any_bytes(draw, raw)


def _renamed(draw: random.Random, value: object) -> object:
    """A value with a key of one of its tables changed, or gone."""
    if isinstance(value, list) and value:
        place = draw.randrange(len(value))
        return [*value[:place], _renamed(draw, value[place]), *value[place + 1 :]]
    if not isinstance(value, dict) or not value:
        return value
    key = draw.choice([*value])
    if isinstance(value[key], (dict, list)) and draw.random() < 0.7:
        return {**value, key: _renamed(draw, value[key])}
    other = draw.choice((None, "", "x", "\x00", "\x1b", "\ud800", key + ".x", key.upper(), key[:-1]))
    rest = {k: v for k, v in value.items() if k != key}
    return rest if other is None else {**rest, other: value[key]}


def any_lines(draw: random.Random, raw: bytes) -> bytes:
    """JSON lines with one damaged, doubled, moved or gone."""
    lines = raw.splitlines(keepends=True)
    if not lines or draw.random() < 0.25:
        return any_bytes(draw, raw)
    place = draw.randrange(len(lines))
    line = lines[place]
    if draw.random() < 0.8:
        lines[place] = any_json(draw, line.rstrip(b"\n")) + b"\n"
    else:
        del lines[place]
        for _ in range(draw.randrange(3)):
            lines.insert(draw.randrange(len(lines) + 1), line)
    return b"".join(lines)


def any_toml(draw: random.Random, raw: bytes) -> bytes:
    """A table with a value replaced, a key renamed, moved or gone, or its text damaged."""
    if draw.random() < 0.2:
        return any_bytes(draw, raw)
    lines = raw.decode().split("\n")
    for _ in range(draw.choice((1, 1, 2, 3))):
        place = draw.randrange(len(lines))
        key, equals, value = lines[place].partition("=")
        found = draw.choice(("value", "value", "value", "value", "key", "move", "gone", "double", "section"))
        if found == "value" and equals:
            lines[place] = f"{key}= {draw.choice(ODD_TOML)}"
        elif found == "key" and equals:
            lines[place] = f"{draw.choice((key[:-2], key + '.x', 'name', 'depth', 'base', 'x'))} ={value}"
        elif found in ("move", "gone", "double") and len(lines) > 1:
            line = lines[place] if found == "double" else lines.pop(place)
            if found != "gone":
                lines.insert(draw.randrange(len(lines) + 1), line)
        elif found == "section":
            lines.insert(place, draw.choice(("[moe]", "[x]", "[[moe]]", "[init.name]", "[decoder.moe]")))
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def any_setting(draw: random.Random, raw: bytes) -> bytes:
    """KEY=VALUE with either replaced, or its text damaged."""
    key, _, value = raw.decode().partition("=")
    if draw.random() < 0.3:
        return any_bytes(draw, raw)
    if draw.random() < 0.3:
        key = draw.choice((key + ".x", key.rpartition(".")[0], "", "x", key.upper(), ".".join([key] * 60)))
    if draw.random() < 0.8:
        value = draw.choice((*ODD_TOML, "[" * 3000, "x y", "a=b", ",", "'"))
    return f"{key}={value}".encode()


def any_tensors(draw: random.Random, raw: bytes) -> bytes:
    """A safetensors file with its header, its length or its data damaged."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    kind = draw.random()
    if kind < 0.1:
        return any_bytes(draw, raw[:8]) + header + data
    if kind < 0.2:
        return raw[: 8 + length] + any_bytes(draw, data)
    if kind < 0.3:
        odd = draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(raw)))
        return struct.pack("<Q", odd) + header + data
    header = any_numbers(draw, header) if kind < 0.5 else any_json(draw, header)
    return struct.pack("<Q", len(header)) + header + data


def any_numbers(draw: random.Random, raw: bytes) -> bytes:
    """Text with one of its whole numbers changed."""
    found = [*re.finditer(rb"\d+", raw)]
    if not found:
        return any_bytes(draw, raw)
    match = draw.choice(found)
    n = int(match.group()[:18])
    other = draw.choice((0, 1, -1, n + 1, n * 2, 2**31, 2**63, 2**64, 10**30))
    return raw[: match.start()] + str(other).encode() + raw[match.end() :]
