"""What tests of files need: a tokenizer to save, a process that loads, a disk that is full."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def word_tokenizer(path: Path) -> Any:
    words = {word: i for i, word in enumerate(["<s>", "</s>", *"abcdefghijklmno"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(str(path))
    return AutoTokenizer.from_pretrained(str(path))


LOAD = """
import sys, torch
from safetensors.torch import save_file
from tl_sparsify.folding.bridge import load_folded
torch.set_num_threads(int(sys.argv[2]))
tokens = torch.tensor(eval(sys.argv[1]))
for path in sys.argv[3:]:
    save_file({"logits": load_folded(path)(tokens).detach()}, path + "/logits")
"""


@contextmanager
def full_disk(room: int = 4096) -> Iterator[None]:
    """No file can grow past ``room`` bytes here: writing fails as on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
