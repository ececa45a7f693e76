"""A repository of the Hugging Face hub, as a folder: from the local cache, or fetched."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from clip_lens_ext.errors import LoadError
from clip_lens_ext.towers import from_hugging_face, from_open_clip

_EXTRAS = (
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "spiece.model", "added_tokens.json",
)  # fmt: skip
_INDEX = "model.safetensors.index.json"


def fetch(repo: str, *, open_clip_first: bool) -> tuple[Path, str]:
    """The folder of a repository with everything that a model needs, and its config's name.

    Args:
        repo: `"org/name"`.
        open_clip_first: prefer `open_clip_config.json` where the repository has the configs of both libraries.

    Raises:
        LoadError: the repository has no config or weights, or is neither cached nor reachable. It lists what was tried.
    """
    configs = [from_hugging_face.CONFIG, from_open_clip.CONFIG]
    tried: list[str] = []
    for config in reversed(configs) if open_clip_first else configs:
        found = _get(repo, config, tried)
        if found is None:
            continue
        weights = (
            from_open_clip.WEIGHTS
            if config == from_open_clip.CONFIG
            else (_INDEX, "model.safetensors", "pytorch_model.bin")
        )
        path = next(filter(None, (_get(repo, name, tried) for name in weights)), None)
        if path is None:
            continue
        if path.name == _INDEX:
            for shard in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
                _get(repo, shard, tried)
        for name in _EXTRAS:
            _get(repo, name, [])
        return found.parent, config
    raise LoadError(
        f"no model could be had from the hub repository {repo!r}. Tried:\n  " + "\n  ".join(tried) + "\n"
        f"Offline, fetch it once where there is a network (hf download {repo}); a folder or a weight file on disk is "
        "passed by its path"
    )


def _get(repo: str, name: str, tried: list[str]) -> Path | None:
    """One file, or None with a note of why not."""
    try:
        return Path(hf_hub_download(repo, name))
    except LocalEntryNotFoundError:
        tried.append(f"{name}: not in the local cache, and the hub cannot be reached")
    except EntryNotFoundError:
        tried.append(f"{name}: the repository has no such file")
    except (HfHubHTTPError, OSError, ValueError) as error:
        tried.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return None
