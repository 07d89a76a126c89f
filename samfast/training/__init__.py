# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on a folder of images and masks: data, losses, metrics, the loop, prediction.

Nothing is imported here, so that the command line can read the options without loading torch.
"""
