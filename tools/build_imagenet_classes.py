"""Rebuilds clipa_fast/evaluation/imagenet.json: CLIP's prompts and ImageNet class names.

    pip install open_clip_torch timm
    python tools/build_imagenet_classes.py

The 80 prompts and 1,000 names are those that OpenAI published with CLIP (github.com/openai/CLIP, notebook on prompt
engineering, MIT licence, Copyright (c) 2021 OpenAI), as open_clip carries them (MIT licence). The order of the classes
by their WordNet ids, and the 200 of ImageNet-A and ImageNet-R each, are those data sets' own, as timm carries them
(Apache-2.0).
"""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "clipa_fast" / "evaluation" / "imagenet.json"
ORIGIN = (
    "CLIP's prompts and class names: github.com/openai/CLIP, MIT licence, Copyright (c) 2021 OpenAI, by way of"
    " open_clip. Classes of ImageNet-A and -R by way of timm (Apache-2.0). Built by tools/build_imagenet_classes.py."
)


def main() -> None:
    """Writes the file."""
    # Both by their paths: the packages themselves would import torch.
    open_clip, timm = (_folder_of(name) for name in ("open_clip", "timm"))
    metadata = runpy.run_path(str(open_clip / "zero_shot_metadata.py"))
    wnids, in_a, in_r = (
        (timm / "data" / "_info" / f"{name}_synsets.txt").read_text().split()
        for name in ("imagenet", "imagenet_a", "imagenet_r")
    )
    names = [name.split(",")[0] for name in metadata["IMAGENET_CLASSNAMES"]]
    templates = [template("{}") for template in metadata["OPENAI_IMAGENET_TEMPLATES"]]
    assert (len(names), len(wnids), len(templates), len(in_a), len(in_r)) == (1000, 1000, 80, 200, 200)
    classes = [
        {"label": label, "wnid": wnid, "name": name, "a": wnid in in_a, "r": wnid in in_r}
        for label, (wnid, name) in enumerate(zip(wnids, names, strict=True))
    ]
    rows = ",\n  ".join(json.dumps(entry) for entry in classes)
    head = json.dumps({"origin": ORIGIN, "templates": templates}, indent=1)
    OUTPUT.write_text(f'{head[:-2]},\n "classes": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install open_clip_torch timm")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
