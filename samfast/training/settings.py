# SPDX-License-Identifier: Apache-2.0
"""The options of fine-tuning and prediction; their docstrings are the command line's help.

Importing this does not load torch, so ``--help`` is quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction

METHODS = (
    "lora",
    "conv-lora",
    "cobot-lora",
    "adaptformer",
    "cobot-adaptformer",
    "kronecker",
    "ta-lora",
    "decoder",
)
PROMPTS = ("none", "box")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
SCHEDULES = ("cosine", "polynomial", "constant")
MEMORY = ("fast", "balanced", "minimal")
BASE_DTYPES = ("auto", "float32", "bfloat16", "float16")
LOSSES = ("bce-dice", "structure", "structure-weighted", "balanced-bce")
TASK_LOSSES = {  # of each kind of task, the first unless told otherwise
    "binary": LOSSES,
    "semantic": ("cross-entropy",),
    "regression": ("l1", "cosine"),
}
STEPS_PER_EPOCH = 50  # the least, where the settings leave the number of repeats open


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Fine-tune a SAM on a folder of images and masks.

    The data folder holds images/ and masks/, files of one stem belong together; or train/ and
    val/, each with both. Masks together hold 0 and one other value, which is foreground; of other
    masks, --foreground or --threshold says what an object is. Results go to the output folder:
    adapter/best and adapter/last, metrics.csv, curves.png, overlays/, tensorboard/, settings.json.
    """

    data: Path | None = None
    """Folder with images/ and masks/, or with train/ and val/ that hold them; only --dry-run can do
    without."""
    tasks: Path | None = None
    """A YAML file with several tasks that share the encoder, each with a mask decoder of its own:
    under tasks: a list of name, kind (binary, semantic, regression), channels, folder, weight,
    loss, ignore, foreground, threshold, scale, offset, and derive with from. Masks then lie in the
    tasks' folders, and no --prompt, --loss, --foreground and --threshold are given."""
    model: str = "vit_b"
    """vit_b, vit_l, vit_h (these need --checkpoint or --random-init) or vit_tiny."""
    checkpoint: Path | None = None
    """SAM weights: a .pth or .safetensors file or a Hugging Face SamModel folder."""
    random_init: bool = False
    """Start from random weights (drawn from --seed) instead of a checkpoint."""
    image_size: int | None = None
    """Longest side of the images as the model sees them; 1024, for vit_tiny 256, if not given."""
    method: str = "lora"
    """The adapters that are trained beside the mask decoder: lora; conv-lora (with one mask token,
    as published); cobot-lora: SAM-COBOT on q and v; adaptformer: branches beside the MLPs, and
    cobot-adaptformer: with SAM-COBOT; kronecker: sums of Kronecker products; ta-lora, of --tasks:
    an update for each task from one tensor. Or decoder: the mask decoder alone."""
    rank: int | None = None
    """The adapters' rank, for cobot-lora a multiple of 4; 4, for conv-lora 3, for kronecker (whose
    update has rank kron_n * kron_n * rank) 1, for ta-lora 32, if not given."""
    alpha: float | None = None
    """The adapters' scaling is alpha / rank, where they have one (lora, conv-lora, kronecker);
    alpha = rank, for conv-lora 32, if not given."""
    experts: int | None = None
    """Of conv-lora: number of convolutions that the gate chooses from; 8 if not given."""
    depthwise: bool = False
    """Of conv-lora: each channel has a convolution of its own."""
    bottleneck: int | None = None
    """Of adaptformer and, a multiple of 4, of cobot-adaptformer: width of the branches; 16 if not
    given."""
    kron_n: int | None = None
    """Of kronecker: number of products, which divides the layers' sizes; 4 if not given."""
    zero_start: bool = False
    """Of cobot-lora: start at the frozen model; as published, cobot-lora starts off it."""
    orthogonality: float | None = None
    """Of ta-lora: weight of the penalty that keeps its factors near orthogonal; 0 if not given."""
    dropout: float | None = None
    """Dropout on the adapters' input, of adaptformer on its bottleneck; 0, for adaptformer,
    cobot-adaptformer and ta-lora 0.1, if not given. cobot-lora has none."""
    target: tuple[str, ...] | None = None
    """The encoder's layers that get an adapter: of qkv, proj, lin1, lin2; of adaptformer mlp. If
    not given qkv, for kronecker qkv and proj. cobot-lora and ta-lora are on every qkv."""
    slices: tuple[str, ...] | None = None
    """Of lora: adapt only these parts of qkv (q, k, v), each with its own factors and no
    scaling."""
    prompt: str = "none"
    """none: the mask decoder is given the image alone; box: and the box around the foreground of
    its mask, one box per image whatever the number of objects (the whole image where there is no
    foreground). An adapter trained with boxes predicts with boxes."""
    box_jitter: float | None = None
    """Of --prompt box: each side of a box moves by up to so many pixels of the image as the model
    sees it, anew each time in training, never in validation; a fiftieth of the image size (20 of
    1024) if not given."""
    epochs: int = 20
    """Epochs; the model is validated and saved after each."""
    repeats: int | None = None
    """How often an epoch shows each training image, mirrored anew each time; if not given, once,
    or as often as 50 optimizer steps take when the images are few."""
    batch_size: int = 2
    """Images in one forward pass."""
    accumulate: int = 1
    """Batches summed into one optimizer step."""
    lr: float | None = None
    """Peak learning rate of AdamW; 1e-3 from random weights, 2e-4 (conv-lora 1e-4) from a
    checkpoint, if not given."""
    relation_lr: float | None = None
    """Peak learning rate of what relates blocks or tasks. Of cobot-lora and cobot-adaptformer the
    relation, the coefficients and the heads; as --lr if not given, and one of the authors' scripts
    trains them at 100 times --lr. Of ta-lora the core; a twentieth of --lr if not given."""
    schedule: str | None = None
    """cosine: short warm-up, then a half cosine towards 0; constant: warm-up, then --lr;
    polynomial: from --lr in a straight line to 0. polynomial for conv-lora, else cosine, if not
    given."""
    loss: str | None = None
    """bce-dice: cross-entropy and soft Dice; structure: cross-entropy and IoU, pixels near edges
    count more (structure-weighted: in the cross-entropy too); balanced-bce: rare foreground counts
    more. structure for conv-lora, else bce-dice, if not given."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    flips: bool = True
    """Mirror training images at random, left-right and top-bottom."""
    precision: str = "auto"
    """auto: bf16 on a GPU that has it, else fp16 on a GPU, fp32 on a CPU; or bf16, fp16, fp32."""
    base_dtype: str = "auto"
    """What the frozen encoder's weights are cast to, and with them its images and what runs from
    block to block: auto: bfloat16 on a GPU where --precision is bf16 or auto means it, else
    float32; or float32, bfloat16, float16. --precision is what products are computed in: bf16
    takes a float32 or a bfloat16 base; under fp32 a bfloat16 encoder still computes in bfloat16
    and all the rest in float32; float16 needs fp16, for its loss scaling. Adapters and the mask
    decoder stay float32."""
    memory: str | None = None
    """What the fused encoder keeps for the backward: fast: what it needs; balanced: about a third,
    and two of a block's four large products are computed again; minimal: each block's input, and
    all of the block is computed again. The results are the same. fast if not given."""
    decoder_chunk: int | None = None
    """Objects that the mask decoder takes at a time (an image is one object, with a box and
    without); each chunk is computed again for its gradient, so that one at a time is kept. All if
    not given."""
    seed: int = 0
    """Seed of the split, the order, the flips, the boxes' jitter and the random weights."""
    val_fraction: float = 0.2
    """Share of the images that validates; ignored when the data has train/ and val/."""
    foreground: tuple[int | Literal["any"], ...] | None = None
    """What is foreground where masks hold more than 0 and one other value: any (every value above
    0, such as the numbers of instances) or the values that are."""
    threshold: float | None = None
    """Foreground is every mask value above this; not with --foreground."""
    bands: str | None = None
    """The bands of the image files to show, counted from 1: three as red, green and blue (1,2,3)
    or one as grey; as the files' tags say, if not given. Prediction takes the same."""
    range: str = "auto"
    """Which values become black and white in images of more than 8 bits: auto: the 1st and 99th
    percentiles of the pixels with data in each image; full: the smallest and largest that the
    number type holds (of floats 0 and 1); or LOW,HIGH (--range=LOW,HIGH where LOW is negative).
    Prediction takes the same."""
    output: Path | None = None
    """Folder for the results; runs/DATA-MODEL-METHOD (-box with boxes) if not given."""
    overwrite: bool = False
    """Replace the results of an earlier run in the output folder."""
    overlays: int = 4
    """Validation images drawn beside truth and prediction."""
    fuse: bool = True
    """Run the encoder's attention fused; --no-fuse runs segment_anything's own, to compare."""
    backend: str = "auto"
    """Which kernels run: auto, reference, torch, cpu, triton or cuda."""
    workers: int | None = None
    """Processes that load images; 0 on a CPU and up to 8 with a GPU, if not given."""
    threads: int | None = None
    """CPU threads torch uses; torch's own choice if not given."""
    dry_run: bool = False
    """Train nothing, read no file but that of --tasks, write none: print what one step would take
    with these settings, counted on a model without memory: trained parameters, bytes kept for the
    backward, peak memory and FLOP. --data and --checkpoint are not needed."""
    json: bool = False
    """Print a summary as JSON on stdout; the running text goes to stderr."""


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Segment images with a fine-tuned adapter: one mask and one overlay each.

    A mask is 0 and 255. Of an adapter of several tasks, each task gives its own: 0 and 255 of a
    binary task, the class of each pixel of a semantic one, and the values of a regression in a
    float32 TIFF, of several channels in a .npy file.
    """

    images: Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    adapter: Path
    """Adapter folder that finetune wrote, such as runs/NAME/adapter/best."""
    output: Path = Path("predictions")
    """Folder for NAME_mask.png and NAME_overlay.png, of several tasks NAME_TASK.png and
    NAME_TASK_overlay.png; existing files of these names are replaced."""
    task: str | None = None
    """Of an adapter of several tasks: predict this one alone; all if not given."""
    checkpoint: Path | None = None
    """The SAM weights the adapter was trained on; not needed where these were random."""
    bands: str | None = None
    """The bands of the image files to show, such as 4,3,2 or 1; as in training, if not given."""
    range: str | None = None
    """Which values become black and white in images of more than 8 bits: auto, full or LOW,HIGH;
    as in training, if not given."""
    box: UseAppendAction[tuple[str, ...]] = ()
    """x0,y0,x1,y1 in pixels of the image, for an adapter that was trained with boxes: once for all
    images, or once for each in their order."""
    batch_size: int = 4
    """Images in one forward pass."""
    precision: str = "auto"
    """auto: bf16 on a GPU that has it, else fp16 on a GPU, fp32 on a CPU; or bf16, fp16, fp32."""
    decoder_chunk: int | None = None
    """Objects that the mask decoder takes at a time (each image is one); all if not given."""
    fuse: bool = True
    """Run the encoder's attention fused; --no-fuse runs segment_anything's own, to compare."""
    backend: str = "auto"
    """Which kernels run: auto, reference, torch, cpu, triton or cuda."""
    threads: int | None = None
    """CPU threads torch uses; torch's own choice if not given."""
    json: bool = False
    """Print a summary as JSON on stdout."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a fine-tuned adapter on images with their masks."""

    adapter: Path
    """Adapter folder that finetune wrote, such as runs/NAME/adapter/best."""
    data: Path
    """Folder with images/ and masks/ (the tasks' folders), all of which are scored; or with train/
    and val/, of which val/ is."""
    task: str | None = None
    """Of an adapter of several tasks: score this one alone; all if not given."""
    checkpoint: Path | None = None
    """The SAM weights the adapter was trained on; not needed where these were random."""
    output: Path | None = None
    """Folder for overlays of every image; none are drawn if not given."""
    batch_size: int = 4
    """Images in one forward pass."""
    precision: str = "auto"
    """auto: bf16 on a GPU that has it, else fp16 on a GPU, fp32 on a CPU; or bf16, fp16, fp32."""
    decoder_chunk: int | None = None
    """Objects that the mask decoder takes at a time; all if not given."""
    fuse: bool = True
    """Run the encoder's attention fused; --no-fuse runs segment_anything's own, to compare."""
    backend: str = "auto"
    """Which kernels run: auto, reference, torch, cpu, triton or cuda."""
    threads: int | None = None
    """CPU threads torch uses; torch's own choice if not given."""
    json: bool = False
    """Print the scores as JSON on stdout."""
