"""Backward passes other than the true one: what is computed stays the same bit for bit, gradients do not.

A first-order effect is wrong where the model is far from a line: softmax saturates, norms undo what is taken away,
activation functions are flat. These rules replace the derivative there by one that says more about a removal. They are
heuristics: whether they find better circuits is measured (``benchmarks/backward_modes.py``), not known.

======================  ==========================================  =================================================
place                   true gradient                               rule
======================  ==========================================  =================================================
``norms``               of the whole norm                           ``frozen``: its scale is a constant
``softmax``             at temperature 1                            at this temperature, without the factor ``1 / T``
``patterns``            of attention's softmax                      ``frozen``: the pattern is a constant
``products``            of a product, to both factors in full       ``halved``: half to each that gets one
``activations``         ``act'(x)``                                 ``proportional``: ``act(x) / x``
``without``             through every block                         not through these blocks' attention and MLP
======================  ==========================================  =================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from tl_sparsify._internal.arguments import checked, checked_fields
from tl_sparsify._internal.checks import check_is_model
from tl_sparsify._internal.readers import norms_of_copies
from tl_sparsify.core.intervene import acting
from tl_sparsify.core.units import Model
from tl_sparsify.gradients.rules import Rule, attention_rules, block_rules, frozen_norm, mlp_rules, norm_rules

__all__ = ["GIM", "RELP", "TRUE", "Rules", "modified"]

Name = Literal["true", "gim", "relp"]


@checked_fields
@dataclass(frozen=True)
class Rules:
    """What a backward pass does at norms, attention, gates and activation functions; as it stands the true gradient.

    Attributes:
        norms: ``true`` or ``frozen``.
        softmax: the temperature at which attention is differentiated.
        patterns: ``true`` or ``frozen``.
        products: ``true`` or ``halved``: of pattern and value, query and key, gate and what it gates each factor gets
            half, so that queries and keys get a quarter and values half. A frozen factor takes none from the other.
        activations: ``true`` or ``proportional``.
        without: blocks that gradients only go past.

    Raises:
        ValueError: another name, or a temperature that is not positive.

    Example:
        >>> frozen = tls.backward.Rules(norms="frozen")
        >>> tls.score.gradient(model, train, units, backward=frozen).absolute.top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """

    norms: Literal["true", "frozen"] = "true"
    softmax: float = 1.0
    patterns: Literal["true", "frozen"] = "true"
    products: Literal["true", "halved"] = "true"
    activations: Literal["true", "proportional"] = "true"
    without: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, other in _OTHER.items():
            if getattr(self, name) not in ("true", other):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is true or {other}")
        if not 0 < self.softmax < float("inf"):
            raise ValueError(f"softmax is {self.softmax}; it is a temperature, and must be positive")


_OTHER = {"norms": "frozen", "patterns": "frozen", "products": "halved", "activations": "proportional"}
TRUE = Rules()
"""The true gradient."""
GIM = Rules(norms="frozen", softmax=2.0, products="halved")
"""Gradient interaction modifications (Edin et al., arXiv 2505.17630, and the factors of the authors' code)."""
RELP = Rules(norms="frozen", patterns="frozen", products="halved", activations="proportional")
"""Relevance patching (Rezaei Jafari et al., arXiv 2508.21258): the rules of layer-wise relevance propagation."""
_NAMED: dict[str, Rules] = {"true": TRUE, "gim": GIM, "relp": RELP}


@checked
def rules_of(backward: Name | Rules) -> Rules:
    """The rules of a name, or the rules given.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(backward, Rules):
        return backward
    if backward not in _NAMED:
        raise ValueError(f"backward is {backward!r}; it is {', '.join(_NAMED)} or a tls.backward.Rules")
    return _NAMED[backward]


def named(method: str, backward: Name | Rules) -> str:
    """A method's name, with that of its rules where they are not the true gradient."""
    rules = rules_of(backward)
    if rules == TRUE:
        return method
    return f"{method}, {next((name for name, known in _NAMED.items() if known == rules), 'other rules')}"


@checked
@contextmanager
def modified(model: Model, backward: Name | Rules) -> Iterator[None]:
    """Differentiate the model by other rules; what it computes stays the same bit for bit, and nothing of the rules is
    left afterwards. Interventions nest inside. No model pass of its own.

    The rules hold in forward passes made inside, wherever their gradient is then taken. Contexts of rules do not nest.

    Args:
        backward: ``true``, ``gim`` or ``relp``, or rules of your own.

    Raises:
        ValueError: an unknown name; a model that lacks a hook point which the rules need, or (when it runs) whose norms
            or MLPs are not made as they have it.

    Example:
        >>> with tls.backward.modified(model, "gim"):
        ...     same = model(test.tokens)
        >>> torch.equal(same, model(test.tokens))
        True
    """
    acts = _acts(model, rules_of(backward))
    copies = norms_of_copies(model, frozen_norm) if rules_of(backward).norms == "frozen" else nullcontext()
    with acting(model, acts) if acts else nullcontext(), copies:
        yield


def _acts(model: Model, rules: Rules) -> list[Rule]:
    check_is_model(model)
    if rules == TRUE:
        return []
    if not hasattr(model, "blocks"):
        raise ValueError(f"{type(model).__name__} has no blocks, and backward rules are those of a transformer's")
    halved = rules.products == "halved"
    acts = norm_rules(model) if rules.norms == "frozen" else []
    if rules.softmax != 1 or rules.patterns == "frozen" or halved:
        acts += attention_rules(model, temperature=rules.softmax, frozen=rules.patterns == "frozen", halved=halved)
    if rules.activations == "proportional" or halved:
        acts += mlp_rules(model, proportional=rules.activations == "proportional", halved=halved)
    return acts + block_rules(model, rules.without)
