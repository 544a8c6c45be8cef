"""The peer's side of `python -m bench input`: open_clip's own training loader over the same shards."""

import contextlib
import sys
import time
from types import SimpleNamespace

import torch

# A torchvision without its compiled half still imports once these two operators are declared; none is called.
with contextlib.suppress(RuntimeError):
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset


def main(pattern, samples, batch, workers, size):
    """Prints samples a second after the first two batches."""
    settings = SimpleNamespace(
        train_data=pattern,
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch,
        workers=workers,
        world_size=1,
        seed=0,
        epochs=1,
        distributed=False,
    )
    # What its training scripts take: RandomResizedCrop, bicubic, to float and normalised.
    preprocess = image_transform(size, is_train=True, aug_cfg={"scale": (0.4, 1.0)})
    data = get_wds_dataset(settings, preprocess, is_train=True, tokenizer=SimpleTokenizer(context_length=8))
    data.set_epoch(0)
    batches = iter(data.dataloader)
    next(batches)
    next(batches)
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
