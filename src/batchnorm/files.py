"""Files that are written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchnorm.errors import OutputError

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a partial file beside ``path``, which takes its place when all was written.

    Raises:
        OutputError: the folder is missing or can't be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "note.txt") as partial:
        ...         _ = partial.write_text("all of it")
        ...     [file.name for file in Path(folder).iterdir()]
        ['note.txt']
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".batchnorm-", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            yield partial
            partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} must be a file that can be written: {error}") from error
