from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.tools.runs import (
    HERE,
    LLAMAFACTORY_ON_CPU,
    SHORT_LASER,
    answer,
    check_lasered,
    emit,
    last_lines,
    trained_adapters,
    trained_whole,
)

LASER_SCRIPT = f"""\
from llamafactory.train.tuner import run_exp
from omegaconf import OmegaConf
from splaser_plugin import LaserCallback, LaserConfig

options = OmegaConf.merge(OmegaConf.load("c.yml"), OmegaConf.from_cli())
laser = LaserCallback(when="after", pairs="pairs.jsonl", config=LaserConfig(**{SHORT_LASER}))
run_exp(OmegaConf.to_container(options), callbacks=[laser])
"""


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_an_emitted_configuration_is_parsed_whole_and_trains_the_chosen_adapters(mode, stage, folder, chosen, run_in):
    emit(
        f"llamafactory scan.json --mode {mode} --stage {stage} --top 1 --dataset pairs.jsonl --output-dir out -o c.yml"
    )
    assert answer(run_in("llamafactory", "python", str(HERE / "strict_llamafactory.py"), "c.yml")) == []
    run = run_in("llamafactory", "llamafactory-cli", "train", "c.yml", *LLAMAFACTORY_ON_CPU)
    assert run.code == 0, last_lines(run)
    assert trained_adapters(folder / "out") == set(chosen)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_runner_script_trains_the_chosen_matrices_whole(stage, folder, chosen, run_in, small_smollm2):
    emit(
        f"llamafactory scan.json --mode unfrozen --stage {stage} --top 1 --dataset pairs.jsonl "
        "--output-dir out -o run.py"
    )
    run = run_in("llamafactory", "python", "run.py", *LLAMAFACTORY_ON_CPU)
    assert run.code == 0, last_lines(run)
    assert trained_whole(small_smollm2, folder / "out") == set(chosen)


def test_the_strict_parse_sees_what_the_yaml_would_let_pass(folder, run_in):
    emit("llamafactory scan.json --top 1 --dataset pairs.jsonl -o c.yml")
    values = yaml.safe_load(Path("c.yml").read_text())
    for wrong in ({"lora_rank": "many"}, {"lora_rnk": 4}):
        Path("wrong.yml").write_text(yaml.safe_dump(values | wrong))
        run = run_in("llamafactory", "python", str(HERE / "strict_llamafactory.py"), "wrong.yml")
        assert run.code != 0 or answer(run) == ["--lora_rnk", "4"]


def test_a_merged_file_of_ones_own_trains_the_chosen_adapters(folder, chosen, run_in, small_smollm2):
    emit("llamafactory scan.json --top 1 --dataset pairs.jsonl --output-dir out -o c.yml")
    own = "# mine\n" + yaml.safe_dump(
        yaml.safe_load(Path("c.yml").read_text()) | {"lora_target": "all", "lora_rank": 4}
    )
    Path("own.yml").write_text(own)
    emit("llamafactory scan.json --top 1 --base own.yml -o merged.yml")
    assert "# mine" in Path("merged.yml").read_text()
    run = run_in("llamafactory", "llamafactory-cli", "train", "merged.yml", *LLAMAFACTORY_ON_CPU)
    assert run.code == 0, last_lines(run)
    assert trained_adapters(folder / "out") == set(chosen)


def test_the_callback_lasers_the_model_after_dpo(folder, run_in):
    emit("llamafactory scan.json --stage dpo --top 1 --dataset pairs.jsonl --output-dir out -o c.yml")
    Path("laser.py").write_text(LASER_SCRIPT)
    run = run_in("llamafactory", "python", "laser.py", *LLAMAFACTORY_ON_CPU)
    assert run.code == 0, last_lines(run)
    assert check_lasered(folder / "out")


def test_the_example_is_parsed_whole(folder, run_in):
    example = HERE.parents[1] / "examples" / "llamafactory_dpo_lora.yml"
    assert answer(run_in("llamafactory", "python", str(HERE / "strict_llamafactory.py"), str(example))) == []
