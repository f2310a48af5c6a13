"""Which public files a pool is made of, and how their folder must look: `conf/pool/*.yaml`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from curation_env.errors import MissingAssets
from curation_env.task import PublicPool, conf_dir, read_yaml


class Catalog(BaseModel):
    """The public files of one kind of pool.

    Attributes:
        title: What people call it.
        records: The JSON array of records, in the source folder.
        images: Folder that the records' image paths are relative to, in the source folder.
        public: Everything that must lie in the source folder, with its name where it is published.
        rows: Rows by source in the published file; empty where nobody has counted.
        gigabytes: Disk space that the pool takes; 0 where nobody knows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    records: str
    images: str
    public: dict[str, str]
    rows: dict[str, int]
    gigabytes: float = 0

    @classmethod
    def load(cls, kind: str) -> Catalog:
        return cls.model_validate(read_yaml(conf_dir() / "pool" / f"{kind}.yaml"))

    def reference(self, pool: PublicPool) -> dict[str, int]:
        """Rows by source of the whole pool; empty where nobody has counted."""
        return {source: rows for source, rows in self.rows.items() if pool.text or source != TEXT}

    def check(self, source: Path) -> list[str]:
        """What of the public files is not in a folder.

        Raises:
            MissingAssets: The records, or all images, are not there; the message says how the folder must look.
        """
        lacking = [path for path in self.public if not (source / path).exists()]
        if self.records in lacking or len(lacking) == len(self.public) - 1:
            raise MissingAssets(f"{source} has no {', no '.join(lacking)}.\n{self.layout()}")
        return lacking

    def layout(self) -> str:
        """How the source folder must look."""
        width = max(map(len, self.public))
        lines = [f"  {path:<{width}}  {name}" for path, name in self.public.items()]
        return "\n".join([f"The source folder of {self.title} holds:", *lines])


#: The source of rows without an image.
TEXT = "text"


def pool_key(pool: PublicPool) -> str:
    """Name of a pool's folder."""
    return pool.kind if pool.text else f"{pool.kind}-images"
