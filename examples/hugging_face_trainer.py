# SPDX-License-Identifier: Apache-2.0
"""Fine-tune Hugging Face's SamModel with their Trainer.

python examples/hugging_face_trainer.py
python examples/hugging_face_trainer.py --data photos/ --checkpoint sam-vit-base/
"""

from images import dice, find_pictures, read_options
from torch import nn
from transformers import SamConfig, SamModel, Trainer, TrainingArguments

import samfast
from samfast.models import image_size, segment
from samfast.training.losses import bce_dice_loss

OUTPUT = ("--output", {"default": "runs/trainer", "help": "results' folder (%(default)s)"})
TINY = {"hidden_size": 192, "mlp_dim": 768, "num_hidden_layers": 4, "num_attention_heads": 3,
        "image_size": 64, "window_size": 3, "global_attn_indexes": [3],
        "initializer_range": 0.02}  # fmt: skip


class Segmenter(nn.Module):
    """As Trainer wants it: tensors of a batch in, the loss and the logits out."""

    def __init__(self, sam):
        super().__init__()
        self.sam = sam

    def forward(self, images, masks, valid):
        logits = segment(self.sam, images)
        return {"loss": bce_dice_loss(logits[:, 0], masks, valid), "logits": logits}


def main() -> None:
    options = read_options(__doc__, OUTPUT)
    if options.checkpoint:
        sam = SamModel.from_pretrained(options.checkpoint)
    else:
        prompts = {"image_size": 64, "image_embedding_size": 4}
        sam = SamModel(SamConfig(vision_config=TINY, prompt_encoder_config=prompts))
    model = Segmenter(samfast.fuse(samfast.attach(sam, samfast.Lora(rank=4))))
    options.image_size = image_size(sam)  # the model's own
    train, val = find_pictures(options, sam)
    arguments = TrainingArguments(
        options.output, num_train_epochs=options.epochs, per_device_train_batch_size=2,
        learning_rate=options.lr, remove_unused_columns=False, save_strategy="no",
        report_to="none", logging_strategy="epoch", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=train)
    print(f"mean loss {trainer.train().training_loss:.3f} over {trainer.state.global_step} steps")

    score = dice(lambda images: segment(model.eval().sam, images), val, str(arguments.device))
    samfast.save_adapter(model.sam, f"{options.output}/adapter")
    print(f"validation Dice {score:.3f}; the adapter is in {options.output}/adapter")


if __name__ == "__main__":
    main()
