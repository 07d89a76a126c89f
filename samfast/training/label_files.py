# SPDX-License-Identifier: Apache-2.0
"""Label images: files in which every object is a value of its own.

Raises ValueError (FileNotFoundError for a missing file) with one sentence that names the file.
"""

from pathlib import Path

import numpy as np

from samfast.training.image_files import read_samples
from samfast.training.scaling import Samples
from samfast.training.tiff_tags import mask_bands, without_data

_ADVICE = "save labels as integers with one channel, in PNG, TIFF or .npy"


def read_labels(path: Path | str) -> np.ndarray:
    """The labels that a file stores: integers (H, W), 0 for the background.

    PNG and TIFF of any number of bits, signed or unsigned, and .npy. Palette files give their
    indices. What a TIFF's GDAL_NODATA or transparency mask takes out is background.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return _npy_labels(path)
    samples = read_samples(path, as_image=False)
    if samples.lossy:
        raise ValueError(f"{path} is compressed with loss, which does not keep labels; {_ADVICE}")
    if samples.tags.kind == "f":
        raise ValueError(f"{path} holds floats of {samples.tags.bits} bits; {_ADVICE}")
    values = _one_channel(path, samples)
    missing = without_data(values, samples.tags.no_data)
    if samples.hidden is not None:
        missing |= samples.hidden
    return np.where(missing, values.dtype.type(0), values)


def _one_channel(path: Path, samples: Samples) -> np.ndarray:
    """(H, W); colours must be grey, and what is no colour constant."""
    try:
        bands = mask_bands(samples.tags)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    values = samples.values
    first = values[..., bands[0]]
    if any((values[..., i] != first).any() for i in bands[1:]):
        raise ValueError(f"{path} is a colour image, whose channels differ; {_ADVICE}")
    for i in range(values.shape[2]):
        if i not in bands and (values[..., i] != values[0, 0, i]).any():
            raise ValueError(f"{path} varies in its channel {i + 1}, which is no label; {_ADVICE}")
    return first


def _npy_labels(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():  # a pipe or a device would block or never end
        raise ValueError(f"{path} is not a regular file")
    try:
        # Mapped first: a header may promise more than there is.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be decoded: {reason}; {_ADVICE}") from None
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays; save one array as .npy")
    if values.dtype.kind not in "iu" or values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"{path} holds {values.dtype} of shape {values.shape}; expected integers (H, W)"
        )
    return np.array(values, values.dtype.newbyteorder("="), order="C")
