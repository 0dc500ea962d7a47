"""Sentence embeddings of prompts, kept on disk by the content of each text."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


class SentenceEmbedder:
    """Unit-norm embeddings by an encoder, pooled as sentence-transformers does.

    Last hidden states are averaged, or that of the first token is taken, as `1_Pooling/config.json` of the model says;
    averaged where it has none.

    Args:
        model: a name on the hub or a folder that `AutoModel` and `AutoTokenizer` read, such as
            `"sentence-transformers/all-MiniLM-L6-v2"`.
        device: where it computes.
        max_length: tokens of a text beyond which it is cut; by default `max_seq_length` of its
            `sentence_bert_config.json`, or else what the model allows, at most 512.
        batch_size: texts in a batch.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> None:
        self.name, self.batch_size = str(model), batch_size
        self.device, self.max_length = torch.device(device), max_length
        self._loaded: tuple[nn.Module, Callable] | None = None

    @property
    def key(self) -> str:
        """What marks its embeddings in a cache: the name, and what a folder holds now."""
        files = sorted(Path(self.name).rglob("*")) if Path(self.name).is_dir() else []
        state = [(str(f.relative_to(self.name)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        return f"{self.name} {self.max_length} {state}"

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings, float32 [texts, dimensions], on the CPU."""
        model, tokenizer = self._loaded = self._loaded or self._load()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        result: torch.Tensor | None = None
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
            ).to(self.device)
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            # the first token that is no padding, whichever side that is on
            place = torch.arange(len(hidden)), inputs["attention_mask"].argmax(1)
            pooled = (hidden * mask).sum(1) / mask.sum(1) if self._pooling == "mean" else hidden[place]
            vectors = nn.functional.normalize(pooled, dim=1).cpu()
            if result is None:
                result = torch.empty(len(texts), vectors.shape[1])
            result[torch.tensor(rows)] = vectors
        return torch.empty(0, model.config.hidden_size) if result is None else result

    def _load(self) -> tuple[nn.Module, Callable]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name)
        model = AutoModel.from_pretrained(self.name).to(self.device).eval()
        self._pooling = _pooling(self.name)
        own = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
        self._limit = (
            self.max_length or _described(self.name, "sentence_bert_config.json").get("max_seq_length") or own
        )
        return model, tokenizer


def _pooling(name: str) -> str:
    """How a model's hidden states become one vector: `"mean"` or `"cls"`.

    Raises:
        ValueError: another way, or a layer after it.
    """
    modules = _described(name, "modules.json") or []
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(f"{name} has a layer {kind} after the encoder: give a callable, such as model.encode.")
    about = _described(name, "1_Pooling/config.json")
    asked = [key.removeprefix("pooling_mode_") for key, on in about.items() if key.startswith("pooling_mode_") and on]
    if asked in ([], ["mean_tokens"], ["mean"]):
        return "mean"
    if asked in (["cls_token"], ["cls"]):
        return "cls"
    raise ValueError(f"{name} pools by {' and '.join(asked)}: give a callable, such as model.encode.")


def _described(name: str, file: str) -> Any:
    """A JSON file of a model; an empty dict if it has none."""
    from transformers.utils import cached_file

    path = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def embed(
    texts: Sequence[str],
    embedder: str | os.PathLike[str] | Callable[[Sequence[str]], torch.Tensor],
    cache: str | os.PathLike[str] | None = None,
    key: str | None = None,
    chunk: int = 1024,
) -> torch.Tensor:
    """Embeddings of texts, from a cache on disk where it has them.

    The cache holds files of some texts each, in a folder of the embedder's own, under the SHA-256 of every text. A
    file is written aside and renamed, so a run that is cut off leaves whole files, and the next one goes on there.

    Args:
        texts: any strings; equal ones are embedded once.
        embedder: a name or folder for `SentenceEmbedder`, or a callable that gives [texts, dimensions].
        cache: the folder; None for no cache.
        key: what marks the embedder in the cache; by default its attribute `key`, as `SentenceEmbedder` has one.
        chunk: texts in a file.

    Returns:
        float32, [texts, dimensions].

    Raises:
        ValueError: a cache without a key; the embedder gives NaN, infinity, another shape, or another size than the
            cache holds; a damaged file.
    """
    if not callable(embedder) and not isinstance(embedder, (str, os.PathLike)):
        raise TypeError(f"embedder must be a name, a folder or a callable, got {type(embedder).__name__}.")
    function = embedder if callable(embedder) else SentenceEmbedder(embedder)
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
    found: dict[str, torch.Tensor] = {}
    folder: Path | None = None
    if cache is not None:
        name = key or getattr(function, "key", None)
        if not isinstance(name, str):
            raise ValueError(
                "embedder is a callable without a name: give key, or the callable an attribute `key`, which marks its "
                "embeddings in a cache."
            )
        folder = Path(cache) / hashlib.sha256(name.encode()).hexdigest()[:24]
        found = _read(folder, set(digests))
    size = next(iter(found.values())).numel() if found else None
    missing = list({digest: text for digest, text in zip(digests, texts) if digest not in found}.items())
    for start in range(0, len(missing), chunk):
        part = missing[start : start + chunk]
        vectors = _checked(function([text for _, text in part]), [text for _, text in part])
        if size is not None and vectors.shape[1] != size:
            where = f"those in the cache {folder} have {size}" if folder is not None else f"the first ones had {size}"
            raise ValueError(
                f"embedder gives {vectors.shape[1]} dimensions, but {where}: give another cache folder or key, or the "
                "embedder that made it."
            )
        size = vectors.shape[1]
        new = {digest: vector for (digest, _), vector in zip(part, vectors)}
        found |= new
        if folder is not None:
            _write(folder, new)
    if not texts:
        return torch.empty(0, 0)
    return torch.stack([found[digest] for digest in digests])


def default_cache() -> Path | None:
    """`embeddings` in `$HF_GG_CACHE`, `$XDG_CACHE_HOME/hf_gg` or `~/.cache/hf_gg`; None where none can be made."""
    asked = os.environ.get("HF_GG_CACHE")
    try:
        base = Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_gg"
        (base / "embeddings").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return None
    return base / "embeddings"


def _checked(vectors: object, texts: Sequence[str]) -> torch.Tensor:
    try:
        if isinstance(vectors, (list, tuple)) and vectors and isinstance(vectors[0], torch.Tensor):
            vectors = torch.stack(tuple(vectors))
        tensor = torch.as_tensor(vectors).detach().cpu().float()  # NumPy's arrays too
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(vectors).__name__
        raise ValueError(f"embedder must give [{len(texts)}, dimensions], got {got}: {error}.") from error
    if tensor.ndim != 2 or len(tensor) != len(texts) or not tensor.shape[1]:
        raise ValueError(f"embedder must give [{len(texts)}, dimensions] for as many texts, got {[*tensor.shape]}.")
    finite = tensor.isfinite().all(1)
    if not bool(finite.all()):
        text = texts[int((~finite).nonzero()[0])]
        raise ValueError(f"embedder gives NaN or infinity for the text {text[:80]!r}: leave that sample out.")
    return tensor


def _read(folder: Path, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The wanted embeddings of a cache."""
    found: dict[str, torch.Tensor] = {}
    size = None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                texts = about.get("texts", "").split()
                if not wanted.intersection(texts):
                    continue
                vectors = file.get_tensor("embeddings")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, its texts are then embedded again.") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or vectors.dtype != torch.float32:
            raise ValueError(f"{path} is damaged: {[*vectors.shape]} {vectors.dtype}, {len(texts)} texts. Remove it.")
        if size is not None and vectors.shape[1] != size:
            raise ValueError(f"{path} holds {vectors.shape[1]} dimensions, other files {size}: remove it.")
        if about.get("sha256") != _digest(vectors):
            raise ValueError(f"{path} is damaged: its checksum does not fit. Remove it.")
        size = vectors.shape[1]
        found |= {text: vectors[row] for row, text in enumerate(texts) if text in wanted}
    return found


def _digest(vectors: torch.Tensor) -> str:
    return hashlib.sha256(vectors.numpy().tobytes()).hexdigest()


def _write(folder: Path, vectors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(" ".join(vectors).encode()).hexdigest()[:24]
    handle, aside = tempfile.mkstemp(prefix=".new-", dir=folder)
    os.close(handle)
    try:
        tensor = torch.stack([*vectors.values()])
        save_file({"embeddings": tensor}, aside, metadata={"texts": " ".join(vectors), "sha256": _digest(tensor)})
        os.replace(aside, folder / f"{name}.safetensors")
    finally:
        Path(aside).unlink(missing_ok=True)
