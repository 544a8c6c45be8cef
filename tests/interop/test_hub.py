"""Models by their name on the hub, with the hub's own library replaced: no test here uses the network."""

import logging
import sys
import types

import pytest

from clipa_fast.errors import UserError
from clipa_fast.interop.pretrained import open_pretrained


class Missing(Exception):
    pass


class Unreachable(Missing):
    pass


@pytest.fixture
def hub(monkeypatch):
    """A hub whose one repository, org/model, is `hub.folder`; `hub.asked` lists what was asked for."""
    module, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    module.asked, module.folder = [], None
    errors.EntryNotFoundError, errors.LocalEntryNotFoundError = Missing, Unreachable

    def hf_hub_download(name, file, revision=None):
        module.asked.append((name, file, revision))
        logging.getLogger("huggingface_hub.http").warning("as the library does at every try")
        if name != "org/model":
            raise Unreachable("no network")
        if not (module.folder / file).is_file():
            raise Missing(file)
        return str(module.folder / file)

    module.hf_hub_download, module.errors = hf_hub_download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return module


def test_a_model_by_its_name(hub, exported):
    hub.folder = exported["open_clip"]
    model = open_pretrained("hf://org/model@v1")
    assert model.name == "hf://org/model@v1"
    assert model.config == open_pretrained(exported["open_clip"]).config
    assert model.tokenizer is not None
    assert {revision for _, _, revision in hub.asked} == {"v1"}
    # One kind of weights is enough.
    asked = [file for _, file, _ in hub.asked]
    assert "open_clip_model.safetensors" in asked
    assert "open_clip_pytorch_model.bin" not in asked


def test_what_can_be_wrong_with_a_name(hub, tmp_path, monkeypatch, caplog):
    hub.folder = tmp_path
    with pytest.raises(UserError, match="hub cannot be reached"):
        open_pretrained("hf://org/other")
    assert not caplog.records
    with pytest.raises(UserError, match="none of open_clip_model"):
        open_pretrained("hf://org/model")
    for name in ("hf://org", "hf://org/model/file", "hf:///"):
        with pytest.raises(UserError, match="accepted: hf://ORG/NAME"):
            open_pretrained(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install 'clipa-fast\\[interop\\]'"):
        open_pretrained("hf://org/model")
