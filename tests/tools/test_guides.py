"""The commands of docs/guides.md that train in the real tools, in its order, after those that write what they train."""

from __future__ import annotations

import re
import shlex

from splaser_plugin.scanning.selection import choose
from tests.builders import ROOT
from tests.pages import BLOCK, commands_of
from tests.tools.runs import LLAMAFACTORY_ON_CPU, axolotl_on_cpu, emit, last_lines, trained_adapters, trained_whole

SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "guides.md").read_text(), re.M | re.S))


def commands(section: str, language: str) -> list[list[str]]:
    found = BLOCK.findall(SECTIONS[section])
    return [words for written_in, code in found if written_in == language for words in commands_of(code)]


def test_no_other_section_has_commands_of_other_tools():
    assert [name for name in SECTIONS if commands(name, "text")] == ["Axolotl", "LLaMA-Factory"]


def test_axolotls_commands_train_what_was_emitted(folder, run_in, small_scan):
    for words in commands("Axolotl", "sh"):
        emit(shlex.join(words[2:]))
    [[*train, config]] = commands("Axolotl", "text")
    run = run_in("axolotl", *train, axolotl_on_cpu(config), "--launcher", "python")
    assert run.code == 0, last_lines(run)
    assert trained_adapters(folder / "out") == set(choose(small_scan, top=16).names)


def test_llamafactorys_commands_train_what_was_emitted(folder, run_in, small_scan, small_smollm2):
    for words in commands("LLaMA-Factory", "sh"):
        emit(shlex.join(words[2:]))
    for words in commands("LLaMA-Factory", "text"):
        run = run_in("llamafactory", *words, *LLAMAFACTORY_ON_CPU)
        assert run.code == 0, last_lines(run)
    assert trained_adapters(folder / "outputs" / "splaser") == set(choose(small_scan, top=16).names)
    assert trained_whole(small_smollm2, folder / "outputs" / "whole") == set(choose(small_scan, fraction=0.5).names)
