"""The peer's side of `python -m bench train_step`: open_clip's CLIP and loss, PyTorch's AdamW."""

import contextlib
import json
import os
import resource
import sys
import time

import torch

# A torchvision without its compiled half still imports once these two operators are declared; none is called.
with contextlib.suppress(RuntimeError):
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from open_clip import ClipLoss
from open_clip.model import CLIP

image_size, text_length, batch = map(int, sys.argv[1:])
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.manual_seed(0)
vision = {"layers": 12, "width": 384, "head_width": 64, "patch_size": 16, "image_size": image_size}
vision |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
text_tower = {"context_length": text_length, "vocab_size": 32_000, "width": 384, "heads": 6, "layers": 12}
text_tower |= {"pool_type": "last", "no_causal_mask": True}
model = CLIP(384, vision, text_tower, output_dict=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.2)
loss_fn = ClipLoss()
image = torch.randn(batch, 3, image_size, image_size)
text = torch.randint(0, 32_000, (batch, text_length))

for line in sys.stdin:
    rows = []
    for _ in range(int(line)):
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        out = model(image, text)
        loss = loss_fn(out["image_features"], out["text_features"], out["logit_scale"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        rows.append({"seconds": seconds, "page_faults": faults, "loss": loss.item()})
    print(json.dumps(rows), flush=True)
