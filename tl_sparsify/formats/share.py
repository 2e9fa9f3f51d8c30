"""Sharing: a reduction with a card that says what it is, in a repository of a hub or a folder that stands for one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import pandas as pd

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.files import write_bytes, write_text
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.reduction import Reduction

_FILE, _CARD = "circuit.reduction", "README.md"


@checked
def card(
    reduction: Reduction,
    *,
    model: str,
    task: str,
    risk: Estimate | None = None,
    interval: Sequence[float] | None = None,
    controls: pd.DataFrame | Mapping[str, float] | None = None,
    repo: str = "OWNER/NAME",
    licence: str | None = None,
) -> str:
    """A README for a reduction: the model with its fingerprint, the task, the risk with its interval, controls, and how
    to load it. Tags in what is given are shown as text. No model pass.

    Args:
        model: where the model comes from, as a reader can load it.
        task: on what the circuit was found, in words or by name.
        risk: measured on held-out examples.
        interval: its ends, in nats; two standard errors on either side where not given.
        controls: what the risk is held against (a random circuit of this size, say): a table, or numbers by name.
        repo: the repository's name.
        licence: of the file, for the card's head.

    Raises:
        ValueError: an interval that is none or without a risk, a ``repo`` that is no ``owner/name``, a licence that is
            no identifier.

    Example:
        >>> text = tls.card(reduction, model="own", task="hierarchical_equality", controls={"random circuit": 0.9})
        >>> text.splitlines()[-1]
        '| random circuit | 0.9 |'
    """
    if interval is not None and (risk is None or len(interval) != 2 or not interval[0] <= interval[1]):
        raise ValueError(f"interval is {interval!r}; it has two ends, and needs the risk that lies between them")
    _check(repo)
    if licence is not None and not re.fullmatch(r"[\w.+-]+", licence):
        raise ValueError(f"licence is {licence!r}; it is an identifier such as 'mit' or 'apache-2.0'")
    head = ["---", "library_name: tl_sparsify", "tags: [mechanistic-interpretability, circuit]"]
    head += [f"license: {licence}"] if licence else []
    kept, units = len(reduction.circuit), reduction.units
    lines = [
        *head,
        "---",
        f"# A circuit for {_cell(task)}",
        "",
        f"{kept:,} of {len(units):,} units are kept: {units.describe(reduction.circuit.mask)}. The others are set to "
        f"constants ({_cell(reduction.kind)}).",
        "",
        "| | |",
        "|---|---|",
        f"| model | {_cell(model)} |",
        f"| its fingerprint | `{reduction.fingerprint}` |",
        f"| task | {_cell(task)} |",
    ]
    if risk is not None:
        low, high = interval or (risk.mean - 2 * risk.stderr, risk.mean + 2 * risk.stderr)
        what = "KL(original, circuit)" if risk.unit == "nats" else "risk"
        lines.append(f"| {what} | {risk.mean:.4g} {risk.unit}, {low:.4g} to {high:.4g} (n = {risk.n:,}) |")
    lines += [
        "",
        "## How to load it",
        "",
        "```python",
        "import tl_sparsify as tls",
        "",
        f'reduction = tls.pull("{repo}")',
        "with tls.intervened(model, tls.ablate(reduction)):  # or tls.fold(model, reduction): a smaller model",
        "    logits = model(tokens)",
        "```",
        "",
        "It is refused for a model with another fingerprint.",
    ]
    if controls is not None:
        table = controls
        if isinstance(table, Mapping):
            table = pd.DataFrame({"control": list(table), "value": list(table.values())})
        lines += ["", "## Controls", "", f"| {' | '.join(map(_cell, table.columns))} |"]
        lines += [f"|{'---|' * len(table.columns)}"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


@checked
def push(
    reduction: Reduction,
    repo: str,
    *,
    card: str,
    endpoint: str | Path | None = None,
    private: bool = True,
    token: str | None = None,
) -> str:
    """Put a reduction and its card into a repository of a hub, which is made where there is none, and return where.

    Args:
        repo: ``owner/name``.
        card: what :func:`card` wrote.
        endpoint: another hub's address, or a folder that stands for a hub; Hugging Face's where not given.
        private: whether a new repository is.
        token: where ``huggingface_hub`` does not have one.

    Raises:
        ValueError: a name without an owner.

    Example:
        >>> text = tls.card(reduction, model="own", task="hierarchical_equality")
        >>> tls.push(reduction, "me/equality", card=text, endpoint="hub")
        'hub/me/equality'
    """
    _check(repo)
    with TemporaryDirectory() as folder:
        reduction.save(Path(folder) / _FILE)
        write_text(Path(folder) / _CARD, card + "\n")
        if _is_folder(endpoint):
            target = Path(str(endpoint)) / repo
            target.mkdir(parents=True, exist_ok=True)
            for name in (_FILE, _CARD):
                write_bytes(target / name, (Path(folder) / name).read_bytes())
            return str(target)
        hub = huggingface_hub.HfApi(endpoint=None if endpoint is None else str(endpoint), token=token)
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="A circuit")
        return f"{hub.endpoint}/{repo}"


@checked
def pull(
    repo: str, *, endpoint: str | Path | None = None, revision: str | None = None, token: str | None = None
) -> Reduction:
    """The reduction in a repository of a hub, by name, as :func:`push` put it there.

    Args:
        repo: ``owner/name``.
        endpoint: as in :func:`push`.
        revision: a branch or commit, of a hub that is no folder.
        token: where ``huggingface_hub`` does not have one.

    Raises:
        FileNotFoundError: no such repository in the folder.
        ValueError: a name without an owner, a file that is damaged.

    Example:
        >>> _ = tls.push(reduction, "me/equality", card="", endpoint="hub")
        >>> tls.pull("me/equality", endpoint="hub") == reduction
        True
    """
    _check(repo)
    if _is_folder(endpoint):
        return Reduction.load(Path(str(endpoint)) / repo / _FILE)
    settings: dict[str, Any] = {"revision": revision, "token": token}
    settings["endpoint"] = None if endpoint is None else str(endpoint)
    return Reduction.load(huggingface_hub.hf_hub_download(repo, _FILE, **settings))


def _is_folder(endpoint: str | Path | None) -> bool:
    return endpoint is not None and "://" not in str(endpoint)


def _check(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or {".", ".."} & set(repo.split("/")):
        raise ValueError(f"repo is {repo!r}; it is owner/name")


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(" ".join(text.split("\n")), quote=False).replace("|", "\\|")
