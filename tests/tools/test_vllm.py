"""Answers and a search by vLLM, in its own environment, as by the loop."""

from __future__ import annotations

import re

import pytest

from tests.tools.runs import HERE, answer

SCRIPT = str(HERE / "vllm_runs.py")


def check_followed(found):
    """Both answered alike throughout, and the changes were none of no effect."""
    loop, other = found["before"]
    assert loop == other
    assert len({tuple(tokens) for tokens in loop}) > 1
    assert len(found["changed"]) == 7
    for changed, same in found["changed"].values():
        assert changed == same
    assert sum(changed != loop for changed, _ in found["changed"].values()) >= 4
    assert all(restored == [loop, loop] for restored in found["restored"].values())


@pytest.fixture
def found(run_in, small_smollm2):
    """What both engines answer."""
    return answer(run_in("vllm", "python", SCRIPT, "answers", str(small_smollm2)))


def test_vllm_answers_as_the_loop_does_before_and_after_each_change_and_when_it_is_taken_back(found):
    check_followed(found)
    assert found["ended"][0] == found["ended"][1]
    assert found["ended"][0][0][-1] in found["ends"]
    assert found["threads"] == 1
    assert found["nan"] == "ScoreError: the model's logits are nan, so that it has no answers."
    assert found["norm"] == (
        "ModelError: engine vllm follows changes of blocks alone, and model.norm.weight has changed. Use engine "
        "transformers."
    )
    assert found["strange"].startswith("ModelError: engine vllm doesn't take XGLMForCausalLM: ")


def test_a_search_and_a_comparison_find_the_same_with_either_engine(run_in, small_smollm2, minilm):
    found = answer(run_in("vllm", "python", SCRIPT, "search", str(small_smollm2), str(minilm)))
    assert found["vllm"].pop("engine") == "vllm"
    assert found["transformers"].pop("engine") == "transformers"
    assert found["vllm"]["steps"]
    assert found["vllm"] == found["transformers"]


def test_a_server_answers_as_the_loop_does_gets_its_own_weights_back_and_what_it_cannot_do_is_told(
    run_in, small_smollm2
):
    found = answer(run_in("vllm", "python", SCRIPT, "server", str(small_smollm2)))
    check_followed(found)
    assert found["engines"] == ["transformers", "vllm"]
    assert found["steps"][0] == found["steps"][1] != []
    assert found["scores"][0] == found["scores"][1] == found["scores"][2]
    assert re.match(r"\d+ measurements were left by a run that was stopped; none is made again", found["gone on"])
    assert found["files with the key"] == []
    assert found["differed"]
    assert found["own weights"]

    url = r"engine_url http://127\.0\.0\.1:\d+"
    ends = r".* or use engine transformers\."
    expected = {
        "nan": r"ScoreError: the model's logits are nan, so that it has no answers\.",
        "long": rf"ModelError: engine vllm: {url} takes 256 tokens, and the longest .* 1000\. {ends}",
        "dtype": rf"ModelError: engine vllm: {url} computes in float32, and this .* bfloat16\. Start{ends}",
        "other": rf"ModelError: engine vllm: {url} has a model of another num_hidden_layers\. Start it with {ends}",
        "shape": rf"ModelError: {url}: /collective_rpc answers 500: .* It has to see {ends}",
        "hung": rf"ModelError: {url}: /\S+ has answered nothing for 20 s, as if .* with the same output it goes on .*",
        "key": rf"ModelError: {url}: /v1/models answers 401: Unauthorized\. Set VLLM_API_KEY to the key {ends}",
        "gone": rf"ModelError: {url}: no vLLM server answers there \(.*refused\)\. Start one: `VLLM_SERVER_{ends}",
        "no weights": rf"ModelError: {url}: this server takes no weights\. Start it anew with VLLM_SERVER_DEV_{ends}",
    }
    for name, said in expected.items():
        assert re.fullmatch(said, found[name]), found[name]


def test_auto_takes_the_faster_of_loop_and_vllm_where_that_is_worth_trying(run_in, small_smollm2):
    found = answer(run_in("vllm", "python", SCRIPT, "auto", str(small_smollm2)))
    taken = {case: each["outcome"].pop("engine") for case, each in found.items()}
    assert found["short"]["outcome"]["steps"]
    assert all(each["outcome"] == found["short"]["outcome"] for each in found.values())
    assert (found["short"]["told"], taken["short"]) == ([], "transformers")
    trying, without, listed = found["no room"]["told"]
    assert trying.startswith("trying vllm, as all answers may take the loop ")
    assert without.startswith("without vllm: engine vllm takes ")
    assert re.fullmatch(r"transformers \S+ s, for the first tokens of some answers; trying them took \d+ s", listed)
    for case in ("slower", "tried"):
        seconds = dict(re.findall(r"(\w+) (\d+\.\d) s", found[case]["told"][-1]))
        assert set(seconds) == {"transformers", "vllm"}
        assert float(seconds[taken[case]]) == min(map(float, seconds.values()))
    assert taken["no room"] == taken["slower"] == "transformers"
    assert not found["slower"]["group"], "a vLLM that isn't used leaves no group of processes behind"


def test_a_trainers_own_vllm_writes_the_answers_and_is_left_with_the_models_weights(run_in, small_smollm2):
    found = answer(run_in("vllm", "python", SCRIPT, "colocated", str(small_smollm2)))
    plain, own, auto = (found[case] for case in ("transformers", "own", "auto"))
    assert (plain.pop("engine"), own.pop("engine"), auto.pop("engine")) == ("transformers", "vllm", "vllm")
    assert plain["steps"]
    assert plain == own == auto
    assert found["refused"]["engine"] == found["failing"]["engine"] == "transformers"
    assert plain["saved"]
    assert found["failing"] == {"engine": "transformers", **plain}
    by_llm, by_loop = found["left"]
    assert by_llm == by_loop
    assert found["asleep"].startswith("ModelError: engine vllm: the trainer's vLLM sleeps between its steps, without ")
    assert found["none"].startswith("ModelError: engine vllm: this trainer runs no vLLM in its own process. Give it ")
