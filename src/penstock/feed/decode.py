"""The stage that decodes encoded images, by Pillow.

Spools keep the files' bytes: a decoded image is ten times their size, and reading is what a later
epoch would wait for. Pillow lets go of Python's lock while it decodes, so two threads do it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import JobError
from penstock.feed.bad import BadRecords
from penstock.feed.columns import Image
from penstock.feed.segment import Ragged
from penstock.feed.source import Rows, Stage

ALL_BAD = 32
"""So many bad images, and no good one before them: every record is bad."""


def stages_of(
    features: Any, where: str, bad: BadRecords, names: Sequence[str] = ()
) -> tuple[Stage, ...]:
    """What batches pass where the features are an `Image`; nothing otherwise."""
    if not isinstance(features, Image):
        return ()
    decode = Decode(where, features.height, features.width, features.channels, bad, names)
    return (Stage("decode", decode, workers=2),)


@dataclass
class Decode:
    """Encoded images to uint8 (batch, channels, height, width); bad ones are left out.

    Arguments:
        where: the source, for messages.
        height, width, channels: as `Image` has them.
        bad: what becomes of those that cannot be decoded. Each is told once in a process, however
            many epochs it comes back in.
        names: of the records, by their ids, where they have any.
    """

    where: str
    height: int
    width: int
    channels: int
    bad: BadRecords
    names: Sequence[str] = ()
    _told: set[int] = field(default_factory=set)
    _any: bool = False

    def __call__(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """
        Raises:
            DataError: an image cannot be decoded, where that is an error; or none of the first.
            JobError: Pillow is not installed.
        """
        import torch

        data: Ragged = rows.x
        num = len(rows.ids)
        images = np.empty((num, self.channels, self.height, self.width), np.uint8)
        failed: dict[int, str] = {}
        for i in range(num):
            try:
                images[i] = self._decoded(data[i])
            except JobError:
                raise
            except Exception as error:  # Pillow's plugins raise what they like
                name = type(error).__name__
                said = str(error).partition(" <_io")[0]  # not where it lies in memory
                failed[i] = f"an image that cannot be decoded: {name}: {said}"
        self._any |= len(failed) < num
        if not failed:
            return Rows(torch.from_numpy(images), rows.y, rows.ids)
        self._tell(failed, data, rows.ids)
        keep = np.setdiff1d(np.arange(num), list(failed))
        chosen = torch.from_numpy(keep)
        return Rows(torch.from_numpy(images[keep]), rows.y[chosen], rows.ids[keep])

    def _decoded(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        try:
            from PIL import Image as pillow
        except ImportError as error:
            raise JobError(
                f"{self.where}: encoded images are decoded by Pillow, which is not installed",
                hint="pip install 'penstock[images]'",
            ) from error
        with pillow.open(io.BytesIO(encoded.data)) as file:
            image = file.convert("RGB" if self.channels == 3 else "L")
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), pillow.Resampling.BILINEAR)
        pixels: NDArray[np.uint8] = np.asarray(image)
        return pixels.transpose(2, 0, 1) if self.channels == 3 else pixels[None]

    def _tell(self, failed: dict[int, str], data: Ragged, ids: NDArray[np.int64]) -> None:
        new: Sequence[int] = [i for i in failed if int(ids[i]) not in self._told]
        self._told.update(int(ids[i]) for i in new)
        self.bad.add(
            self.where,
            [int(ids[i]) for i in new],
            lambda i: f"{self._name(int(ids[new[i]]))} is {failed[new[i]]}",
            lambda i: data[new[i]].tobytes(),
            "mend it, or have it left out: on_bad_record: skip",
            by_process=True,
        )
        if not self._any and len(self._told) >= ALL_BAD:
            raise self.bad.every(self.where)

    def _name(self, record: int) -> str:
        return self.names[record] if self.names else f"record {record}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_told": set(), "_any": False}
