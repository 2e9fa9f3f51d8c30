"""Path patching: what one path from a writer to a reader carries, measured.

Along an edge ``L0H1->L2H3.q`` the reader takes in what the writer wrote in another run, ``x[r] -> x[r] - w_u + w_u'``,
and nothing else is touched: every other reader hears ``w_u``. The reader's norm and projection are worked out from
there, and the model goes on from what it then computes (Wang et al., arXiv 2211.00593; Goldowsky-Dill et al., arXiv
2304.05969). Along a chain ``L0H1->L1H2.v->L2H3.q`` the last reader takes in what ``L1H2`` writes when only its value
hears the other run's ``L0H1``.

An effect is that of this path in this run. Effects of several paths need not sum to that of all together.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.comparison.edge_attribution import Direction, Run, runs
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.edges import Readers, edges
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, run_values, shared_batches
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.metrics import Metric, by_example, kl, log_odds, measured_by
from tl_sparsify.core.moments import Estimate, Moments
from tl_sparsify.core.site import Positions
from tl_sparsify.core.units import Model, Units

_Chain = tuple[tuple[int, ...], ...]
"""The edges of a path, in order; several at one step where a head is named as a whole (its query, key and value)."""

_HEAD = re.compile(r"L\d+H\d+(\.[kv])?")
_GROUP = re.compile(r"->L\d+G\d+")


@dataclass(frozen=True, eq=False)
class PathEffects:
    """By how much each path changes the answer.

    Attributes:
        paths: their names; of what was patched together, joined by `` + ``.
        moments: of the change over examples, ``[paths]``.
        measured_in: ``units of the metric`` (patched minus not patched), or ``nats``.
        forward_passes: over the data.

    Example:
        >>> found = tls.patch_paths(model, test, ["embed->L0H0.q"], progress=False)
        >>> found.to_frame().columns.tolist()
        ['path', 'effect', 'stderr', 'low', 'high', 'n']
    """

    paths: tuple[str, ...]
    moments: Moments
    measured_in: str
    forward_passes: int

    def __getitem__(self, path: str) -> Estimate:
        """One path's effect.

        Raises:
            KeyError: a path that was not patched.
        """
        if path not in self.paths:
            raise KeyError(f"{path!r} is none of the {len(self.paths)} paths, the first of which is {self.paths[0]!r}")
        number = self.paths.index(path)
        unit = "nats" if self.measured_in == "nats" else ""
        entry = (part[number] for part in (self.moments.count, self.moments.mean, self.moments.spread))
        return Estimate.of(Moments(*entry), unit)

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """One row a path: ``path, effect, stderr, low, high, n``; the normal interval for the mean over examples.

        Raises:
            ValueError: a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; it lies between 0 and 1")
        effect, stderr = self.moments.mean.cpu().numpy(), self.moments.stderr.cpu().numpy()
        reach = NormalDist().inv_cdf((1 + level) / 2) * stderr
        ends = {"low": effect - reach, "high": effect + reach, "n": self.moments.count.cpu().long().numpy()}
        return pd.DataFrame({"path": self.paths, "effect": effect, "stderr": stderr} | ends)

    def __repr__(self) -> str:
        largest = self.paths[int(self.moments.mean.abs().argmax())]
        return f"PathEffects({len(self.paths):,} paths, {self.measured_in}: largest {largest}, {self[largest]})"


@checked
def patch_paths(
    model: Model,
    examples: Examples,
    paths: Sequence[str | Sequence[str]],
    *,
    readers: Readers = "qkv",
    grouped: bool = True,
    positions: Positions = None,
    source: Run | None = None,
    direction: Direction = "noising",
    metric: Metric | None = log_odds,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> PathEffects:
    """How the answer changes when the last reader of each path takes in what the path carries in another run, all else
    being this run's (path patching; arXiv 2211.00593, 2304.05969).

    Args:
        paths: each an edge (``L0H1->L2H3.q``, ``embed->L0MLP``, ``L1H2->logits``; ``L0H1->L2H3`` is into its query, key
            and value), a chain of them (``L0H1->L1H2.v->logits``), or several that are patched together. Between the
            readers of several, what the first then writes flows on to the next.
        readers: as in :func:`edges`; with ``head`` and ``layer`` readers have no parts: ``L0H1->L2ATTN``.
        grouped: as in :func:`edges`: whether heads that share keys and values share a reader, ``L1G0.k``.
        positions: where the last reader hears the other run; at all where not given. Along a chain the readers before
            it hear it everywhere.
        source: the other run: where not given the counterfactual if the examples have one, else another example.
        direction: ``noising``: this run is the clean one, the other the corrupted. ``denoising``: the other way
            round, with the clean one's right answers.
        metric: its change, patched minus not patched, positive where the metric rises. ``None``: KL(not patched ||
            patched) of the answer, in nats.

    Two forward passes over the data and one for each path; a chain takes one for each of its edges, but those that
    others begin with as well are run once. Memory: what every writer writes in one batch, once more for each edge
    before the last of the paths that are patched together, and a number for each path and example.

    Raises:
        ValueError: no path; an edge that the model does not have, or a chain through a reader that is no writer;
            what :func:`edges` refuses; an unknown ``source`` or ``direction``, or one that the examples do not have.

    Example:
        >>> found = tls.patch_paths(model, test, ["L0H1->L1H2.v", "L0H1->L1H2.v->logits"], progress=False)
        >>> found.forward_passes, found["L0H1->L1H2.v"].n
        (5, 64)
    """
    units = edges(model, readers, grouped=grouped)
    check_call(model, examples, units.at(positions), seed=seed, batch_size=batch_size)
    together = [_given(path) for path in paths]
    if not together:
        raise ValueError("paths is empty: give edges, ['L0H1->L1H2.q'], or chains of them")
    index = {name: number for number, name in enumerate(units.names)}
    wanted = [_chains(names, index) for names in together]
    order = sorted(range(len(wanted)), key=lambda path: _ways(wanted[path]))  # those that begin alike in turn
    batches = list(shared_batches(model, examples, batch_size, units))

    def parts() -> Iterator[Moments]:
        for number, (rows, _) in enumerate(batches):
            near, far = runs(examples, rows, source, direction, seed)
            here = units.at(positions).for_examples(rows, examples.spans)
            other = _writes(model, far, units)
            before = answer_logits(model, near)
            found: dict[int, Float[Tensor, "batch"]] = {}
            writes: dict[_Chain, Float[Tensor, "batch pos writers d_model"]] = {}
            for path in bar(order, f"patching paths, batch {number + 1} of {len(batches)}", progress):
                writes = _carried(model, near, units, _ways(wanted[path]), writes, other)
                with intervened(model, *_patches(here, wanted[path], writes)):
                    after = answer_logits(model, near)
                found[path] = by_example(_change(before, after, near, metric), near)
            yield Moments.of(torch.stack([found[path] for path in range(len(wanted))], 1))

    with torch.no_grad():
        moments = Moments.over(parts(), len(examples))
    ways = [set[_Chain](), *(set(_ways(wanted[path])) for path in order)]
    passes = 2 + sum(1 + len(here - before - {()}) for before, here in pairwise(ways))
    names = tuple(" + ".join(path) for path in together)
    return PathEffects(names, moments, "nats" if metric is None else "units of the metric", passes)


def _given(path: str | Sequence[str]) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else tuple(path)


def _chains(names: tuple[str, ...], index: dict[str, int]) -> tuple[_Chain, ...]:
    """The paths that are patched together, each as its edges.

    Raises:
        ValueError: none, an edge that is not among them, or one that ends two paths.
    """
    chains = tuple(_chain(name, index) for name in names)
    last = [edge for chain in chains for edge in chain[-1]]
    if not chains or len(set(last)) < len(last):
        raise ValueError(f"paths holds {names}: what is patched together needs paths, each with a last edge of its own")
    return chains


def _chain(path: str, index: dict[str, int]) -> _Chain:
    nodes = path.split("->")
    if len(nodes) < 2 or not all(nodes) or "." in nodes[0]:
        raise ValueError(
            f"paths holds {path!r}: a path is written L0H1->L2H3.q, or L0H1->L1H2.v->logits, and begins with what "
            "writes: embed, a head or an MLP"
        )
    steps: list[tuple[int, ...]] = []
    for sender, receiver in pairwise(nodes):
        name = f"{sender.partition('.')[0]}->{receiver}"
        parts = [f"{name}.{part}" for part in "qkv"]
        if name in index:
            steps.append((index[name],))
        elif all(part in index for part in parts):
            steps.append(tuple(index[part] for part in parts))
        else:
            close = difflib.get_close_matches(name, index, 1)
            mend = f"; did you mean {close[0]!r}?" if close else ""
            if _HEAD.fullmatch(receiver) and any(_GROUP.search(edge) for edge in index):
                mend = ": heads share keys and values here, so name their group, as in L1G0.k, or give grouped=False"
            raise ValueError(f"paths holds {path!r}, and the model has no edge {name!r} (tls.edges(model).names){mend}")
    return tuple(steps)


def _writes(model: Model, batch: Examples, units: Units) -> Float[Tensor, "batch pos writers d_model"]:
    """What every writer writes. One forward pass."""
    return run_values(model, batch, Units(units.sites[-1:])).tensors[0]


def _patch(units: Units, edges_: Sequence[int], writes: Float[Tensor, "batch pos writers d_model"]) -> Intervention:
    """These edges carry ``writes``. Every reader's writers are a beginning of all of them."""
    keep = torch.ones(len(units))
    keep[list(edges_)] = 0
    return Intervention(units, keep, Values(units, tuple(writes[:, :, : site.rows] for site in units.sites)))


def _ways(chains: tuple[_Chain, ...]) -> list[_Chain]:
    """The ways to the chains' last edges, and to every edge before them, the shorter first."""
    found = {chain[:length] for chain in chains for length in range(len(chain))}
    return sorted(found, key=lambda way: (len(way), way))


def _carried(
    model: Model,
    batch: Examples,
    units: Units,
    ways: list[_Chain],
    known: dict[_Chain, Float[Tensor, "batch pos writers d_model"]],
    other: Float[Tensor, "batch pos writers d_model"],
) -> dict[_Chain, Float[Tensor, "batch pos writers d_model"]]:
    """What every writer writes at the end of each way, at that of none in the other run. A forward pass for each that
    is not ``known``."""
    found: dict[_Chain, Float[Tensor, "batch pos writers d_model"]] = {(): other}
    for way in ways:
        if way in known:
            found[way] = known[way]
        elif way:
            with intervened(model, _patch(units, way[-1], found[way[:-1]])):
                found[way] = _writes(model, batch, units)
    return found


def _patches(
    here: Units, chains: tuple[_Chain, ...], writes: dict[_Chain, Float[Tensor, "batch pos writers d_model"]]
) -> list[Intervention]:
    """The last edges of the chains, with what they carry; ``here`` are the units at positions."""
    carried: dict[_Chain, list[int]] = defaultdict(list)  # last edges by the way to them: one intervention for each
    for chain in chains:
        carried[chain[:-1]] += chain[-1]
    return [_patch(here, last, writes[way]) for way, last in carried.items()]


def _change(
    before: Float[Tensor, "rows choices"],
    after: Float[Tensor, "rows choices"],
    batch: Examples,
    metric: Metric | None,
) -> Float[Tensor, "rows"]:
    if metric is None:
        return kl(before, after)
    return measured_by(metric, after, batch) - measured_by(metric, before, batch)
