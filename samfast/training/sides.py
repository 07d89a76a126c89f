# SPDX-License-Identifier: Apache-2.0
"""The side of the square that a model of the settings will see, before it is built."""

from samfast.models.architectures import architecture
from samfast.models.sam3_folder import NAME as SAM3
from samfast.models.sam3_folder import folder_image_size
from samfast.training.settings import FinetuneSettings


def model_side(settings: FinetuneSettings) -> int:
    """In pixels: the settings', or else the model's; of SAM 3 what its folder says."""
    if settings.image_size is not None:
        return settings.image_size
    if settings.model == SAM3:
        return folder_image_size(settings.checkpoint)
    return architecture(settings.model).image_size
