"""Tokenizers come in as their own file says, without torch, and go out so that every reader agrees."""

import json
import pathlib
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from jax_sft.hf.tokenizer import load_tokenizer, save_tokenizer, template_text
from tests.hf.models import CHATML, TINY, tiny_tokenizer, write_folder

TEXTS = [
    "In 2024 there were 12,345 dogs.",
    "你好，世界 3.14",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  two  spaces\n\n\tx",
]


def edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_file_decides_and_not_the_class_it_names(tmp_path: pathlib.Path):
    # transformers 5 rebuilds GPT2Tokenizer from its vocabulary and so loses the cutting of digits: SmolLM2 on the hub.
    write_folder(tmp_path / "m")
    edit(tmp_path / "m" / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    loaded = load_tokenizer(tmp_path / "m")
    truth = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    for text in TEXTS:
        assert loaded(text).input_ids == truth.encode(text).ids
    assert loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("42") == [("4", (0, 1)), ("2", (1, 2))]


def test_special_tokens_and_template_come_with_it(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    loaded = load_tokenizer(str(tmp_path / "m"))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (1, 2, 2, 0)
    assert template_text(loaded) == CHATML


def test_of_several_templates_the_default_is_taken():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "a", "default": "b"}
    assert template_text(tokenizer) == "b"
    tokenizer.chat_template = None
    assert template_text(tokenizer) is None


def test_a_folder_without_tokenizer_says_the_way_out(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ValueError, match=r": has no tokenizer\.json; copy the tokenizer's files of its base model"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"has a tokenizer\.json that cannot be read"):
        load_tokenizer(tmp_path / "m")


def test_what_is_saved_is_what_was_loaded(tmp_path: pathlib.Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    before = tokenizer.backend_tokenizer.to_str()
    save_tokenizer(tmp_path, tokenizer, chat_template="{{ messages }}", pad_id=0)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert tokenizer.backend_tokenizer.to_str() == before
    assert (tokenizer.pad_token_id, tokenizer.chat_template) == (2, CHATML)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))):
        for text in [*TEXTS, "a<|tool|>b"]:
            assert again(text).input_ids == tokenizer(text).input_ids
        assert again.chat_template == "{{ messages }}"
        assert (again.pad_token_id, again.eos_token_id, again.bos_token_id) == (0, 2, 1)
        assert "<|tool|>" in again.all_special_tokens


def test_the_saved_config_has_the_spellings_that_old_readers_know(tmp_path: pathlib.Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    save_tokenizer(tmp_path, tokenizer, chat_template=CHATML, pad_id=None)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<|tool|>"]
    assert "extra_special_tokens" not in said  # a list there stops transformers 4
    assert said["pad_token"] == "<|im_end|>"
    assert said["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == CHATML


def test_without_a_template_none_is_saved(tmp_path: pathlib.Path):
    save_tokenizer(tmp_path, tiny_tokenizer(), chat_template=None, pad_id=None)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_no_torch_is_needed(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from jax_sft.hf.load import load_model\n"
        "from jax_sft.hf.save import save_model\n"
        "m = load_model(sys.argv[1])\n"
        "save_model(sys.argv[1] + '-out', config=m.config, params=m.params, tokenizer=m.tokenizer,\n"
        "    hf_config=m.hf_config, generation_config={}, chat_template=m.chat_template, stop_ids=m.stop_ids,\n"
        "    dtype='bfloat16', max_shard_size='5GB', facts={})\n"
        "print(load_model(sys.argv[1] + '-out').tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}],\n"
        "    tokenize=False))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "m"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "<|im_start|>user\nhi<|im_end|>\n\n"


def test_a_sentencepiece_file_alone_says_what_is_needed(tmp_path: pathlib.Path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, and no tokenizer_config\.json that names a class"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs sentencepiece; pip install sentencepiece, or write a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_a_class_s_making_is_told(tmp_path: pathlib.Path, caplog):
    write_folder(tmp_path / "m")
    held = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["model"]
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "vocab.json").write_text(json.dumps(held["vocab"]))
    (tmp_path / "m" / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in held["merges"]))
    edit(tmp_path / "m" / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    load_tokenizer(tmp_path / "m")
    assert "has no tokenizer.json; its tokenizer is what transformers makes of the class it names" in caplog.text
