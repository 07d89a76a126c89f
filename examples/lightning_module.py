# SPDX-License-Identifier: Apache-2.0
"""Fine-tune SAM with Conv-LoRA in a LightningModule (pip install pytorch-lightning).

python examples/lightning_module.py
python examples/lightning_module.py --data photos/ --checkpoint sam_vit_b_01ec64.pth
"""

import torch
from images import build, dice, find_pictures, read_options
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

import samfast
from samfast.models import segment
from samfast.training.losses import structure_loss

OUTPUT = ("--output", {"default": "runs/lightning", "help": "adapter's folder (%(default)s)"})


class Segmenter(LightningModule):
    def __init__(self, sam, lr: float):
        super().__init__()
        self.sam, self.lr = sam, lr

    def training_step(self, batch, _):
        logits = segment(self.sam, batch["images"])[:, 0]
        loss = structure_loss(logits, batch["masks"], batch["valid"])
        self.log("loss", loss)
        return loss + samfast.aux_loss(self)  # the gate's balancing term

    def configure_optimizers(self):
        return torch.optim.AdamW(samfast.parameter_groups(self, lr=self.lr))


def main() -> None:
    options = read_options(__doc__, OUTPUT)
    sam = samfast.attach(build(options), samfast.ConvLora(rank=3))
    model = Segmenter(samfast.fuse(sam), options.lr)
    train, val = find_pictures(options, sam)
    trainer = Trainer(
        max_epochs=options.epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,  # Lightning's would hold the frozen weights too
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.train()  # Lightning keeps the eval mode that build gives
    trainer.fit(model, DataLoader(train, batch_size=2, shuffle=True))
    print(f"{trainer.global_step} steps; loss {trainer.callback_metrics['loss']:.3f}")

    model.eval().to(options.device)
    score = dice(lambda images: segment(model.sam, images), val, options.device)
    samfast.save_adapter(model.sam, options.output)
    print(f"validation Dice {score:.3f}; the adapter is in {options.output}")


if __name__ == "__main__":
    main()
