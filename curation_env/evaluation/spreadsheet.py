"""What becomes of a column of texts that VLMEvalKit writes into a spreadsheet and reads back before it grades."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from pandas.io.parsers import TextParser


def read_back(texts: Sequence[str]) -> list[str]:
    """The texts as they are graded: "nan" for each that pandas takes for missing, the others unchanged."""
    column = [["text"], *([text] for text in texts), ["a word, so that the column is text"]]
    table = TextParser(column, header=0, skip_blank_lines=False).read()
    return ["nan" if pd.isna(value) else str(value) for value in table["text"][:-1]]
