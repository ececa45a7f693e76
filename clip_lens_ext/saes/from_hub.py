"""An SAE in a repository of the Hugging Face hub, as a folder or file on this disk."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from clip_lens_ext.errors import LoadError

HUB = "hf-hub:"


def is_hub_name(source: str) -> bool:
    """Whether a string names a repository: `hf-hub:org/name`, or `org/name` where no such path is on this disk."""
    if source.startswith(HUB):
        return True
    plain = not source.startswith((".", "/", "~")) and source.count("/") >= 1 and "\\" not in source
    return plain and not Path(source).exists() and not Path(source).parent.exists()


def fetch(source: str, *, force_download: bool = False) -> Path:
    """The path of `org/name[/folder or file]`, from the local cache or fetched: that folder and no more.

    Raises:
        LoadError: the repository is neither cached nor reachable, or has no such folder or file.
    """
    parts = source.removeprefix(HUB).strip("/").split("/")
    if len(parts) < 2 or not all(parts[:2]):
        raise LoadError(f"{source!r} names no hub repository: it is 'hf-hub:org/name', with a folder after it or none")
    repo, inner = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [inner, f"{inner}/*", f"{inner}/**"] if inner else None
    try:
        root = Path(snapshot_download(repo, allow_patterns=patterns, force_download=force_download))
    except Exception as error:  # the hub's client has many of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadError(
            f"the hub repository {repo!r} is neither in the local cache nor could it be fetched: "
            f"{type(error).__name__}: {first}\nFetch it once where there is a network (hf download {repo}), or pass "
            "the path of a file or folder"
        ) from error
    path = root / inner if inner else root
    if not path.exists():
        listed = sorted(str(entry.relative_to(root)) for entry in root.rglob("*") if entry.is_dir())[:12]
        raise LoadError(f"{repo!r} has no {inner!r}; folders that are here: {', '.join(listed) or 'none'}")
    return path
