"""A trained model as a folder that open_clip builds and loads: weights, config and tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, processors

from clipa_fast.errors import UserError
from clipa_fast.interop.open_clip_config import Described, to_open_clip
from clipa_fast.interop.parameter_names import open_clip_places, write_tensors
from clipa_fast.interop.safetensors_file import write_safetensors
from clipa_fast.model.architecture import architecture
from clipa_fast.model.positions import sincos_2d
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.text.clip_bpe import PUBLISHED_SIZE, ClipBpeTokenizer
from clipa_fast.text.file_tokenizer import FileTokenizer
from clipa_fast.text.open_tokenizer import AnyTokenizer
from clipa_fast.text.tokenizer import SPECIALS, WordPieceTokenizer
from clipa_fast.training.step import Params

_BERT_SIZE = 30_522


def export_open_clip(
    params: Params,
    described: Described,
    tokenizer: AnyTokenizer | None,
    folder: Path,
    *,
    hub_name: str | None = None,
) -> list[str]:
    """Writes open_clip_model.safetensors, open_clip_config.json and the tokenizer's files.

    `open_clip.create_model("local-dir:FOLDER")` and `open_clip.get_tokenizer("local-dir:FOLDER")` read the folder, and
    so does `clipa_fast.load`. Parameters are written to the bit; image positions that the model computes are written
    out as the table open_clip keeps.

    Args:
      params: the model's parameters.
      described: its config, picture size and text length.
      tokenizer: None writes none.
      folder: made if missing; must hold no other model.
      hub_name: ORG/NAME of the hub repository the folder is meant for, where open_clip is to find the tokenizer.

    Returns:
      What open_clip will do otherwise than this model, one sentence each.

    Raises:
      UserError: the folder holds a model already, or is a file.
    """
    make_folder(folder, "open_clip_config.json")
    if "position_table" not in params["vision"]:
        sizes = towers(described.config)
        table = sincos_2d(grid_size(described.image_size, sizes.patch_size), sizes.vision.width)
        params = dict(params, vision=dict(params["vision"], position_table=table))
    notes = _write_tokenizer(tokenizer, folder)
    name = (
        None if tokenizer is None or isinstance(tokenizer, ClipBpeTokenizer) else hub_name or _tokenizer_name(tokenizer)
    )
    content = to_open_clip(described, name, strip_sep=isinstance(tokenizer, WordPieceTokenizer))
    write_safetensors(folder / "open_clip_model.safetensors", write_tensors(params, open_clip_places(params)))
    # Last, so that a folder with a config is whole.
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if isinstance(tokenizer, WordPieceTokenizer) and architecture(described.config).text_rule == "clipa":
        notes.append("open_clip keeps one word piece less of captions that fill the text, and repairs text with ftfy")
    return notes


def make_folder(folder: Path, marker: str) -> None:
    """Makes `folder`. Raises UserError where it is a file or holds `marker`, an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; accepted: a new folder")
    if (folder / marker).exists():
        raise UserError(f"output: {folder} holds a model already ({marker}); accepted: a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot make {folder}: {error.strerror}") from error


def _tokenizer_name(tokenizer: AnyTokenizer) -> str:
    # Only read where the folder is not local: BERT's own vocabulary is found by its name, another needs hub_name.
    return "bert-base-uncased" if tokenizer.vocab_size == _BERT_SIZE else "tokenizer-of-this-model"


def _write_tokenizer(tokenizer: AnyTokenizer | None, folder: Path) -> list[str]:
    if tokenizer is None:
        return ["there is no tokenizer in the folder, since none came with the weights"]
    if isinstance(tokenizer, WordPieceTokenizer):
        _write_bert(tokenizer, folder)
        return []
    tokenizer.save(folder / "tokenizer.json")
    if isinstance(tokenizer, FileTokenizer):
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": tokenizer.pad_token}
        _write_json(folder / "tokenizer_config.json", about)
    elif tokenizer.vocab_size != PUBLISHED_SIZE:
        return ["open_clip has CLIP's published byte-pair encoding built in and will not read the one in the folder"]
    return []


def _write_bert(tokenizer: WordPieceTokenizer, folder: Path) -> None:
    (folder / "vocab.txt").write_bytes("".join(f"{entry}\n" for entry in tokenizer.vocabulary).encode())
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512, **names}
    _write_json(folder / "tokenizer_config.json", about)
    _write_json(folder / "special_tokens_map.json", names)
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    fast = Tokenizer.from_file(str(path))
    fast.add_special_tokens(list(SPECIALS))
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.cls_id), ("[SEP]", tokenizer.sep_id)],
    )
    fast.save(str(path))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
