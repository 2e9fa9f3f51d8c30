"""Language models: loaded by name or folder with their tokenizer, or the tokenizer alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformer_lens import TransformerBridge
from transformers import AutoConfig, AutoTokenizer

from tl_sparsify.core.prompts import adds_beginning
from tl_sparsify.tasks.real_models import located, without_bars


def load_language_model(source: Any, *, device: str = "cpu") -> Any:
    """A causal language model with its tokenizer, in evaluation mode.

    Args:
        source: a Hugging Face name (``gpt2``), a folder in Hugging Face format, a model that ``tl-sparsify fetch`` has
            fetched (``smollm2``), or a bridge, which is given back.

    Raises:
        ValueError: a folder without its parts, a name that cannot be loaded, a model that has no tokenizer.

    Example:
        >>> tls.heads(tls.text.load_language_model(tls.task.own_language_model()))
        Units(24: 24 heads)
    """
    if not isinstance(source, str | Path):
        if getattr(source, "tokenizer", None) is None:
            raise ValueError(
                f"model is of type {type(source).__name__}, without a tokenizer: give one that has it as source"
            )
        return source
    source = _checked(source)
    with _explained(source), torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        return TransformerBridge.boot_transformers(str(source), device=device).eval()


def load_tokenizer(source: Any) -> Any:
    """The tokenizer of what :func:`load_language_model` takes; the model is not loaded.

    Raises:
        ValueError: as there.

    Example:
        >>> tokenizer = tls.text.load_tokenizer(tls.task.own_language_model())
        >>> len(tokenizer("First cut the").input_ids) >= 3
        True
    """
    if not isinstance(source, str | Path):
        return load_language_model(source).tokenizer
    source = _checked(source)
    with _explained(source):
        return AutoTokenizer.from_pretrained(str(source))


def load_sizes(source: str | Path) -> SimpleNamespace:
    """Context and vocabulary of what :func:`load_language_model` takes, as a bridge's ``cfg`` has them (``n_ctx``,
    ``d_vocab``); the model is not loaded.

    Raises:
        ValueError: as there.
    """
    with _explained(source):
        config = AutoConfig.from_pretrained(str(located(source))).get_text_config()
    return SimpleNamespace(n_ctx=getattr(config, "max_position_embeddings", None), d_vocab=config.vocab_size)


def begins(source: Any, tokenizer: Any) -> bool:
    """Whether the tokenizer of ``source`` puts the beginning-of-sequence token first by itself; where its files are not
    at hand, whether there is such a token."""
    has = tokenizer.bos_token_id is not None
    # TransformerLens gives a bridge a tokenizer that always puts the token first: the one it was made of is asked
    named = isinstance(source, str | Path)
    origin = source if named else getattr(tokenizer, "name_or_path", "")
    if not origin or not has:
        return has
    try:
        return adds_beginning(tokenizer if named else load_tokenizer(origin))
    except ValueError:  # a bridge whose files are gone
        return has


def _checked(source: str | Path) -> str | Path:
    """Where the model is."""
    source = located(source)
    folder = Path(source)
    if not folder.is_dir():
        if str(source).startswith((".", "/", "~")):
            raise ValueError(f"there is no folder {folder}: give one in Hugging Face format, or a name")
        return source
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give a folder in Hugging Face format, or a name")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{folder} has no tokenizer.json: save the tokenizer there too (tokenizer.save_pretrained)")
    return source


@contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    """Errors of loading in one sentence, and no bar of the weights."""
    try:
        with without_bars():
            yield
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the language model {str(source)!r} cannot be loaded: {reason}") from error
