"""A text space that survives Gymnasium's shared memory, so that `AsyncVectorEnv` with its defaults returns texts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory


class SharedText(spaces.Text):
    """`Text` with shared memory of its own.

    Gymnasium reads a `Text` from shared memory once, when the vector environment is made: every observation is then the
    text that empty memory spells. Arrays do not have the fault, since they are views. So this one is read by a view,
    too.
    """


class _Texts(Sequence[str]):
    """The texts that lie in shared memory now; a copy, which `AsyncVectorEnv` returns, is a tuple."""

    def __init__(self, memory: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self._memory = memory

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return tuple(self)[index]
        length, *_ = row = self._memory[index]
        return row[1 : 1 + length].astype("<i4").tobytes().decode("utf-32-le")

    def __len__(self) -> int:
        return len(self._memory)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)


@create_shared_memory.register(SharedText)
def _create(space: SharedText, n: int = 1, ctx: Any = multiprocessing) -> Any:
    return ctx.Array(np.dtype(np.int32).char, n * (1 + space.max_length))  # a text's length, then its characters


def _rows(space: SharedText, shared_memory: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(shared_memory.get_obj(), np.int32).reshape(-1, 1 + space.max_length)


@read_from_shared_memory.register(SharedText)
def _read(space: SharedText, shared_memory: Any, n: int = 1) -> _Texts:
    return _Texts(_rows(space, shared_memory))


@write_to_shared_memory.register(SharedText)
def _write(space: SharedText, index: int, value: str, shared_memory: Any) -> None:
    row = _rows(space, shared_memory)[index]
    row[0] = len(value)
    row[1 : 1 + len(value)] = np.frombuffer(value.encode("utf-32-le"), "<i4")
