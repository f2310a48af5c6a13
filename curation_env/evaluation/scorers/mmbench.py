"""MMBench: circular multiple choice; a question counts only if every turn of its options is answered right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from curation_env.evaluation.scorers.base import Grade
from curation_env.evaluation.scorers.mcq import MultipleChoice
from curation_env.evaluation.suite import Item

_COPY = 1_000_000  # copies of question k have the indices k + n * 1,000,000


class MMBench(MultipleChoice):
    """Share of families that are right as a whole; a family without its first copy is not counted."""

    def unit(self, item: Item) -> str:
        return item.fields.get("g_index", str(int(item.index) % _COPY))

    def score(self, items: Sequence[Item], grades: Sequence[Grade]) -> float:
        families: dict[str, list[bool]] = defaultdict(list)
        for item, grade in zip(items, grades, strict=True):
            families[self.unit(item)].append(grade.score == 1)
        first = {item.index for item in items}
        counted = [all(right) for family, right in families.items() if family in first]
        return 100 * sum(counted) / len(counted)
