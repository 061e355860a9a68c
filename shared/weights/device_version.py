"""Which version the device holds: none between the first and the last write of a change."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class DeviceVersion:
    """The version label of one device copy.

    While tensors are written the copy is no version at all. A write that fails leaves it like that:
    what was computed with it must not carry a label, and only a whole load makes it a version
    again.
    """

    def __init__(self) -> None:
        self._label: int | None = None
        self._is_writing = False

    @property
    def label(self) -> int | None:
        """The version whose bits the device holds; None: not one."""
        return self._label

    @contextmanager
    def writing(self, version: int) -> Generator[None]:
        """Write all tensors of a change inside, and check them there.

        The label is None from here on, and `version` once the block has ended without an error.

        Raises:
            ValueError: another change is being written.
        """
        if self._is_writing:
            raise ValueError(f"version {version}: another version is being written")
        self._is_writing = True
        self._label = None
        try:
            yield
            self._label = version
        finally:
            self._is_writing = False
