"""The door: a config is checked whole, and every problem comes out at once with the way out."""

import dataclasses
import json
import re

import numpy as np
import pytest

from jax_sft import config as configs
from jax_sft.config import ConfigError, RunConfig, is_better_low


def good():
    config = configs.default()
    config.model.path = "somewhere"
    config.data.train = ("train.jsonl",)
    config.train.steps = 10
    return config


def problems(config, overrides=()):
    with pytest.raises(ConfigError) as caught:
        configs.from_config_dict(config, overrides)
    return str(caught.value)


FREE = (
    "card",
    "columns",
    "sets",
    "rank_pattern",
    "alpha_pattern",
    "template_args",
    "validation_sets",
)  # mappings whose keys are the user's


def test_default_config_holds_every_key_of_the_dataclasses():
    def keys(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict) and name not in FREE:
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    alone = {key for key in configs.known_keys() if "<" not in key}
    assert set(keys(configs.default().to_dict())) == alone | {"data.sets", "stages"}


def test_a_good_config_becomes_frozen_dataclasses():
    run = configs.from_config_dict(good())
    assert run.train.steps == 10
    assert run.data.train == ("train.jsonl",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.train.steps = 11  # pyright: ignore[reportAttributeAccessIssue]


def test_the_manifest_form_of_a_config_reads_back_as_the_same_config():
    run = configs.from_config_dict(good(), ["data.columns.messages=chat", "optim.lr=3e-4"])
    assert configs.from_config_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_all_problems_come_out_at_once_with_the_nearest_name():
    config = good()
    config.optim.learning_rate = 1e-4
    config.optim.schedule = "cosin"
    config.train.batch_size = "many"
    config.trian = {"steps": 1}
    text = problems(config)
    assert "4 problems" in text
    assert "optim.learning_rate is not a config key" in text
    assert "'cosin' is not one of cosine, linear, constant, wsd; did you mean cosine?" in text
    assert "train.batch_size = 'many' is not a whole number" in text
    assert "trian is not a config key" in text


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("optim.lrr", "optim.lr"), ("data.max_len", "data.max_length"), ("train.warmup_steps", "optim.warmup_steps")],
)
def test_a_misspelt_override_names_the_nearest_key(wrong, right):
    assert f"{wrong} is not a config key; did you mean {right}?" in problems(good(), [f"{wrong}=3"])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-5", "lr", 1e-5),
        ("optim.warmup_steps=3", "warmup_steps", 3),
        ("optim.clip_norm=None", "clip_norm", None),
        ("optim.schedule=linear", "schedule", "linear"),
    ],
)
def test_overrides_are_typed_by_the_field(override, key, value):
    assert getattr(configs.from_config_dict(good(), [override]).optim, key) == value


def test_overrides_set_lists_booleans_and_column_names():
    run = configs.from_config_dict(
        good(), ["data.train=('a.jsonl', 'b.jsonl')", "data.packing=false", "data.columns.messages=chat"]
    )
    assert run.data.train == ("a.jsonl", "b.jsonl")
    assert run.data.packing is False
    assert run.data.columns == {"messages": "chat"}


def test_an_override_reaches_a_section_that_the_config_leaves_out():
    partial = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "train": {"steps": 1}}
    run = configs.from_config_dict(partial, ("optim.lr=1e-4", "train.batch_size=4", "data.columns.messages=talk"))
    assert (run.optim.lr, run.train.batch_size, run.data.columns) == (1e-4, 4, {"messages": "talk"})
    assert partial["data"] == {"train": "a.jsonl"}


def test_all_column_names_can_be_overridden_at_once():
    run = configs.from_config_dict(good(), ["data.columns.input=x", "data.columns={'messages': 'talk'}"])
    assert run.data.columns == {"messages": "talk"}


def test_pairs_that_do_not_combine_come_out_with_misspelt_keys_and_wrong_types():
    text = problems(good(), ["optim.lrr=1", "data.max_length=abc", "lora.dora=true", "mesh.data=0"])
    assert "4 problems" in text
    assert "did you mean optim.lr?" in text and "data.max_length = 'abc' is not a whole number" in text
    assert "lora.dora asks for adapters" in text and "mesh.data = 0 must be" in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"train": {"stepz": 3}},
        {"train": {"steps": "many"}},
        {"train": {}, "stages": 3},
        {"data": {"trian": ["a.jsonl"]}},
        {"data": {"sets": 3}},
        {"optim": {"warmup_steps": "long"}},
    ],
)
def test_what_only_follows_from_a_problem_is_not_told_beside_it(wrong):
    assert "1 problem:" in problems(good().to_dict() | wrong)


def test_an_override_of_a_section_that_is_none_leaves_that_one_problem():
    text = problems(good().to_dict() | {"optim": 3}, ["optim.lr=1e-4"])
    assert "1 problem:" in text
    assert "optim is a section, but was set to 3" in text


def test_an_override_of_an_unknown_key_that_the_config_file_sets_too_is_named():
    assert "optim.foo is not a config key" in problems(good().to_dict() | {"optim": {"foo": 1}}, ["optim.foo=2"])


@pytest.mark.parametrize("text", ["{[]:1}", "{1", "(" * 300, "9" * 5000])
def test_an_override_that_is_no_value_is_a_text_and_of_the_wrong_type(text):
    assert f"optim.lr = {text!r} is not a number" in problems(good(), [f"optim.lr={text}"])


def test_a_key_that_is_no_text_is_named():
    text = problems(good().to_dict() | {3: 1, "optim": {None: 2}})
    assert "3 is not a config key" in text
    assert "optim.None is not a config key" in text


def test_a_section_cannot_be_overwritten_by_a_value():
    assert "optim is a section" in problems(good(), ["optim=3"])


def test_a_text_key_takes_digits_as_text():
    assert configs.from_config_dict(good(), ["model.revision=1234567"]).model.revision == "1234567"
    assert configs.from_config_dict(good(), ["model.revision=None"]).model.revision is None


def test_the_largest_numbers_are_taken():
    run = configs.from_config_dict(good(), ["train.steps=2147483647", f"seed={2**32 - 1}"])
    assert (run.train.steps, run.seed) == (2**31 - 1, 2**32 - 1)


def test_a_number_that_no_float_holds_is_named():
    assert "0000 is not a number" in problems(good().to_dict() | {"optim": {"lr": 10**400}})


def test_an_array_is_no_value():
    config = good()
    config.optim.lr = np.zeros(2)
    config.optim.schedule = np.zeros(2)
    text = problems(config)
    assert "optim.lr = array([0., 0.]) is not a number" in text
    assert "optim.schedule = array([0., 0.]) is not one of cosine" in text


def test_paths_and_numpy_numbers_of_a_config_file_are_taken(tmp_path):
    config = good()
    config.model.path = tmp_path
    config.train.batch_size = np.int64(4)
    run = configs.from_config_dict(config)
    assert (run.model.path, run.train.batch_size) == (str(tmp_path), 4)


def test_checking_leaves_the_caller_s_dict_alone():
    tree = good().to_dict()
    configs.from_config_dict(tree, ["optim.lr=5.0"])
    assert tree["optim"]["lr"] == configs.default().optim.lr


def test_something_else_than_a_config_is_refused():
    with pytest.raises(ConfigError, match="not NoneType"):
        configs.from_config_dict(None)  # pyright: ignore[reportArgumentType]


def test_an_override_without_a_value_is_named():
    assert "has no '='" in problems(good(), ["optim.lr"])


def test_a_whole_float_is_a_whole_number_and_a_boolean_is_not():
    assert configs.from_config_dict(good(), ["train.batch_size=8.0"]).train.batch_size == 8
    assert "train.batch_size = True is not a whole number" in problems(good(), ["train.batch_size=true"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path="], "model.path is empty"),
        (["data.train=()"], "data.train is empty"),
        (["train.epochs=1.0"], "both are set; set exactly one"),
        (["train.steps=None"], "neither is set; set exactly one"),
        (["train.batch_size=6", "train.accumulation=4"], "cannot be cut into train.accumulation = 4"),
        (["data.train_on=all", "data.train_turns=last"], "there is no last turn to choose"),
        (["data.train_on=user,asistant"], "'asistant' is no role; did you mean assistant?"),
        (["optim.b2=1.0"], "optim.b2 = 1.0 must be at least 0 and below 1"),
        (["optim.eps=-1.0"], "optim.eps = -1.0 must be greater than 0"),
        (["optim.final_lr_ratio=7"], "must lie between 0 and 1"),
        (["optim.decay_steps=2"], "belongs to optim.schedule = 'wsd'"),
        (["optim.lr=1e999"], "optim.lr = inf is not a finite number"),
        (["train.steps=None", "train.epochs=1e999"], "train.epochs = inf is not a finite number"),
        (["seed=-1"], "seed = -1 must lie between 0 and"),
        (["model.chat_template=no.jinja"], "there is no file no.jinja"),
        (["train=5"], "train is a section; set one of its keys"),
        (["optim.warmup_steps=10"], "optim.warmup_steps = 10 but train.steps = 10; make the warmup shorter"),
        (["evaluate.every_steps=5"], "there is nothing to evaluate"),
        (["mesh.data=-1"], "only one axis may be -1"),
        (["mesh.tensor=0"], "mesh.tensor = 0 must be a number of devices"),
        (["optim.lr=-1.0"], "optim.lr = -1.0 must not be negative"),
        (["checkpoint.every_steps=0"], "checkpoint.every_steps = 0 must be greater than 0"),
        (["train.steps=1e30"], "train.steps = 1e+30 is too large; the largest whole number here is 2147483647"),
        (["data.max_length=2147483648"], "data.max_length = 2147483648 is too large; the largest whole number here"),
        (["train.steps=None", "train.epochs=1e30"], "train.epochs = 1e+30 is too large; the largest number here"),
        (["data.columns=3"], "data.columns = 3 is not a mapping of texts"),
    ],
)
def test_values_that_do_not_combine_are_named_with_the_way_out(overrides, message):
    assert message in problems(good(), overrides)


def test_the_run_config_itself_is_complete_without_a_config_file():
    with pytest.raises(ConfigError, match="model.path is empty"):
        configs.from_config_dict(RunConfig().to_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function get_config"),
        ("def get_config():\n    return 3\n", "returned int, not a ConfigDict"),
        ("def get_config():\n    raise RuntimeError('boom')\n", "get_config\\(\\) failed with RuntimeError: boom"),
        ("def get_config(:\n", "failed with SyntaxError"),
        (
            "from jax_sft import config\ndef get_config():\n    config.default().optm.lr = 1\n",
            "did you mean optim",
        ),
    ],
)
def test_a_config_file_that_fails_says_where_and_why(tmp_path, text, message):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        configs.load(file)


def test_a_missing_config_file_is_named():
    with pytest.raises(ConfigError, match="no/such.py: no such file"):
        configs.load("no/such.py")


@pytest.mark.parametrize("name", ["c.yaml", "config"])
def test_a_config_file_that_is_not_named_as_python_is_refused(tmp_path, name):
    file = tmp_path / name
    file.write_text("model: x\n")
    with pytest.raises(ConfigError, match=r"its name does not end in \.py; name a Python file with get_config\(\)"):
        configs.load(file)


def test_how_new_rows_start_is_one_of_three_and_needs_new_tokens():
    said = problems(good(), ["model.new_tokens=<|new|>", "model.new_rows=mena"])
    assert "model.new_rows = 'mena' is not one of mean, zeros, sample; did you mean mean?" in said
    assert "'zeros' says how the rows of model.new_tokens start, and that is empty; name the tokens there, or" in (
        problems(good(), ["model.new_rows=zeros"])
    )
    assert configs.from_config_dict(good(), ["model.new_tokens=<|new|>", "model.new_rows=sample"])


@pytest.mark.parametrize(
    "name", ["name", "org/name/more", "org/na--me", "org/name.git", "/name", "org/näme", "-org/n", ""]
)
def test_what_the_hub_takes_for_no_name_is_refused_at_the_door(name):
    assert f"export.push_to = {name!r} is no name of the hub; write org/name" in problems(
        good(), [f"export.push_to={name}"]
    )


def test_a_name_of_the_hub_is_taken_and_private_needs_one():
    run = configs.from_config_dict(good(), ["export.push_to=My-org_1/model.v2", "export.push_private=true"])
    assert (run.export.push_to, run.export.push_private) == ("My-org_1/model.v2", True)
    assert "export.push_private belongs to export.push_to" in problems(good(), ["export.push_private=true"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.alpha=8.0"], "lora.alpha asks for adapters, but lora.rank = 0 means full fine-tuning; set lora.rank"),
        (
            ["lora.dora=true", "lora.targets=('attention',)"],
            "or leave out lora.targets, lora.dora",
        ),
        (["lora.base=nf4"], "lora.base = 'nf4' with lora.rank = 0: the weights of a quantised base cannot be trained"),
        (["lora.base=int8", "lora.rank=0"], "set lora.rank, such as 16, for adapters on it, or leave out lora.base"),
        (["lora.rank=8", "train.freeze=('norms',)"], "train.freeze belongs to full fine-tuning; with adapters the"),
        (["lora.rank=8", "export.format=full"], "export.format = 'full' with adapters; choose 'merged'"),
        (["export.format=merged"], "export.format = 'merged', but no adapters are trained; choose 'full', or set"),
        (["export.format=adapter"], "export.format = 'adapter', but no adapters are trained; choose 'full', or set"),
        (["lora.rank=8", "lora.layers=3-1"], "lora.layers = '3-1' is no list of layers; write it as 0-3,20-27"),
        (["lora.rank=8", "lora.layers=0;2"], "lora.layers = '0;2' is no list of layers; write it as 0-3,20-27"),
        (["lora.rank=8", "lora.layers="], "lora.layers = '' is no list of layers"),
        (["lora.rank=-1"], "lora.rank = -1 must not be negative"),
        (["lora.rank=8", "lora.dropout=1.0"], "lora.dropout = 1.0 must be at least 0 and below 1"),
        (["lora.rank=8", "lora.alpha=0.0"], "lora.alpha = 0.0 must be greater than 0"),
        (["lora.rank=8", "lora.rank_pattern.q_proj=0"], "lora.rank_pattern.q_proj = 0 must be greater than 0"),
        (["lora.rank=8", "lora.base=nf5"], "lora.base = 'nf5' is not one of float32, bfloat16, int8, nf4; did you"),
        (["lora.adapter=no/such"], "lora.adapter: there is no folder no/such; name one that holds adapter_config.json"),
    ],
)
def test_what_is_said_of_adapters_is_checked_at_the_door(overrides, message):
    assert message in problems(good(), overrides)


def test_an_adapter_to_go_on_from_says_its_own_rank(tmp_path):
    said = problems(good(), [f"lora.adapter={tmp_path}", "lora.rank=8", "lora.dora=true"])
    assert f"lora.adapter = '{tmp_path}' brings its own rank and dora; leave out lora.rank, lora.dora" in said
    free = [f"lora.adapter={tmp_path}", "lora.dropout=0.1", "lora.base=nf4", "lora.b_lr_ratio=4.0"]
    assert configs.from_config_dict(good(), free).export.format == "adapter"


def test_adapters_learn_ten_times_as_fast_and_leave_as_they_were_trained():
    plain = good()
    plain.optim.lr = None
    full, adapted = configs.from_config_dict(plain), configs.from_config_dict(plain, ["lora.rank=8"])
    assert (full.optim.lr, full.export.format, full.export.dtype) == (1e-5, "full", "bfloat16")
    assert (adapted.optim.lr, adapted.export.format, adapted.export.dtype) == (1e-4, "adapter", "float32")
    assert configs.from_config_dict(plain, ["lora.rank=8", "optim.lr=1e-3"]).optim.lr == 1e-3
    merged = configs.from_config_dict(plain, ["lora.rank=8", "export.format=merged"])
    assert merged.export.dtype == "bfloat16"
    assert configs.from_config_dict(plain, ["lora.rank=8", "lora.layers=0-3, 7"]).lora.layers == "0-3, 7"


def test_sets_and_stages_are_sections_by_name_and_by_number(tmp_path):
    config = configs.default()
    config.model.path, config.data.sets = "m", {"law": {"paths": ("a.jsonl",)}, "chat": {"paths": ["b.jsonl"]}}
    config.stages = ({"name": "short", "steps": 5}, {"name": "all", "epochs": 1})
    overrides = ["data.sets.law.weight=3", "data.sets.chat.weight=0.5", "stages.1.weights.law=2", "stages.0.lr=1e-3"]
    run = configs.from_config_dict(config, overrides)
    assert run.data.sets["law"] == configs.SetConfig(paths=("a.jsonl",), weight=3.0)
    assert run.data.sets["chat"] == configs.SetConfig(paths=("b.jsonl",), weight=0.5)
    assert run.stages[0] == configs.StageConfig(name="short", steps=5, lr=1e-3)
    assert run.stages[1] == configs.StageConfig(name="all", epochs=1.0, weights={"law": 2.0})
    assert configs.from_config_dict(run.to_dict()) == run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sets.law.wieght=3"], "data.sets.law.wieght is not a config key; did you mean data.sets.<name>.weight?"),
        (["data.sets.law=3"], "data.sets.law is a section; set one of its keys"),
        (["data.sets=3"], "data.sets = 3 is not a mapping of names to sections"),
        (["stages=3"], "stages = 3 is not a list of sections"),
        (["stages.2.lr=1e-3"], "stages.2.lr: there is no number 2; they are counted from 0, and there are 0"),
        (["data.sets.law.weight=much"], "data.sets.law.weight = 'much' is not a number or None"),
    ],
)
def test_sets_and_stages_of_wrong_shape_are_told(overrides, message):
    config = configs.default()
    config.model.path, config.data.train, config.train.steps = "m", ("a.jsonl",), 3
    with pytest.raises(ConfigError, match=re.escape(message)):
        configs.from_config_dict(config, overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": ("a",), "sets": {"x": {"paths": ("b",)}}}}, "data.train and data.sets are both set"),
        ({"data": {"sets": {"x": {}}}}, "data.sets.x.paths is empty; name at least one file"),
        ({"data": {"sets": {"": {"paths": ("b",)}}}}, "data.sets: a set has an empty name, which no log could tell"),
        (
            {"data": {"train": ("a",), "validation_sets": {" ": ("b",)}}},
            "data.validation_sets: a set has an empty name, which no log could tell; give it one",
        ),
        (
            {"data": {"sets": {"x": {"paths": ("b",), "weight": 1, "count": 3}}}},
            "data.sets.x: weight and count both say",
        ),
        ({"data": {"sets": {"x": {"paths": ("b",), "cap": 0}}}}, "data.sets.x.cap = 0 must be greater than 0"),
        ({"data": {"train": ("a",), "temperature": 2.0}}, "data.temperature belongs to data.sets, which is empty"),
        (
            {"data": {"temperature": 2.0, "sets": {"x": {"paths": ("b",), "count": 3}}}},
            "data.sets.x.count and data.temperature both say how much is drawn",
        ),
        (
            {"data": {"sets": {"x": {"paths": ("b",), "weight": 1}, "y": {"paths": ("c",)}}}},
            "data.sets: x has a weight and y has none; weigh all of them, or none",
        ),
        ({"data": {"train": ("a",), "holdout": 0.6}}, "data.holdout = 0.6 must lie between 0 and 0.5"),
        ({"data": {"train": ("a",), "holdout": -0.1}}, "data.holdout = -0.1 must lie between 0 and 0.5"),
        ({"data": {"train": ("a",), "validation_sets": {"law": ()}}}, "data.validation_sets.law is empty; name at"),
        (
            {"data": {"sets": {"x": {"paths": ("b",)}}, "holdout": 0.1, "validation_sets": {"x": ("c",)}}},
            "data.validation_sets.x: data.holdout takes a part of data.sets.x under the same name",
        ),
        (
            {"data": {"train": ("a",), "validation_sets": {"law": ("c",)}}, "evaluate": {"best": "laww"}},
            "evaluate.best = 'laww' is no validation set; did you mean law?; the named sets are law",
        ),
        (
            {"data": {"train": ("a",), "validation": ("c",)}, "evaluate": {"best": "law"}},
            "evaluate.best = 'law' is no validation set; no set has a name: see data.validation_sets",
        ),
        (
            {"data": {"train": ("a",), "validation_sets": {"law": 3}}},
            "data.validation_sets = {'law': 3} is not a mapping of names to lists of texts",
        ),
        (
            {"data": {"train": ("a",), "template_args": 3}},
            "data.template_args = 3 is not a mapping of texts to values",
        ),
        (
            {"data": {"train": ("a",), "template_args": {"tools": ()}}},
            "data.template_args.tools is given to the chat template already; take it out",
        ),
        (
            {"evaluate": {"patience": 2, "every_steps": 1, "prompts": ("q",)}},
            "evaluate.patience goes by the validation loss; set data.validation or data.holdout, or leave it out",
        ),
        (
            {"evaluate": {"patience": 2}, "data": {"train": ("a",), "validation": ("b",)}},
            "evaluate.patience counts evaluations, and there is none on the way; set evaluate.every_steps",
        ),
        (
            {
                "evaluate": {"patience": 2, "every_steps": 1},
                "data": {"train": ("a",), "validation": ("b",)},
                "train": {},
                "stages": [{"steps": 3}],
            },
            "evaluate.patience would end the run within a stage; leave it out, and let stages start from the best",
        ),
        (
            {"export": {"weights": "best"}},
            "export.weights = 'best' goes by the validation loss; set data.validation or data.holdout, or leave it",
        ),
        (
            {"data": {"train": ("a",), "template_args": {"a-b": 1}}},
            "data.template_args: 'a-b' is no name that a chat template could ask for; write letters, digits and _",
        ),
        (
            {"data": {"sets": {"a": {"paths": ("a",), "template_args": {"day": 1j}}}}},
            "data.sets.a.template_args.day = 1j is nothing that JSON can hold; write it as a text, a number or",
        ),
        (
            {"train": {}, "stages": [{"steps": 3, "order": "score"}]},
            "stages.0.order = 'score' needs a file of losses; name it in data.quality.scores",
        ),
        (
            {"data": {"train": ("a",), "stream": {"on": True}, "quality": {"near_duplicate": "drop"}}},
            "data.quality.near_duplicate compares all conversations, which data.stream does not hold; clean the files",
        ),
        (
            {"data": {"train": ("a",), "stream": {"on": True}, "quality": {"max_length_deviation": 4.0}}},
            "data.quality.max_length_deviation looks at the beginning of the data, which data.stream does not",
        ),
        (
            {"data": {"train": ("a",), "quality": {"leakage": "drop"}}},
            "data.quality.leakage = 'drop', but there is nothing whose prompts could leak; name files in",
        ),
        ({"stages": [{"steps": 3}]}, "train.steps and train.epochs: each of the stages has its own; leave these out"),
        ({"train": {}, "stages": [{"steps": 3, "epochs": 1}]}, "stages.0.steps and stages.0.epochs: both are set"),
        ({"train": {}, "stages": [{}]}, "stages.0.steps and stages.0.epochs: neither is set"),
        (
            {"train": {}, "stages": [{"steps": 3, "weights": {"laww": 1.0}}]},
            "stages.0.weights.laww: there is no set laww",
        ),
        (
            {"train": {}, "stages": [{"steps": 3, "start": "best"}]},
            "stages.0.start = 'best': there is no stage before it",
        ),
        (
            {"train": {}, "stages": [{"steps": 3}, {"steps": 3, "start": "best"}]},
            "stages.1.start = 'best' is chosen by the validation loss; set data.validation or data.holdout",
        ),
        (
            {"train": {}, "optim": {"warmup_steps": 4}, "stages": [{"steps": 9}, {"steps": 4}]},
            "optim.warmup_steps = 4 but stages.1.steps = 4",
        ),
        (
            {
                "train": {},
                "data": {"sets": {"x": {"paths": ("b",)}}},
                "stages": [{"steps": 3, "weights": {"x": 0.0}}],
            },
            "stages.0.weights: all are 0",
        ),
    ],
)
def test_what_is_said_of_sets_and_stages_is_checked_at_the_door(changes, message):
    config = {"model": {"path": "m"}, "data": {"train": ("a",)}, "train": {"steps": 5}, **changes}
    assert message in problems(config)


@pytest.mark.parametrize(
    ("key", "is_low"),
    [
        ("validation/loss", True),
        ("validation/loss/accuracy", True),  # of a set of that name
        ("validation/accuracy/x", False),
        ("validation/gap", True),
        ("metric/glossary/f1", False),
        ("metric/weekly/chrf", False),
        ("probes/answers", False),
        ("rules/prompt_loose", False),
        ("forgetting/kl", True),
        ("forgetting/loss_per_byte", True),
        ("forgetting/task_agreement", False),
    ],
)
def test_less_is_better_of_losses_and_divergences_alone(key, is_low):
    assert is_better_low(key) == is_low
