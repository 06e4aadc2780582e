"""Files and settings: what YAML says, and what lies over what."""

from __future__ import annotations

import pytest

from torchplug_cli.reading import ConfigError, load, whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 100000.0), ("-.5", -0.5), ("1.", 1.0), (".inf", float("inf")), ("3", 3), ("-3", -3), ("010", 10),
        ("0x10", 16), ("0o10", 8), ("no", "no"), ("off", "off"), ("yes", "yes"), ("on", "on"), ("y", "y"), ("true", True),
        ("False", False), ("null", None), ("~", None), ("", None), ("1_000", "1_000"), ("01:12:00:00", "01:12:00:00"), ("1:30", "1:30"),
        ("2026-11-21", "2026-11-21"), ("1.2.3", "1.2.3"), ("'3'", "3"), ("[1e-3, no]", [0.001, "no"]), ("{0: 4, 4: 8}", {0: 4, 4: 8}),
        ("1e", "1e"), ("e1", "e1"),
    ],
)  # fmt: skip
def test_a_plain_value_is_what_it_looks_like(text, value):
    assert load(text) == value
    assert type(load(text)) is type(value)


def test_files_lie_over_each_other_in_order(project):
    a = project.write("a.yaml", "trainer: {max_epochs: 1, seed: 1}\nplugins: [progress, {ema: {decay: 0.9, warmup: true}}]\nckpt_path: a")
    b = project.write("b.yaml", "trainer: {max_epochs: 2}\nplugins: [{ema: {decay: 0.8}}, csv]\nckpt_path: b")
    assert whole([a, b], []) == {
        "trainer": {"max_epochs": 2, "seed": 1},
        "plugins": {"progress": {}, "ema": {"decay": 0.8, "warmup": True}, "csv": {}},
        "ckpt_path": "b",
    }
    assert whole([b, a], [])["trainer"] == {"max_epochs": 1, "seed": 1}


def test_an_empty_list_of_plugins_takes_all_away(project):
    none = project.write("none.yaml", "plugins: []")
    assert whole(["config.yaml", none], [])["plugins"] == {}


def test_an_option_is_replaced_as_a_whole_and_the_arguments_of_a_class_one_by_one(project):
    a = project.write(
        "a.yaml", "plugins: [{accumulation_schedule: {scheduling: {0: 2}}}]\nmodule: {class_path: m.A, init_args: {x: {a: 1}, y: 2}}"
    )
    b = project.write("b.yaml", "plugins: [{accumulation_schedule: {scheduling: {4: 8}}}]\nmodule: {init_args: {x: {b: 3}}}")
    merged = whole([a, b], [])
    assert merged["plugins"] == {"accumulation_schedule": {"scheduling": {4: 8}}}
    assert merged["module"] == {"class_path": "m.A", "init_args": {"x": {"a": 1, "b": 3}, "y": 2}}


@pytest.mark.parametrize("over", ["module: {class_path: m.B}", "--set module.class_path=m.B"])
def test_another_class_takes_the_arguments_of_the_former_away(project, over):
    a = project.write("a.yaml", "module: {class_path: m.A, init_args: {x: 1}}")
    merged = whole([a], [over[6:]]) if over.startswith("--set ") else whole([a, project.write("b.yaml", over)], [])
    assert merged["module"] == {"class_path": "m.B"}


def test_the_same_class_keeps_them(project):
    a = project.write("a.yaml", "module: {class_path: m.A, init_args: {e: {class_path: m.E, init_args: {x: 1}}}}")
    assert whole([a], ["module.class_path=m.A"])["module"]["init_args"]["e"]["init_args"] == {"x": 1}
    assert whole([a], ["module.init_args.e.class_path=m.F"])["module"]["init_args"]["e"] == {"class_path": "m.F"}
    assert whole([a], ["module.init_args.e.init_args.x=2"])["module"]["init_args"]["e"]["init_args"] == {"x": 2}


@pytest.mark.parametrize(
    ("setting", "section", "value"),
    [
        ("trainer.max_epochs=3", "trainer", {"max_epochs": 3}),
        ("trainer.strategy={ddp: {timeout: 1m}}", "trainer", {"strategy": {"ddp": {"timeout": "1m"}}}),
        ("trainer.name=", "trainer", {"name": None}),
        ("trainer.name=a=b", "trainer", {"name": "a=b"}),
        ("plugins.ema.decay=0.99", "plugins", {"standard": {}, "ema": {"decay": 0.99}}),
        ("plugins.checkpoint:best.top_k=3", "plugins", {"standard": {}, "checkpoint:best": {"top_k": 3}}),
        ("plugins.ema={decay: 0.5}", "plugins", {"standard": {}, "ema": {"decay": 0.5}}),
        ("plugins.accumulation_schedule.scheduling.4=8", "plugins", {"standard": {}, "accumulation_schedule": {"scheduling": {4: 8}}}),
        ("plugins=[csv, {ema: {decay: 0.5}}]", "plugins", {"csv": {}, "ema": {"decay": 0.5}}),
        ("plugins=[]", "plugins", {}),
        ("module.init_args.encoder.init_args.width=3", "module", {"init_args": {"encoder": {"init_args": {"width": 3}}}}),
        ("ckpt_path=last", "ckpt_path", "last"),
    ],
)
def test_a_setting_sets_one_value(setting, section, value):
    assert whole([], [setting]) == {section: value}


def test_a_setting_changes_the_instance_that_is_listed(project):
    a = project.write("a.yaml", "plugins: [{'checkpoint:best': {top_k: 1, mode: max}}, torchplug-ema/ema]")
    merged = whole([a], ["plugins.checkpoint:best.top_k=3", "plugins.ema.decay=0.5"])
    assert merged["plugins"] == {"checkpoint:best": {"top_k": 3, "mode": "max"}, "torchplug-ema/ema": {"decay": 0.5}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {max_epochs: 1}\ntriner: {}", "bad.yaml: there is no section 'triner', did you mean 'trainer'?"),
        ("trainer:\n  seed: 1\n  name: [1\n", "bad.yaml, line 4: expected ',' or ']'"),
        ("trainer: {seed: 1}\ntrainer: {seed: 2}\n", "bad.yaml, line 2: the key 'trainer' is there twice"),
        ("- 1\n", "bad.yaml: must be a mapping of trainer, plugins, module, data"),
        ("trainer: 3", "bad.yaml: trainer must be a mapping, got 3"),
        ("plugins: {ema: 1}", "plugins must be a list of names and {name: options}, got {'ema': 1}"),
        ("plugins: [ema, {ema: {decay: 0.5}}]", "plugins lists 'ema' twice; give the instances names of their own: ema:a, ema:b"),
        ("plugins: [{ema: {}, csv: {}}]", "plugins lists names and {name: options} with one name each"),
        ("plugins: [{ema: 0.9}]", "plugins: the options of 'ema' must be a mapping, got 0.9"),
        ("module: {class_pth: x.Y}", "module has no key 'class_pth', did you mean 'class_path'?"),
        ("module: {class_path: x.Y, lr: 1}", "module has no key 'lr', did you mean module.init_args.lr?"),
        ("module: {class_path: 3}", "module.class_path must be where to import it from, got 3"),
        ("module: {class_path: x.Y, init_args: 3}", "module.init_args must be a mapping, got 3"),
        ("trainer: {name: \"\x01\"}", "bad.yaml: unacceptable character"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_said_with_its_place(project, text, said):
    project.write("bad.yaml", text)
    assert said in project.refused("fit", "bad.yaml")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("trainer.seed", "--set takes KEY=VALUE"),
        ("trainer.seed=[1", "--set trainer.seed: the value '[1' is no YAML"),
        ("triner.seed=1", "there is no section 'triner', did you mean 'trainer'?"),
        ("trainer=3", "trainer must be a mapping, got 3"),
        ("plugins.ema=3", "the options of 'ema' must be a mapping, got 3"),
        ("trainer.strategy.ddp.timeout.more=1", "nothing inside to set"),
        ("module.lr=3", "did you mean module.init_args.lr?"),
    ],
)
def test_a_mistake_in_a_setting_is_said(project, setting, said):
    file = project.write("s.yaml", "trainer: {strategy: {ddp: {timeout: 1m}}}")
    with pytest.raises(ConfigError) as caught:
        whole([file], [setting])
    assert said in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_said(project):
    assert "there is no file 'none.yaml'" in project.refused("fit", "none.yaml")
    assert "'nets.d' cannot be read" in project.refused("fit", str(project.folder.joinpath("nets.d").mkdir() or "nets.d"))
    project.folder.joinpath("latin.yaml").write_bytes(b"trainer: {name: \xe9}")
    assert "'latin.yaml' cannot be read" in project.refused("fit", "latin.yaml")
