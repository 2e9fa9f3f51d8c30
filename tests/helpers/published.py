"""Small samples of our own in the columns of published data sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MEN, WOMEN = ("David", "Frank", "Paul", "Robert"), ("Anna", "Emma", "Laura", "Lisa")
CITIES = {
    "train": {"Madrid": "Spain Europe", "Rome": "Italy Europe", "Cairo": "Egypt Africa", "Tokyo": "Japan Asia"},
    "val": {"Paris": "France Europe", "Athens": "Greece Europe", "Havana": "Cuba America", "Lima": "Peru America"},
    "test": {
        "Stockholm": "Sweden Europe",
        "Vienna": "Austria Europe",
        "Moscow": "Russia Asia",
        "Berlin": "Germany Europe",
    },
}
PROMPTS = {
    "Country": ["%s is in the country of", "the city of %s is in", "we went to %s in"],
    "Continent": ["%s is on the continent of", "the land of %s is", "the road from %s goes to"],
}


def minimal_pairs(men: Sequence[str] = MEN, women: Sequence[str] = WOMEN) -> list[dict[str, Any]]:
    """Each man with each woman, both ways round; another task's row at the end."""
    rows = []
    for man, woman in [(a, b) for a in men for b in women]:
        for one, other, mine, its in ((man, woman, "m", "f"), (woman, man, "f", "m")):
            rows.append(
                {
                    "base": ["<|endoftext|>", one, " walked", " to the house and"],
                    "src": ["<|endoftext|>", other, " walked", " to the house and"],
                    "base_type": mine,
                    "src_type": its,
                    "base_label": {"m": " he", "f": " she"}[mine],
                    "src_label": {"m": " he", "f": " she"}[its],
                    "task": "agr_gender",
                }
            )
    return [*rows, rows[0] | {"task": "npi_any"}]


def write_causalgym(folder: Path, **files: Sequence[Mapping[str, Any]]) -> Path:
    """``train.json``, ``dev.json`` and ``test.json``, as lists of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    every = {
        "train": minimal_pairs(),
        "dev": minimal_pairs(MEN[:2], WOMEN[:2]),
        "test": minimal_pairs(MEN[1:], WOMEN[1:]),
    }
    for name, rows in (every | files).items():
        (folder / f"{name}.json").write_text(json.dumps(list(rows)))
    return folder


def ravel_files() -> dict[str, Any]:
    """What the four files hold: four cities and a prompt for each attribute in each split."""
    of = {city: (split, *words.split()) for split, some in CITIES.items() for city, words in some.items()}
    return {
        "entity_attributes": {city: {"Country": one, "Continent": other} for city, (_, one, other) in of.items()},
        "attribute_to_prompts": {name: list(some) for name, some in PROMPTS.items()},
        "entity_to_split": {city: split for city, (split, *_) in of.items()},
        "prompt_to_split": {text: split for some in PROMPTS.values() for text, split in zip(some, CITIES, strict=True)},
    }


def write_ravel(folder: Path, files: Mapping[str, Any] | None = None) -> Path:
    """``ravel_city_*.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or ravel_files()).items():
        (folder / f"ravel_city_{name}.json").write_text(json.dumps(content))
    return folder
