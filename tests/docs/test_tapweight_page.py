"""The page on TapWeight: the recipe accepts its objective on text, and every name on the page exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "recipes" / "tapweight"))

from text_cases import SETTINGS, corpus, encoder, task, texts  # noqa: E402

from mlopt.recipes.tapweight import molecules, text  # noqa: E402
from mlopt.recipes.tapweight.methods import METHODS  # noqa: E402
from mlopt.recipes.tapweight.recipe import TapWeight  # noqa: E402
from mlopt.recipes.tapweight.text.objectives import OBJECTIVES, Contrastive  # noqa: E402

PAGE = (ROOT / "docs" / "tapweight.md").read_text()


@pytest.fixture
def objective() -> Any:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(block.split("class ")[1].splitlines()) < 30
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "docs/tapweight.md", "exec"), names)
    return names["HasNumeral"](encoder().tokenizer)


def test_its_objective_hides_numbers_and_labels_the_texts_that_had_some(objective: Any) -> None:
    own, some = encoder(), texts([{"text": "the thing1 is good"}, {"text": "not good"}])
    objective.prepare(some, 0)
    batch = own.collate(list(some))
    assert batch["has_numeral"].tolist() == [1.0, 0.0]
    assert objective.view(batch)["input_ids"].tolist()[0] == [2, 33, 1, 31, 25, 3]
    assert batch["input_ids"].tolist()[0][2] != 1


def test_the_recipe_accepts_its_objective(objective: Any) -> None:
    own = encoder()
    made = TapWeight(own, [objective, Contrastive()], task(own), corpus(), settings=SETTINGS)
    assert made.fit(4, methods=["tapweight"], progress=False).weights.keys() == {"has_numeral", "contrastive"}


def test_the_names_on_the_page_exist() -> None:
    table = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert table == [*METHODS, *molecules.OBJECTIVES, *OBJECTIVES]
    for name in ("TextEncoder", "TextTask", "make_objective", "read_corpus"):
        assert name in PAGE
        assert getattr(text, name)
    for name in ("GINE", "MoleculeTask", "make_objective", "read_corpus"):
        assert name in PAGE
        assert getattr(molecules, name)
