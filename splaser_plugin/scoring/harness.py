"""Models asked and graded by lm-evaluation-harness, document by document."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from splaser_plugin.config.tasks import LM_EVAL
from splaser_plugin.distributed import input_device, is_out_of_memory, share
from splaser_plugin.errors import ModelError, ScoreError, TaskError
from splaser_plugin.generation.evaluation import MODEL_ERRORS, evaluating
from splaser_plugin.generation.teacher_forcing import fitting_batch
from splaser_plugin.progress import count_items
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.scoring.tasks import FEW_SHOT_SEED, Documents, Values, reason_of


class Harness:
    """A loaded model as lm-evaluation-harness asks it, without a chat template, as is its default.

    batch_size: most texts in one forward pass. Raises ModelError when it can't.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int) -> None:
        from lm_eval.models.huggingface import HFLM

        self.model = model
        self.batch_size = batch_size
        try:
            with evaluating(model):
                self._asked: Any = HFLM(pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer))
        except MODEL_ERRORS as error:
            name = type(model).__name__
            raise ModelError(f"lm-evaluation-harness can't ask this {name} ({reason_of(error)}).") from error
        self._device = self._asked._device = input_device(model)

    def measure(self, asked: Documents, items: Sequence[int]) -> list[Values]:
        """What the task's metrics say of each of these documents, given by their places.

        Raises:
            ModelError: The device is out of memory.
            ScoreError: The model fails, or gives a probability that isn't finite.
            TaskError: The task's own code fails.
        """
        answered: dict[int, list[Any]] = {}
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            answered |= {item: [_anew(request) for request in asked.requests[item]] for item in part}
            self._answer(asked.name, [request for item in part for request in answered[item]])
            count_items(len(part))
        try:
            return asked.results(items, answered)
        except TaskError:
            raise
        except Exception as error:  # as in loading it
            raise TaskError(f"task '{asked.name}': its metrics can't be computed ({reason_of(error)}).") from error

    def _answer(self, name: str, requests: Sequence[Any]) -> None:
        """Give each request its responses."""
        for kind in dict.fromkeys(request.request_type for request in requests):
            repeated = [request for request in requests if request.request_type == kind for _ in range(request.repeats)]
            self._asked.batch_size_per_gpu = self._fitting(kind, repeated)
            try:
                device = [self._device.index or 0] if self._device.type == "cuda" else []
                with evaluating(self.model), torch.random.fork_rng(device):
                    torch.manual_seed(FEW_SHOT_SEED)  # of tasks whose answers are sampled
                    responses = getattr(self._asked, kind)(repeated, disable_tqdm=True)
            except MODEL_ERRORS as error:
                if is_out_of_memory(error):
                    raise ModelError(
                        f"task '{name}': the device's memory has no room for {self._asked.batch_size_per_gpu} of its "
                        "questions at once. Lower --batch-size."
                    ) from error
                raise ScoreError(f"task '{name}': the model fails at its questions ({reason_of(error)}).") from error
            for request, response in zip(repeated, responses, strict=True):
                likelihood = response[0] if isinstance(response, tuple) else response
                if isinstance(likelihood, float) and not math.isfinite(likelihood):
                    raise ScoreError(f"task '{name}': a log-probability is {likelihood}.")
                request.resps.append(response)

    def _fitting(self, kind: str, requests: Sequence[Any]) -> int:
        """How many of these go into one forward pass."""
        if kind == "generate_until":
            return self.batch_size
        longest = max(len(self._asked.tok_encode("".join(request.args))) for request in requests)
        return fitting_batch(self.batch_size, min(longest, self._asked.max_length))


def _anew(request: Any) -> Any:
    """The same request, without what it was answered with."""
    return replace(request, resps=[], filtered_resps={})


class TaskScorer:
    """A task's first metric that is a mean over its documents, of each document; minus it where less is better."""

    def __init__(self, harness: Harness, asked: Documents) -> None:
        self.name = f"{LM_EVAL}{asked.name}"
        self.size = len(asked)
        self.batch_size = harness.batch_size
        self._harness = harness
        self._asked = asked
        self._sign = 1.0 if asked.task.higher_is_better()[asked.metric] else -1.0

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        """Raises ScoreError when the model fails at it, and TaskError when the task's own code does."""
        return Scores(tuple(items), tuple(share(items, self._values, self._harness.model)))

    def _values(self, items: list[int]) -> list[float]:
        found = self._asked.by_mean(self._harness.measure(self._asked, items))
        name = next((name for name in found if name.partition(",")[0] == self._asked.metric), "")
        if not name:
            raise TaskError(f"{self.name}: its documents have no {self._asked.metric}. Mend the task's file.")
        return [self._sign * value for value in found[name]]
