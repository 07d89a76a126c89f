# SPDX-License-Identifier: Apache-2.0
"""Label images: files in which every object is a value of its own.

Raises ValueError (FileNotFoundError for a missing file) with one sentence that names the file.
"""

import numpy as np

from samfast.training.image_files import read_samples
from samfast.training.images import one_channel
from samfast.training.npy_files import read_mask_array
from samfast.training.stacks import Source, file_of, index_of, source_of
from samfast.training.tiff_tags import without_data

_ADVICE = "save labels as integers with one channel, in PNG, TIFF or .npy"


def read_labels(path: Source | str) -> np.ndarray:
    """Read the labels of a file or of one slice of it: integers (H, W), 0 for the background.

    PNG and TIFF of any number of bits, signed or unsigned, and .npy. Palette files give their
    indices. What a TIFF's GDAL_NODATA or transparency mask takes out is background.
    """
    path = source_of(path)
    if path.suffix.lower() == ".npy":
        return read_mask_array(file_of(path), index_of(path))
    samples = read_samples(path, as_image=False)
    if samples.lossy:
        raise ValueError(f"{path} uses lossy compression, which changes labels; {_ADVICE}")
    if samples.tags.kind == "f":
        raise ValueError(f"{path} holds floats of {samples.tags.bits} bits; {_ADVICE}")
    values = one_channel(path, samples)
    missing = without_data(values, samples.tags.no_data)
    if samples.hidden is not None:
        missing |= samples.hidden
    return np.where(missing, values.dtype.type(0), values)
