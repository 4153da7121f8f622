"""Answers and a search by vLLM, in its own environment, as by the loop."""

from __future__ import annotations

import pytest

from tests.tools.runs import HERE, answer

SCRIPT = str(HERE / "vllm_runs.py")


@pytest.fixture
def found(run_in, small_smollm2):
    """What both engines answer."""
    return answer(run_in("vllm", "python", SCRIPT, "answers", str(small_smollm2)))


def test_vllm_answers_as_the_loop_does_before_and_after_each_change_and_when_it_is_taken_back(found):
    loop, other = found["before"]
    assert loop == other
    assert len({tuple(tokens) for tokens in loop}) > 1
    assert len(found["changed"]) == 7
    for changed, same in found["changed"].values():
        assert changed == same
    assert sum(changed != loop for changed, _ in found["changed"].values()) >= 4
    assert all(restored == [loop, loop] for restored in found["restored"].values())
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
