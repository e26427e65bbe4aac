"""A picture is a file of its own or lies in a tar; both are read at random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, order=True)
class TarMember:
    """A file inside an uncompressed tar: ``size`` bytes from byte ``offset`` of ``archive`` on."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The file's content; ``OSError`` if the archive is gone or ends before the file does."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"the archive ends {self.size - len(content)} bytes before the file does")
        return content

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


ImageSource = Path | TarMember
