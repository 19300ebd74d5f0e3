"""SOURCE as a person gives it: a local folder, or a hub id with an optional revision (owner/name@rev)."""

from __future__ import annotations

import re
from pathlib import Path

from upcycle.errors import UpcycleError

_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
CARRIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.tiktoken", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def resolve(source: str | Path) -> Path:
    """The folder of `source`, downloaded to the hub's cache if it is a hub id."""
    path = Path(source)
    if path.exists() or not _ID.fullmatch(str(source)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo, _, revision = str(source).partition("@")
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *CARRIED]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise UpcycleError(
            f"{source}: no such folder, and no such model on the hub (or it is gated: accept its terms "
            f"and run `hf auth login`)"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UpcycleError(f"{source}: no such folder, and the hub cannot be reached ({reason})") from None
